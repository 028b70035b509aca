"""Statistics against Student's test, Dunnett's table and sums by hand, on records made up here."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from utils.recipe import RECIPES
from utils.studies import statistics
from utils.studies.runner import Study, Variant

TOP1 = {"bare": [50.0, 52.0, 51.0], "with x": [55.0, 56.0, 57.0], "with y": [50.5, 51.0, 51.2]}
VARIANTS = tuple(Variant(value, f"net {value}") for value in TOP1)
STUDY = Study("made_up", "recipe", "bare", RECIPES["quick"], VARIANTS, (0, 1, 2), weights="raw")


def record(top1=TOP1, **columns):
    """A row per value and seed, as a study writes it; EMA weights are 2, 2, 5, 0, ... ahead."""
    rows = [
        {
            "status": "done", "value": value, "seed": seed, "network": f"net {value}",
            "test_crop_px": 64, "top1_raw_pct": top1_pct,
            "top1_ema_pct": top1_pct + (2, 2, 5, *[0] * 22)[seed],
            "parameters": 10, "gmacs": 0.0125, "lr_per_1024": 0.5, "time_s": 60 + 60 * seed,
        }
        for value, values in top1.items()
        for seed, top1_pct in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def first_words(column):
    return column.str.split().str[0].tolist()


def test_one_difference_is_that_of_welchs_test():
    """By its formulas (Welch 1947): variances of 0.5 and 10 over five seeds each."""
    values = {"base": [50, 51, 51, 51, 52], "other": [51, 53, 55, 57, 59]}
    found = statistics.compare(record(values), "base", "top1_raw_pct").loc["other"]
    error = math.sqrt((0.5 + 10) / 5)
    free = 4 * (0.5 + 10) ** 2 / (0.5**2 + 10**2)
    half = stats.t.ppf(0.975, free) * error
    assert (found.difference, found.n) == (pytest.approx(4), 5)
    assert (found.low, found.high) == pytest.approx((4 - half, 4 + half))
    assert found.detectable == pytest.approx(half + 0.8416 * error, abs=1e-3)


def test_the_table_of_fine_tuning_pools_no_variance_with_training_from_scratch(tmp_path):
    top1 = {"frozen features": [90, 91, 92], "all layers": [88, 89, 90]}
    top1["discriminative rates"] = [90, 90, 92]
    found = []
    for scratch in ([50, 51, 52], [30, 51, 72]):
        table = record({"from scratch": scratch, **top1})
        table.to_csv(tmp_path / "study_finetune.csv")
        shown = statistics.finetune_table(tmp_path).set_index("fine-tuning")
        found.append(shown["difference [95 % interval]"])
    assert found[0].drop("from scratch").equals(found[1].drop("from scratch"))
    assert first_words(found[0]) == ["-40.0", "baseline", "-2.0", "-0.3"]


def test_several_differences_have_the_width_of_dunnetts_table():
    """2.86 standard errors for two values and six degrees of freedom (Dunnett 1964, table 2)."""
    found = statistics.compare(record(), "bare", "top1_raw_pct")
    assert list(found.index) == ["with x", "with y"]
    variance = sum(pd.Series(values).var() for values in TOP1.values()) / 3
    half = 2.86 * math.sqrt(variance * 2 / 3)
    assert (found.high - found.low).tolist() == pytest.approx([2 * half] * 2, abs=0.02)
    assert found.difference.tolist() == pytest.approx([5, -0.1])


def test_the_noise_floor_of_normal_noise():
    """The interval and the power by simulation; every test raises false alarms at its level."""
    rng = np.random.default_rng(1)
    samples = rng.normal(60, 2, (4000, 25))
    low, high = np.array([statistics.std_interval(sample)[1:] for sample in samples]).T
    assert ((low < 2) & (high > 2)).mean() == pytest.approx(0.95, abs=0.015)
    for n in (3, 5, 25):
        shifted = samples[:2000, :n] + statistics.detectable(2, n)
        power = stats.ttest_ind(shifted, samples[2000:, :n], axis=1).pvalue < 0.05
        assert power.mean() == pytest.approx(0.8, abs=0.03)
    records = rng.normal(60, 2, (20, 2, 25))
    rates = [list(statistics.false_alarms(*sides, draws=400).values()) for sides in records]
    assert np.mean(rates, 0) == pytest.approx([0.05] * 3, abs=0.025)
    apart = statistics.false_alarms(records[0, 0], records[0, 1] + 100)
    assert apart[3] < 0.3  # signs are random


def test_the_table_of_the_noise_floor(tmp_path):
    """Two forms with a standard deviation of 2 together."""
    top1_pct = 60 + 2 * stats.zscore(np.random.default_rng(0).normal(size=50), ddof=1)
    record({"separate": top1_pct[:25], "slice": top1_pct[25:]}).to_csv(
        tmp_path / "study_noise_floor.csv"
    )
    table = statistics.noise_floor_table(tmp_path).set_index("n")
    assert table.detectable[5] == "4.0"  # 2 sqrt(2 / 5) times the t quantiles 2.31 and 0.89
    assert table.test[6] == "Dunnett, four values"
    assert (table["false alarms (%)"][[3, 5, 6]].astype(float) < 15).all()


def test_failed_runs_are_left_out_and_single_seeds_have_no_interval():
    table = record({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.0, 1.0], "c": [5.0]})
    failed = table[:1].assign(status="failed: no memory", seed=4, parameters=None)
    table = pd.concat([table, failed])
    found = statistics.compare(table, "a", "top1_raw_pct")
    assert found.n.to_dict() == {"b": 3, "c": 1}
    summary = statistics.summarize(table, "top1_raw_pct")
    assert list(summary.index) == ["a", "b", "c"]
    columns = ["mean", "std", "n", "parameters", "minutes"]
    assert summary.loc["a", columns].tolist() == [2, 1, 3, 10, 2]
    first = statistics.compare(table[table.seed == 0], "a", "top1_raw_pct")
    assert first.difference.to_dict() == {"b": 0, "c": 4}
    without = statistics.compare(table[table.value != "a"], "a", "top1_raw_pct")
    assert first[["low", "high"]].isna().all(axis=None)
    assert without[["difference", "low", "high"]].isna().all(axis=None)


def test_differences_are_those_of_the_studys_weights_and_test_size():
    """Extra evaluations are of the baseline's own runs: EMA, 2, 2 and 5 ahead, and 96 px, 1."""
    larger = record({value: [top1 + 1 for top1 in TOP1[value]] for value in TOP1}, test_crop_px=96)
    table = pd.concat([record(), larger])
    assert list(statistics.differences(STUDY, table).index) == ["with x", "with y"]
    extra = {"with EMA": ("ema", 64), "with 96": ("raw", 96)}
    found = statistics.differences(dataclasses.replace(STUDY, extra_evaluations=extra), table)
    assert found.difference.to_dict() == pytest.approx(
        {"with x": 5, "with y": -0.1, "with EMA": 3, "with 96": 1}
    )
    ema = dataclasses.replace(STUDY, weights="ema", extra_evaluations={"raw": ("raw", 64)})
    assert statistics.differences(ema, table).difference["raw"] == pytest.approx(-3)


