"""What studies found: means over seeds, differences with their intervals, accuracy beside cost."""

from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from utils.studies.definitions import STUDIES
from utils.studies.runner import Study

RESULTS = Path(__file__).resolve().parents[1] / "results"


# ---- accuracy ------------------------------------------------------------------------------------


def read_study(name: str, results: Path = RESULTS) -> pd.DataFrame:
    """The record of a study, one row per run and test size; runs that failed are left out."""
    return finished(pd.read_csv(results / f"study_{name}.csv"))


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that did not fail. Integers are such again, which failed rows undo."""
    done = table[table.status == "done"]
    whole = ["epochs", "train_crop_px", "test_crop_px", "val_images", "parameters", "threads"]
    return done.astype(dict.fromkeys(done.columns.intersection(whole), int))


def at_own_size(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: that of the test size of its recipe, which comes first."""
    return finished(table).drop_duplicates(["value", "seed"])


def summarize(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of each value, and what its network costs.

    Args:
        table: of one study; each run counts once, at the test size of its recipe.
        column: of the accuracy, such as `Study.top1_column`.

    Returns:
        Indexed by value, in the order of the table: `mean`, `std`, `n`, `parameters`, `gmacs`.
    """
    groups = at_own_size(table).groupby("value", sort=False)
    summary = groups[column].agg(["mean", "std", "count"]).rename(columns={"count": "n"})
    return summary.join(groups[["parameters", "gmacs"]].first())


def compare(table: pd.DataFrame, baseline: str, column: str) -> pd.DataFrame:
    """Differences to the baseline, paired over seeds, with Student's 95 % interval.

    Args:
        table: of one study and one test size; runs that failed are left out.
        baseline: the value that others are compared with.

    Returns:
        Indexed by value: `difference`, `low` and `high` (of the interval), `n` (pairs), `verdict`:
        "higher", "lower", "no difference seen" where the interval holds zero, or "too few seeds".
    """
    done = finished(table)
    by_seed = done.pivot(index="seed", columns="value", values=column)
    over_baseline = by_seed.sub(by_seed.get(baseline, float("nan")), axis=0)
    order = [value for value in done.value.unique() if value != baseline]
    found = over_baseline[order].agg(["mean", "sem", "count"]).T
    half = found["sem"] * stats.t.ppf(0.975, found["count"] - 1)
    columns = {
        "difference": found["mean"],
        "low": found["mean"] - half,
        "high": found["mean"] + half,
    }
    found = pd.DataFrame({**columns, "n": found["count"].astype(int)})
    return found.assign(verdict=[_verdict(row) for row in found.itertuples()])


def _verdict(row: Any) -> str:
    if row.n < 2:
        return "too few seeds"
    return "higher" if row.low > 0 else "lower" if row.high < 0 else "no difference seen"


def differences(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Differences of top-1 accuracy to the study's baseline, in points, as `compare` gives them.

    The study's extra_evaluations are rows of their own: what averaged weights, or another test size, make of
    the same runs of the baseline.
    """
    rows, column = at_own_size(table), study.top1_column
    parts = [rows]
    for value, (weights, crop_px) in study.extra_evaluations.items():
        read = table[(table.value == study.baseline) & (table.test_crop_px == crop_px)]
        parts.append(read.assign(value=value, **{column: read[f"top1_{weights}_pct"]}))
    return compare(pd.concat(parts), study.baseline, column)


def differences_within(table: pd.DataFrame, by: str, baseline: str, column: str) -> pd.DataFrame:
    """`compare` among the rows of each value of column `by`; indexed by both."""
    groups = {key: compare(group, baseline, column) for key, group in table.groupby(by)}
    return pd.concat(groups, names=[by])


def by_length(table: pd.DataFrame) -> pd.DataFrame:
    """The study of lengths with the recipe's name alone ("small", "full") as its value."""
    return table.assign(value=table.value.str.split(",").str[0])


def gains(table: pd.DataFrame, by: str, baseline: str, other: str, column: str) -> pd.DataFrame:
    """What `other` has over `baseline`, as a study of `by`, so that `compare` tells if it grows.

    Returns:
        A row per value of `by`, which is the new `value`, and seed; the difference is `gain`.
    """
    pairs = table.pivot(index=[by, "seed"], columns="value", values=column)
    gain = (pairs[other] - pairs[baseline]).rename("gain").reset_index()
    return gain.assign(value=gain[by], status="done")


def negated(found: pd.DataFrame) -> pd.DataFrame:
    """Differences the other way round: what the baseline has over each value."""
    turned = {"higher": "lower", "lower": "higher"}
    return found.assign(
        difference=-found.difference,
        low=-found.high,
        high=-found.low,
        verdict=found.verdict.replace(turned),
    )


def trick_effects(results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """What every trick brings: "added" to the bare recipe, and "in full", where it was left out."""
    found = {
        name: differences(STUDIES[name], read_study(name, results))
        for name in ("recipe_add_one", "recipe_leave_one_out")
    }
    added = found["recipe_add_one"].rename(lambda value: value.removeprefix("with "))
    left_out = found["recipe_leave_one_out"].rename(lambda value: value.removeprefix("without "))
    return {"added": added, "in full": negated(left_out).loc[added.index]}


# ---- cost ----------------------------------------------------------------------------------------


def read_costs(crop_px: int, results: Path = RESULTS) -> pd.DataFrame:
    """The record of scripts/benchmark.py --task networks at a size.

    Raises:
        ValueError: there is none, or there are those of several machines.
    """
    paths = sorted(results.glob(f"networks_{crop_px}px_*.csv"))
    if len(paths) != 1:
        names = [path.name for path in paths]
        raise ValueError(f"{results}: needs one networks_{crop_px}px_<machine>.csv, has {names}")
    return pd.read_csv(paths[0])


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


def ratio_table(study: Study, costs: pd.DataFrame) -> pd.DataFrame:
    """`cost_ratios` of each value of a study to its baseline, a block of columns per quantity."""
    names = {variant.network: variant.value for variant in study.variants}
    baseline = next(
        variant.network for variant in study.variants if variant.value == study.baseline
    )
    quantities = ("latency", "inference", "training", "inference peak", "training peak")
    blocks = {each: cost_ratios(costs, each, baseline).loc[list(names)] for each in quantities}
    return pd.concat(blocks, axis=1).rename(names).rename_axis(study.factor)


def with_costs(study: Study, table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """`summarize` of a study, with the medians of what its networks cost."""
    summary = summarize(table, study.top1_column)
    networks = at_own_size(table).groupby("value").network.first().loc[summary.index]
    return summary.join(cost_table(costs).loc[networks].set_axis(summary.index))


# ---- README's tables -----------------------------------------------------------------------------


def interval(row: pd.Series) -> str:
    """A difference with its interval, such as "+1.2 [-0.3, +2.7]"."""
    return f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"


def sentences(found: pd.DataFrame, baseline: str) -> list[str]:
    """A line per difference: what was compared, the interval, the seeds, the verdict."""
    names = found.index.map(lambda key: ", ".join(map(str, key)) if isinstance(key, tuple) else key)
    return [
        f"{name} against {baseline}: {interval(row)} points, n = {row.n}: {row.verdict}"
        for name, (_, row) in zip(names, found.iterrows(), strict=True)
    ]


def mean_std(row: pd.Series) -> str:
    """A mean with its standard deviation over seeds."""
    return f"{row['mean']:.1f} ± {row['std']:.1f}"


def study_table(study: Study, table: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
    """Every value of a study: accuracy, difference to the baseline, verdict and times.

    Args:
        costs: a record of `read_costs` at full width. Times are those of a round over the
            baseline's of the same round: the median, and from least to most.
    """
    summary, ratios = summarize(table, study.top1_column), ratio_table(study, costs)
    found = differences(study, table).reindex(summary.index)
    found["text"] = found.dropna().apply(interval, axis=1)
    columns = {
        "top-1 (%)": summary.apply(mean_std, axis=1),
        "difference [95 % interval]": found.text.fillna("baseline"),
        "verdict": found.verdict.fillna(""),
        "n": summary.n,
    }
    for quantity in ("inference", "training"):
        spreads = ratios[quantity].loc[summary.index].apply(_spread, axis=1)
        spreads = spreads.where(spreads.index != study.baseline, "1")
        columns[f"{quantity} time over the baseline's"] = spreads
    return pd.DataFrame(columns).rename_axis(study.factor).reset_index()


def _spread(ratio: pd.Series) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def recipe_table(results: Path = RESULTS) -> pd.DataFrame:
    """Every trick with what it brings to the bare and to the full recipe."""
    effects = trick_effects(results)
    titles = {"added": "added to the bare recipe", "in full": "in the full recipe"}
    columns = {}
    for name, title in titles.items():
        columns[f"{title} [95 % interval]"] = effects[name].apply(interval, axis=1)
        columns[f"n, {name}"] = effects[name].n
        columns[f"verdict, {name}"] = effects[name].verdict
    return pd.DataFrame(columns).rename_axis("trick").reset_index()


def length_table(results: Path = RESULTS) -> pd.DataFrame:
    """The full recipe against the small one at each length."""
    table = by_length(read_study("length", results))
    return pairs_table(table, "epochs", "small", "full", STUDIES["length"].top1_column)


def fixres_table(results: Path = RESULTS) -> pd.DataFrame:
    """Training at the smaller size against training at the larger one, at each test size."""
    study = STUDIES["fixres"]
    (smaller,) = (variant.value for variant in study.variants if variant.value != study.baseline)
    table = read_study("fixres", results)
    found = pairs_table(table, "test_crop_px", study.baseline, smaller, study.top1_column)
    return found.rename(columns={"test_crop_px": "test crop (px)"})


def source_table(results: Path = RESULTS) -> pd.DataFrame:
    """Training from shards against training from the class folders that they were packed from."""
    table = finished(pd.read_csv(results / "shards_imagenette.csv"))
    return pairs_table(table, "epochs", "folders", "shards", "top1_ema_pct")


def input_table(results: Path = RESULTS) -> pd.DataFrame:
    """The input of `utils.data.transforms` against an earlier one, by the size that was trained at."""
    table = finished(pd.read_csv(results / "input_imagenette.csv"))
    before, now = table.value.unique()
    found = pairs_table(table, "train_crop_px", before, now, "top1_ema_pct")
    return found.rename(columns={"train_crop_px": "training crop (px)"})


def read_detection(results: Path = RESULTS) -> pd.DataFrame:
    """The record of scripts/detect.py on the embedded sample's scenes."""
    return pd.read_csv(results / "detection_sample.csv")


def detection_table(table: pd.DataFrame) -> pd.DataFrame:
    """What a detector gains from a trained backbone: precision, paired by seed, and verdict."""
    baseline = table.value.iloc[0]
    groups = table.groupby("value", sort=False)
    found = compare(table, baseline, "map_pct").reindex(groups.groups)
    found["text"] = found.dropna().apply(interval, axis=1)
    columns = {
        name: groups[column].agg(["mean", "std"]).apply(mean_std, axis=1)
        for name, column in (("mAP (%)", "map_pct"), ("mAP at IoU 0.5 (%)", "map50_pct"))
    }
    columns["difference in mAP [95 % interval]"] = found.text.fillna("baseline")
    columns |= {"verdict": found.verdict.fillna(""), "n": groups.seed.nunique()}
    return (
        pd.DataFrame(columns).loc[list(table.value.unique())].rename_axis("backbone").reset_index()
    )


def pairs_table(
    table: pd.DataFrame, by: str, baseline: str, other: str, column: str
) -> pd.DataFrame:
    """Two values of a study beside each other, and their difference, for each value of `by`."""
    summary = table.groupby([by, "value"])[column].agg(["mean", "std"])
    rows = []
    for (key, _), found in differences_within(table, by, baseline, column).iterrows():
        row = {by: key}
        for name in (baseline, other):
            row[f"{name}, top-1 (%)"] = mean_std(summary.loc[(key, name)])
        row["difference [95 % interval]"] = interval(found)
        rows.append({**row, "verdict": found.verdict, "n": found.n})
    return pd.DataFrame(rows)
