"""What studies found: means over seeds, differences with their intervals, accuracy and cost."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.typing import DataFrameGroupBy
from scipy import stats

from backbones.layers import LAST_NORM
from utils.studies.definitions import GROUPS, STUDIES
from utils.studies.runner import Study, curves_path, finished

RESULTS = Path(__file__).resolve().parents[2] / "results"


def read_study(name: str, results: Path = RESULTS) -> pd.DataFrame:
    """The record of a study, one row per run and test size, without failed runs."""
    return finished(pd.read_csv(results / f"study_{name}.csv"))


def read_group(factor: str, results: Path = RESULTS) -> tuple[Study, pd.DataFrame]:
    """A comparison among the networks of the study `networks`, as a study of its own."""
    study, values, table = STUDIES["networks"], GROUPS[factor], read_study("networks", results)
    variants = tuple(variant for variant in study.variants if variant.value in values)
    study = replace(study, factor=factor, baseline=values[0], variants=variants)
    return study, table[table.value.isin(values)]


def at_own_size(table: pd.DataFrame) -> pd.DataFrame:
    """One row per finished run, at the test size of its recipe, which comes first."""
    return finished(table).drop_duplicates(["value", "seed"])


def summarize(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of each value, and what it costs.

    Args:
        table: the record of one study; each run counts once, at the test size of its recipe.
        column: column of the accuracy, such as `Study.top1_column`.

    Returns:
        Indexed by value, in the order of the table: `mean`, `std`, `n`, `parameters`, `gmacs` of
        one image at the test size, and `minutes`, the median time of a run.
    """
    groups = at_own_size(table).groupby("value", sort=False)
    accuracy = groups[column].agg(["mean", "std", "count"]).rename(columns={"count": "n"})
    costs = groups[["parameters", "gmacs"]].first()
    return accuracy.join(costs).assign(minutes=groups.time_s.median() / 60)


def compare(table: pd.DataFrame, baseline: str, column: str) -> pd.DataFrame:
    """Differences to the baseline with 95 % intervals, simultaneous for several values.

    Several are compared by Dunnett's test, which pools the variance over all of them and corrects
    for their number, a single one by Welch's, which does not pool. Seeds are not paired.

    Args:
        table: the rows of one study and one test size; failed runs are left out.
        baseline: the value that the others are compared with.

    Returns:
        Indexed by value: `difference`, `low` and `high` (of the interval), `n` (the smaller number
        of seeds), and `detectable`: the difference that the study would have found with a
        probability of 80 %, to a normal approximation. Without repeated seeds, or without the
        baseline, there are no intervals (NaN).
    """
    groups = {key: rows[column] for key, rows in finished(table).groupby("value", sort=False)}
    control = groups.pop(baseline, pd.Series(dtype=float))
    found = pd.DataFrame(index=pd.Index(groups, name="value"))
    found["difference"] = [values.mean() - control.mean() for values in groups.values()]
    found[["low", "high"]] = float("nan")
    found["n"] = [min(len(values), len(control)) for values in groups.values()]
    found["detectable"] = float("nan")
    runs = len(control) + sum(map(len, groups.values()))
    if len(control) and groups and runs > 1 + len(groups):
        if len(groups) > 1:
            result = stats.dunnett(*groups.values(), control=control, random_state=0)
        else:
            result = stats.ttest_ind(*groups.values(), control, equal_var=False)
        found["low"], found["high"] = result.confidence_interval(0.95)
        error = found.difference / result.statistic
        found["detectable"] = (found.high - found.low) / 2 + stats.norm.ppf(0.8) * error
    return found