def test_the_table_of_a_study():
    table = statistics.study_table(STUDY, record()).set_index("recipe")
    assert table["top-1 (%)"]["with x"] == "56.0 ± 1.0"
    assert table["difference [95 % interval]"]["with x"] == "+5.0 [+3.0, +7.0]"
    costs = ["parameters", "GMACs", "lr per 1024 images"]
    assert table.loc["with x", costs].tolist() == [10, 0.0125, 0.5]
    shown = ["difference [95 % interval]", "detectable"]
    assert table.loc["bare", shown].tolist() == ["baseline", ""]


def test_the_tables_of_networks(tmp_path):
    """Epochs are those of the best rate's run on the held-out slice; groups keep their networks."""
    networks = {"CSPDarknet-53": [70, 72, 71], "Darknet-53": [60, 61, 62]}
    record(networks, images_per_s=99.6).to_csv(tmp_path / "study_networks.csv")
    rates = {"CSPDarknet-53, 0.5": [72], "Darknet-53, 0.1": [80.0], "Darknet-53, 0.5": [79.0]}
    tuning = record(rates, lr_per_1024=[0.5, 0.1, 0.5])
    tuning.to_csv(tmp_path / "study_networks_rates.csv")
    curves = {"value": [*rates][1:] * 2, "epoch": [1, 1, 2, 2]}
    curves = pd.DataFrame(curves | {"held_out_top1_pct": [75, 50, 80, 65]})
    curves.to_csv(tmp_path / "study_networks_rates_curves.csv")

    table = statistics.networks_table(tmp_path).set_index("network")
    assert table.loc["Darknet-53", ["images/s", "minutes"]].tolist() == [100, "2.0"]
    assert table["epochs to 60 %"].tolist() == ["", "2"]
    assert (table["epochs to 70 %"] == "").all()
    table = statistics.networks_rates_table(tmp_path)
    assert list(table) == ["network", "rate 0.1", "rate 0.5"]
    assert table.values.tolist() == [["CSPDarknet-53", "", "72.0"], ["Darknet-53", "80.0", "79.0"]]

    study, table = statistics.read_group("CSP split", tmp_path)
    assert (study.factor, study.baseline) == ("CSP split", "CSPDarknet-53")
    assert statistics.differences(study, table).difference.to_dict() == {"Darknet-53": -10}


