"""What the recorded studies found: differences with their intervals, from results/ alone."""

from pathlib import Path

import pandas as pd

from utils.studies import STUDIES
from utils.study import Study, compare, summarise

# Columns of `cost_table` that stand beside an accuracy.
SHOWN = ("parameters", "multiply-accumulates", "inference", "training", "training peak")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def read_study(name: str, results: Path = RESULTS) -> pd.DataFrame:
    """The record of a study: one row per run and test size."""
    return pd.read_csv(results / f"study_{name}.csv")


def own_size(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: that of the test size of its recipe, which comes first."""
    return table.drop_duplicates(["value", "seed"])


def top1_column(study: Study) -> str:
    """The column that the study compares."""
    return f"top1_{study.weights}_pct"


def differences(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Differences of top-1 accuracy to the study's baseline, in points; see `utils.study.compare`.

    A study of the recipe has one row more: the averaged weights (EMA) against the raw ones of the
    same runs of the baseline, which is what leaving EMA out, or adding it, amounts to.
    """
    table, column = own_size(table), top1_column(study)
    if study.factor == "recipe":
        others = {"ema": ("without EMA", "top1_raw_pct"), "raw": ("with EMA", "top1_ema_pct")}
        value, other = others[study.weights]
        baseline = table[table.value == study.baseline]
        table = pd.concat([table, baseline.assign(value=value, **{column: baseline[other]})])
    return compare(table, study.baseline, column)


def differences_within(table: pd.DataFrame, by: str, baseline: str) -> pd.DataFrame:
    """Differences to the baseline among the rows of each value of column `by`, which is kept."""
    groups = table.groupby(by, sort=True)
    found = [compare(group, baseline).assign(**{by: value}) for value, group in groups]
    return pd.concat(found).set_index(by, append=True).swaplevel()


def by_length(table: pd.DataFrame) -> pd.DataFrame:
    """The study of lengths with the recipe's name alone ("small", "full") as its value."""
    return table.assign(value=table.value.str.split(",").str[0])


def by_training_size(table: pd.DataFrame, values: tuple[str, str]) -> pd.DataFrame:
    """The runs of two arms that differ in FixRes, the size that they were trained at as value.

    The baseline of a comparison is the one trained at the recipe's test size, "64 px".
    """
    table = table[table.value.isin(values)]
    return table.assign(value=table.train_crop_px.astype(str) + " px")


def read_costs(crop_px: int, results: Path = RESULTS) -> pd.DataFrame:
    """The record of scripts/benchmark.py --task networks at a size."""
    (path,) = results.glob(f"networks_{crop_px}px_*.csv")
    return pd.read_csv(path)


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Medians over rounds: a row per network, a column per quantity with its unit."""
    costs = costs.assign(quantity=costs.quantity + " (" + costs.unit + ")")
    return costs.pivot_table("value", "network", "quantity", "median", sort=False)


def cost_ratios(costs: pd.DataFrame, quantity: str, baseline: str) -> pd.DataFrame:
    """Costs over the baseline's of the same round: `median`, `min` and `max` of each network."""
    by_round = costs[costs.quantity == quantity].pivot(
        index="round", columns="network", values="value"
    )
    ratios = by_round.div(by_round[baseline], axis=0)
    return ratios.agg(["median", "min", "max"]).T


# ---- README's tables -----------------------------------------------------------------------------


def interval(row: pd.Series) -> str:
    """A difference with its interval, such as "+1.2 [-0.3, +2.7]"."""
    return f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"


def sentences(found: pd.DataFrame, baseline: str) -> list[str]:
    """A line per difference: what was compared, the interval, the seeds, the verdict."""
    return [
        f"{value} against {baseline}: {interval(row)} points, n = {row.n}: {row.verdict}"
        for value, row in found.iterrows()
    ]


def mean_std(row: pd.Series) -> str:
    """A mean with its standard deviation over seeds."""
    return f"{row['mean']:.1f} ± {row['std']:.1f}"


def study_table(study: Study, table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Every value of a study: accuracy, difference to the baseline, verdict and costs.

    Args:
        costs: a record of `read_costs`; its medians stand beside the accuracy.
    """
    first = own_size(table)
    summary = summarise(first, top1_column(study))
    found = differences(study, table)
    texts = found.apply(interval, axis=1).reindex(summary.index, fill_value="baseline")
    columns = {
        "top-1 (%)": summary.apply(mean_std, axis=1),
        "difference [95 % interval]": texts,
        "verdict": found.verdict.reindex(summary.index, fill_value=""),
        "n": summary.n,
    }
    networks = first.groupby("value", sort=False).network.first()
    medians = cost_table(costs[costs.quantity.isin(SHOWN)]).loc[networks].round(1)
    medians = medians.set_axis(networks.index)
    return pd.DataFrame(columns).join(medians).rename_axis(study.factor).reset_index()


def trick_effects(results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """What every trick brings: "added" to the bare recipe, and "in full", where it was left out."""
    found = {
        name: differences(STUDIES[name], read_study(name, results))
        for name in ("recipe_add_one", "recipe_leave_one_out")
    }
    added = found["recipe_add_one"].rename(lambda value: value.removeprefix("with "))
    left_out = found["recipe_leave_one_out"].rename(lambda value: value.removeprefix("without "))
    return {"added": added, "in full": negated(left_out)}


def negated(found: pd.DataFrame) -> pd.DataFrame:
    """Differences the other way round: what an arm has over the value that it is compared with."""
    turned = {"higher": "lower", "lower": "higher"}
    return found.assign(
        difference=-found.difference,
        low=-found.high,
        high=-found.low,
        verdict=found.verdict.replace(turned),
    )


def recipe_table(results: Path = RESULTS) -> pd.DataFrame:
    """Every trick with what it brings to the bare and to the full recipe."""
    effects = trick_effects(results)
    titles = {"added": "added to the bare recipe", "in full": "in the full recipe"}
    columns = {}
    for name, title in titles.items():
        columns[f"{title} [95 % interval]"] = effects[name].apply(interval, axis=1)
        columns[f"verdict {title}"] = effects[name].verdict
    columns["n"] = effects["added"].n
    return pd.DataFrame(columns).rename_axis("trick").reset_index()


def length_table(results: Path = RESULTS) -> pd.DataFrame:
    """The full recipe against the small one at each length."""
    table = by_length(read_study("length", results))
    summary = table.groupby(["epochs", "value"]).top1_ema_pct.agg(["mean", "std"])
    rows = []
    for (epochs, _), found in differences_within(table, "epochs", "small").iterrows():
        row = {"epochs": epochs}
        for name in ("small", "full"):
            row[f"{name}, top-1 (%)"] = mean_std(summary.loc[epochs, name])
        row |= {"full - small [95 % interval]": interval(found), "verdict on full": found.verdict}
        rows.append({**row, "n": found.n})
    return pd.DataFrame(rows)