def differences(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Differences of top-1 accuracy to the study's baseline, in points, as `compare` gives them.

    Each of the study's extra evaluations is a row, such as EMA weights or another test size. Its
    runs are those of the baseline, so its interval, which takes them as independent, is too wide.
    """
    column, parts = study.top1_column, [at_own_size(table)]
    for value, (weights, crop_px) in study.extra_evaluations.items():
        rows = table[(table.value == study.baseline) & (table.test_crop_px == crop_px)]
        parts.append(rows.assign(value=value, **{column: rows[f"top1_{weights}_pct"]}))
    return compare(pd.concat(parts), study.baseline, column)


def differences_within(table: pd.DataFrame, by: str, baseline: str, column: str) -> pd.DataFrame:
    """`compare` among the rows of each value of column `by`; indexed by both."""
    groups = {key: compare(group, baseline, column) for key, group in table.groupby(by)}
    return pd.concat(groups, names=[by])


def by_length(table: pd.DataFrame) -> pd.DataFrame:
    """The study of lengths with the recipe's name alone ("small", "full") as its value."""
    return table.assign(value=table.value.str.split(",").str[0])


def trick_effects(results: Path = RESULTS) -> dict[str, pd.DataFrame]:
    """Gain by each trick: "added" to the bare recipe, and "in full", over the full one without."""
    found = {}
    for title, name, prefix, sign in (
        ("added", "recipe_add_one", "with ", 1),
        ("in full", "recipe_leave_one_out", "without ", -1),  # what is lost without it is gained
    ):
        table = read_study(name, results)
        table[["top1_raw_pct", "top1_ema_pct"]] *= sign
        effects = differences(STUDIES[name], table)
        found[title] = effects.set_axis(effects.index.str.removeprefix(prefix))
    return found | {"in full": found["in full"].loc[found["added"].index]}


# ---- the noise between seeds ---------------------------------------------------------------------


def std_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Standard deviation of normal values and the ends of its 95 % interval (chi-squared)."""
    free = len(values) - 1
    std = values.std(ddof=1)
    return std, *(std * np.sqrt(free / stats.chi2.ppf((0.975, 0.025), free)))


def detectable(std: float, n: int) -> float:
    """The difference that Student's test of n and n seeds finds with about 80 % probability."""
    free = 2 * n - 2
    return float(std * np.sqrt(2 / n) * (stats.t.ppf(0.975, free) + stats.t.ppf(0.8, free)))


NOISE_TESTS = {3: "paired t", 5: "Welch", 6: "Dunnett, four values"}  # by seeds of each value


def false_alarms(first: np.ndarray, second: np.ndarray, draws: int = 10_000) -> dict[int, float]:
    """How often `NOISE_TESTS` at 5 % find a difference between runs of one function, by resampling.

    Both sides come from all runs together, and paired differences get random signs: a difference
    between the means of the two records does not count.

    Args:
        first, second: accuracies of the seeds of both, in the same order of seeds.
    """
    rng, together = np.random.default_rng(0), np.concatenate((first, second))

    def draw(values: np.ndarray, groups: int, n: int) -> np.ndarray:
        """`[draws, groups, n]`, each draw without replacement."""
        shuffled = rng.permuted(np.tile(values, (draws, 1)), axis=1)
        return shuffled[:, : groups * n].reshape(draws, groups, n)

    signed = draw(first - second, 1, 3)[:, 0] * rng.choice((-1, 1), (draws, 3))
    sides, four = draw(together, 2, 5), draw(together, 4, 6)
    # Dunnett's critical value depends on the numbers of values and seeds alone.
    errors = np.sqrt(four.var(2, ddof=1).mean(1) * 2 / 6)
    result = stats.dunnett(*four[0, 1:], control=four[0, 0], random_state=0)
    critical = np.ptp(result.confidence_interval(0.95), axis=0)[0] / 2 / errors[0]
    means = four.mean(2)
    found = {
        3: stats.ttest_1samp(signed, 0, axis=1).pvalue < 0.05,
        5: stats.ttest_ind(sides[:, 0], sides[:, 1], axis=1, equal_var=False).pvalue < 0.05,
        6: np.abs(means[:, 1:] - means[:, :1]).max(1) > critical * errors,
    }
    return {n: alarms.mean() for n, alarms in found.items()}


def noise_floor(results: Path = RESULTS) -> np.ndarray:
    """Top-1 (%) of two forms of one function, `[2, seeds]`."""
    table = read_study("noise_floor", results)
    return table.pivot_table("top1_raw_pct", "value", "seed").to_numpy()


# ---- tables to read ------------------------------------------------------------------------------


def interval(row: pd.Series) -> str:
    """A difference with its interval, such as "+1.2 [-0.3, +2.7]"."""
    return f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"


def mean_std(values: pd.Series) -> str:
    """Mean and standard deviation over seeds, such as "56.0 ± 1.0"."""
    return f"{values.mean():.1f} ± {values.std():.1f}"


def study_table(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Every value of a study: what it costs, accuracy, and difference to the baseline."""
    groups = at_own_size(table).groupby("value", sort=False)
    shown = _costs(groups)
    shown["top-1 (%)"] = groups[study.top1_column].agg(mean_std)
    return _table(shown, differences(study, table), groups.size(), study.factor)


def noise_floor_table(results: Path = RESULTS) -> pd.DataFrame:
    """What n seeds of each value can detect, and how often tests find a difference in noise."""
    runs, seeds = noise_floor(results), (3, 5, 6, 10, 25)
    std, rates = std_interval(runs.flatten())[0], false_alarms(*runs)
    columns = {
        "n": seeds,
        "detectable": [f"{detectable(std, n):.1f}" for n in seeds],
        "test": [NOISE_TESTS.get(n, "") for n in seeds],
        "false alarms (%)": [f"{100 * rates[n]:.1f}" if n in rates else "" for n in seeds],
    }
    return pd.DataFrame(columns)


def networks_table(results: Path = RESULTS) -> pd.DataFrame:
    """Every network under one recipe: costs, learning rate, accuracy, speed and epochs to it."""
    table = read_study("networks", results)
    groups, found = table.groupby("value", sort=False), summarize(table, "top1_raw_pct")
    shown = _costs(groups)
    shown["top-1 (%)"], shown["n"] = groups.top1_raw_pct.agg(mean_std), found.n
    shown["images/s"] = groups.images_per_s.median().round().astype(int)
    shown["minutes"] = found.minutes.map("{:.1f}".format)
    curves = pd.read_csv(curves_path(results / "study_networks_rates.csv"))
    runs = shown.index + shown["lr per 1024 images"].map(", {:g}".format)
    for top1_pct in (60, 70):
        first = curves[curves.held_out_top1_pct >= top1_pct].groupby("value").epoch.min()
        shown[f"epochs to {top1_pct} %"] = [str(first.get(run, "")) for run in runs]
    return shown.rename_axis("network").reset_index()


def networks_rates_table(results: Path = RESULTS) -> pd.DataFrame:
    """Top-1 on the held-out slice by network, a column per learning rate."""
    table = read_study("networks_rates", results)
    table["network"] = table.value.str.rsplit(", ", n=1).str[0]
    return _wide(table, "network", "lr_per_1024", "rate ")


def _costs(groups: DataFrameGroupBy) -> pd.DataFrame:
    costs = groups[["parameters", "gmacs", "lr_per_1024"]].first()
    return costs.set_axis(["parameters", "GMACs", "lr per 1024 images"], axis=1)


def _wide(table: pd.DataFrame, rows: str | list[str], by: str, prefix: str = "") -> pd.DataFrame:
    """Top-1 of the raw weights, a column per value of `by`; empty where there was no run."""
    means = table.pivot_table("top1_raw_pct", rows, by, sort=False).sort_index(axis=1)
    shown = means.map("{:.1f}".format).replace("nan", "").add_prefix(prefix)
    return shown.rename_axis(columns=None).reset_index()


def pairs_table(table: pd.DataFrame, by: str, column: str) -> pd.DataFrame:
    """The two values of a study and their difference, for each value of `by`."""
    baseline, other = table.value.unique()
    found = differences_within(table, by, baseline, column).droplevel("value")
    means = table.pivot_table(column, by, "value", mean_std)[[baseline, other]]
    return _table(means.add_suffix(", top-1 (%)"), found, found.n, by)


def detection_table(results: Path = RESULTS) -> pd.DataFrame:
    """Precision of detectors on an untrained and a trained backbone."""
    table = read_detection(results)
    groups = table.groupby("value", sort=False)
    means = groups[["map_pct", "map50_pct"]].agg(mean_std)
    means.columns = ["mAP (%)", "mAP at IoU 0.5 (%)"]
    found = compare(table, means.index[0], "map_pct")
    return _table(means, found, groups.size(), "backbone", "difference in mAP")


def _table(
    means: pd.DataFrame,
    found: pd.DataFrame,
    n: pd.Series,
    name: str | list[str],
    title: str = "difference",
) -> pd.DataFrame:
    """Means with what `compare` has found, which has no row for the baseline."""
    title = f"{title} [95 % interval]"
    detectable = found.detectable.map("{:.1f}".format)
    table = means.assign(**{title: found.apply(interval, axis=1), "n": n, "detectable": detectable})
    table = table.fillna({title: "baseline", "detectable": ""})
    return table.rename_axis(index=name, columns=None).reset_index()


def recipe_table(results: Path = RESULTS) -> pd.DataFrame:
    """Every trick with its gain over the bare recipe and in the full recipe."""
    titles = {"added": "added to the bare recipe", "in full": "in the full recipe"}
    columns = {}
    for name, found in trick_effects(results).items():
        columns[f"{titles[name]} [95 % interval]"] = found.apply(interval, axis=1)
        columns[f"n, {name}"] = found.n
        columns[f"detectable, {name}"] = found.detectable.map("{:.1f}".format)
    return pd.DataFrame(columns).rename_axis("trick").reset_index()


def length_table(results: Path = RESULTS) -> pd.DataFrame:
    """The full recipe compared with the small one at each length."""
    table = by_length(read_study("length", results))
    return pairs_table(table, "epochs", STUDIES["length"].top1_column)


def fixres_table(results: Path = RESULTS) -> pd.DataFrame:
    """Training at the smaller size compared with training at the larger one, per test size."""
    table = read_study("fixres", results).rename(columns={"test_crop_px": "test crop (px)"})
    return pairs_table(table, "test crop (px)", STUDIES["fixres"].top1_column)


def finetune_differences(results: Path = RESULTS) -> pd.DataFrame:
    """Differences between methods of fine-tuning, as `compare` gives them.

    Training from scratch is compared alone: its seeds vary ten times as much as those of the other
    methods, whose intervals a pooled variance would widen.
    """
    study, table = STUDIES["finetune"], read_study("finetune", results)
    scratch, baseline = table.value == "from scratch", table.value == study.baseline
    parts = (table[scratch | baseline], table[~scratch])
    return pd.concat([compare(part, study.baseline, study.top1_column) for part in parts])


def finetune_table(results: Path = RESULTS) -> pd.DataFrame:
    """Each method of fine-tuning: its learning rate, accuracy, difference and time."""
    study, table = STUDIES["finetune"], read_study("finetune", results)
    groups = table.groupby("value", sort=False)
    rates = {each.value: study.recipe_of(each).lr_per_1024 for each in study.variants}
    means = groups[study.top1_column].agg(mean_std).to_frame("top-1 (%)")
    means.insert(0, "lr per 1024 images", means.index.map(rates))
    shown = _table(means, finetune_differences(results), groups.size(), study.factor)
    return shown.assign(seconds=groups.time_s.median().round().astype(int).to_numpy())


def transfer_table(results: Path = RESULTS) -> pd.DataFrame:
    """The embedded sample's weights compared with random ones, for each share of the images."""
    table, share = read_study("transfer", results), "share of the images"
    table[["value", share, "rate"]] = table.value.str.split(", ", expand=True)
    return pairs_table(table, share, STUDIES["transfer"].top1_column)


LAST_NORM_VALUE = r"(?P<network>.*), last norm (?P<start>.*), (?P<rate>.*)"


def initialization_table(results: Path = RESULTS) -> pd.DataFrame:
    """Initial values of the last norm, each at its best rate; differences to the default."""
    column, table = STUDIES["initialization"].top1_column, read_study("initialization", results)
    parts = table.value.str.extract(LAST_NORM_VALUE).rename(columns={"start": "value"})
    table = table.assign(**parts)
    found = differences_within(table, "network", str(LAST_NORM), column)
    groups = table.groupby(["network", "value"])
    means = groups[column].agg(mean_std).to_frame("top-1 (%)")
    means.insert(0, "lr per 1024 images", groups.rate.first())
    return _table(means, found, groups.size(), ["network", "last norm"])


def initialization_rates_table(results: Path = RESULTS) -> pd.DataFrame:
    """Top-1 on the held-out slice by network and last norm, a column per learning rate."""
    table = read_study("initialization_rates", results)
    parts = table.value.str.extract(LAST_NORM_VALUE).astype({"start": float, "rate": float})
    table = table.assign(**parts).rename(columns={"start": "last norm"})
    names = ["network", "last norm"]
    return _wide(table.sort_values(names), names, "rate", "rate ")


def short_recipe_table(results: Path = RESULTS) -> pd.DataFrame:
    """Top-1 on the held-out slice by change or network, a column per recipe that is changed."""
    table, bases = read_study("short_recipe", results), ["SGD", "SGD, flat 0.7", "AdamW", "Muon"]
    table["base"] = table.value.str.extract(f"({'|'.join(reversed(bases))})")  # the longer first
    pairs = zip(table.value, table.base, strict=True)
    table["change"] = [value.replace(base, "").strip(", ") or "none" for value, base in pairs]
    return _wide(table, "change", "base")[["change", *bases]]


def imagenette_table(results: Path = RESULTS) -> pd.DataFrame:
    """Runs at the settings of Imagenette's leaderboard, a row per run, and their mean."""
    table, columns = read_study("imagenette_5", results), ["top1_ema_pct", "top1_raw_pct"]
    rows = [
        [f"seed {row.seed}", f"{row.top1_ema_pct:.2f}", f"{row.top1_raw_pct:.2f}", row.time_s // 60]
        for row in table.itertuples()
    ]
    rows.append(["all", *(mean_std(table[name]) for name in columns), ""])
    return pd.DataFrame(rows, columns=["run", "EMA top-1 (%)", "raw top-1 (%)", "minutes"])


def read_detection(results: Path = RESULTS) -> pd.DataFrame:
    """The record of scripts/detect.py on the embedded sample's scenes."""
    return pd.read_csv(results / "detection_sample.csv")