def test_the_table_of_the_recipe(tmp_path):
    """Both studies of the recipe, signs turned so that above zero means that the trick helps."""
    add = record({"bare": [50, 52, 51], "with CutMix": [45, 46, 46]})
    add = pd.concat([add, record({"bare": [52, 54, 53.5]}, test_crop_px=96)])
    leave = record({"full": [60, 61, 63], "without CutMix": [70.0, 72, 73]}, test_crop_px=96)
    leave = pd.concat([leave, record({"full": [60, 60, 60]}, test_crop_px=64)])
    add.to_csv(tmp_path / "study_recipe_add_one.csv")
    leave.to_csv(tmp_path / "study_recipe_leave_one_out.csv")
    effects = statistics.trick_effects(tmp_path)["in full"].loc["CutMix"]
    assert effects.difference == pytest.approx((62 + 63 + 68 - 72 - 74 - 78) / 3)
    table = statistics.recipe_table(tmp_path).set_index("trick")
    assert list(table.index) == ["CutMix", "EMA", "FixRes"]
    added = first_words(table["added to the bare recipe [95 % interval]"])
    assert added == ["-5.3", "+3.0", "+2.2"]
    assert first_words(table["in the full recipe [95 % interval]"]) == ["-10.3", "+3.0", "+1.3"]


def test_the_tables_of_lengths_and_of_test_sizes(tmp_path):
    short = record({"small, 4 epochs": [30, 31, 32], "full, 4 epochs": [20, 21, 24.5]}, epochs=4)
    long = record({"small, 8 epochs": [40, 41, 42], "full, 8 epochs": [41] * 3}, epochs=8)
    length = pd.concat([short, long])
    length.to_csv(tmp_path / "study_length.csv")
    table = statistics.length_table(tmp_path).set_index("epochs")
    assert table["small, top-1 (%)"][4] == "34.0 ± 2.6"  # 32, 33 and 37 with EMA
    assert first_words(table["difference [95 % interval]"]) == ["-9.2", "+0.0"]

    larger = {"trained at 96 px": [60, 61, 62], "trained at 64 px": [59, 58, 60]}
    smaller = {"trained at 96 px": [60, 61, 62], "trained at 64 px": [64, 66, 65]}
    parts = [record(larger, test_crop_px=96), record(smaller, test_crop_px=64)]
    pd.concat(parts).to_csv(tmp_path / "study_fixres.csv")
    table = statistics.fixres_table(tmp_path).set_index("test crop (px)")
    assert table["trained at 64 px, top-1 (%)"][96] == "62.0 ± 2.6"  # 61, 60 and 65 with EMA
    assert first_words(table["difference [95 % interval]"]) == ["+4.0", "-2.0"]


def test_the_table_of_detectors(tmp_path):
    """Of 21 and 33 points."""
    rows = [("from scratch", 0, 20.0), ("trained", 0, 30.0), ("from scratch", 1, 22.0)]
    table = pd.DataFrame([*rows, ("trained", 1, 36.0)], columns=["value", "seed", "map_pct"])
    table = table.assign(status="done", map50_pct=2 * table.map_pct)
    table.to_csv(tmp_path / "detection_sample.csv")
    first, second = statistics.detection_table(tmp_path).values.tolist()
    assert first == ["from scratch", "21.0 ± 1.4", "42.0 ± 2.8", "baseline", 2, ""]
    assert second[3].split()[0] == "+12.0"
    assert second[4] == 2
