"""Findings against paired tests by SciPy and against sums by hand, on records made up here."""

import dataclasses

import pandas as pd
import pytest
from scipy import stats

from utils.recipe import RECIPES
from utils.studies import statistics
from utils.studies.runner import Study, Variant

TOP1 = {"bare": [50.0, 52.0, 51.0], "with x": [55.0, 56.0, 57.0], "with y": [50.5, 51.0, 51.2]}
ARMS = tuple(Variant(value, f"net {value}") for value in TOP1)
STUDY = Study("made_up", "recipe", "bare", RECIPES["quick"], ARMS, (0, 1, 2), weights="raw")


def record(top1=TOP1, **columns):
    """A row per value and seed, as a study writes it; averaged weights are 2, 2, 5, 0, 0 ahead."""
    rows = [
        {
            "status": "done", "value": value, "seed": seed, "network": f"net {value}",
            "test_crop_px": 64, "top1_raw_pct": top1_pct,
            "top1_ema_pct": top1_pct + (2, 2, 5, 0, 0)[seed],
            "parameters": 10, "gmacs": 1.0, "images_per_s": 5.0, "time_s": 60,
        }
        for value, values in top1.items()
        for seed, top1_pct in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def costs():
    values = {"net bare": (10.0, 20.0), "net with x": (5.0, 30.0), "net with y": (10.0, 12.0)}
    rows = [
        (name, "training", "ms/image", k, value)
        for name, both in values.items()
        for k, value in enumerate(both)
    ]
    columns = ["network", "quantity", "unit", "round", "value"]
    training = pd.DataFrame(rows, columns=columns)
    quantities = ("latency", "inference", "training", "inference peak", "training peak")
    whole = pd.concat([training.assign(quantity=quantity) for quantity in quantities])
    return whole.assign(width=1.0, crop_px=224)


def test_differences_are_those_of_the_studys_weights_and_test_size():
    other_size = record({value: [0.0] * 3 for value in TOP1}, test_crop_px=96)
    found = statistics.differences(STUDY, pd.concat([record(), other_size]))
    test = stats.ttest_rel(TOP1["with x"], TOP1["bare"]).confidence_interval(0.95)
    row = found.loc["with x"]
    assert row.difference == pytest.approx(5)
    assert (row.low, row.high) == pytest.approx((test.low, test.high))
    assert row.verdict == "higher"
    assert found.verdict["with y"] == "no difference seen"


def test_readings_compare_the_baselines_runs_with_themselves():
    """Averaged weights, 2, 2 and 5 points ahead, and a larger test size, 1 point ahead."""
    larger = record({value: [top1 + 1 for top1 in TOP1[value]] for value in TOP1}, test_crop_px=96)
    table = pd.concat([record(), larger])
    study = dataclasses.replace(
        STUDY, extra_evaluations={"with EMA": ("ema", 64), "with 96": ("raw", 96)}
    )
    found = statistics.differences(study, table)
    expected = stats.ttest_1samp([2, 2, 5], 0).confidence_interval(0.95)
    row = found.loc["with EMA"]
    assert row.difference == pytest.approx(3)
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
    assert found.loc["with 96", ["difference", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    averaged = dataclasses.replace(
        STUDY, weights="ema", extra_evaluations={"without EMA": ("raw", 64)}
    )
    assert statistics.differences(averaged, table).difference["without EMA"] == pytest.approx(-3)
    assert list(statistics.differences(STUDY, table).index) == ["with x", "with y"]


def test_leaving_out_is_the_other_way_round():
    found = statistics.differences(STUDY, record())
    turned = statistics.negated(found)
    assert turned.verdict["with x"] == "lower"
    assert turned.verdict["with y"] == "no difference seen"
    row, other = found.loc["with x"], turned.loc["with x"]
    assert (other.low, other.difference, other.high) == (-row.high, -row.difference, -row.low)


def test_differences_within_groups():
    four = record({"small, 4 epochs": [1, 2, 3], "full, 4 epochs": [0, 1, 2.1]}, epochs=4)
    eight = record({"small, 8 epochs": [1, 2, 3], "full, 8 epochs": [5, 6, 7.5]}, epochs=8)
    length = statistics.by_length(pd.concat([four, eight]))
    found = statistics.differences_within(length, "epochs", "small", "top1_raw_pct")
    assert list(found.index) == [(4, "full"), (8, "full")]
    assert found.difference.tolist() == pytest.approx([-2.9 / 3, 12.5 / 3])
    assert found.verdict.tolist() == ["lower", "higher"]


def test_cost_ratios_are_taken_within_rounds():
    found = statistics.cost_ratios(costs(), "training", "net bare").loc["net with x"]
    assert found.to_dict() == {"median": 1.0, "min": 0.5, "max": 1.5}
    assert statistics.cost_table(costs())["training (ms/image)"].tolist() == [15.0, 17.5, 11.0]


def test_study_table_puts_the_interval_beside_the_verdict():
    table = statistics.study_table(STUDY, record(), costs()).set_index("recipe")
    assert table["top-1 (%)"]["with x"] == "56.0 ± 1.0"
    assert table["difference [95 % interval]"]["with x"] == "+5.0 [+2.5, +7.5]"
    assert table["training time over the baseline's"]["with x"] == "1.00 (0.50 to 1.50)"
    assert table.loc["bare", ["difference [95 % interval]", "verdict"]].tolist() == ["baseline", ""]
    sentence = statistics.sentences(statistics.differences(STUDY, record()), "bare")[0]
    assert sentence == "with x against bare: +5.0 [+2.5, +7.5] points, n = 3: higher"


def test_tables_of_the_recipe_and_of_lengths(tmp_path):
    """Both studies of the recipe on one page, signs turned so that above zero means it helps."""
    add = record({"bare": [50, 52, 51], "with CutMix": [45, 46, 46]})
    add = pd.concat([add, record({"bare": [52, 54, 53.5]}, test_crop_px=96)])
    leave = record({"full": [60, 61, 63], "without CutMix": [70.0, 72, 73]}, test_crop_px=96)
    leave = pd.concat([leave, record({"full": [60, 60, 60]}, test_crop_px=64)])
    add.to_csv(tmp_path / "study_recipe_add_one.csv")
    leave.to_csv(tmp_path / "study_recipe_leave_one_out.csv")
    table = statistics.recipe_table(tmp_path).set_index("trick")
    assert list(table.index) == ["CutMix", "EMA", "FixRes"]
    intervals = table.filter(like="95 %").map(lambda text: text.split()[0])
    assert intervals.loc["CutMix"].tolist() == ["-5.3", "-10.3"]
    assert intervals.loc["EMA"].tolist() == ["+3.0", "+3.0"]
    assert table.filter(like="verdict").loc["CutMix"].tolist() == ["lower", "lower"]
    assert intervals.loc["FixRes"].tolist() == ["+2.2", "+1.3"]
    assert table.filter(like="n, ").eq(3).all(axis=None)
    lengths = record(
        {
            f"{name}, {epochs} epochs": [start, start + 1, start + 2.5 * (name == "full")]
            for epochs, small, full in ((4, 30, 20), (8, 40, 41))
            for name, start in (("small", small), ("full", full))
        }
    )
    lengths["epochs"] = lengths.value.str.extract(r"(\d+) epochs").astype(int)
    lengths.to_csv(tmp_path / "study_length.csv")
    table = statistics.length_table(tmp_path).set_index("epochs")
    assert table["small, top-1 (%)"][4] == "33.3 ± 1.5"  # 32, 33 and 35 of averaged weights
    assert table["difference [95 % interval]"].str.split().str[0].tolist() == ["-9.2", "+1.8"]


def test_table_of_fixres(tmp_path):
    parts = [
        record({"trained at 96 px": [60, 61, 62], "trained at 64 px": below}, test_crop_px=px)
        for px, below in ((96, [59, 58, 60]), (64, [64, 66, 65]))
    ]
    pd.concat(parts).to_csv(tmp_path / "study_fixres.csv")
    table = statistics.fixres_table(tmp_path).set_index("test crop (px)")
    assert table["trained at 64 px, top-1 (%)"][96] == "62.0 ± 2.6"  # 61, 60 and 65 averaged
    assert table["difference [95 % interval]"].str.split().str[0].to_dict() == {
        64: "+4.0",
        96: "-2.0",
    }


def test_gains_tell_whether_a_difference_grows():
    low = record({"small": [1, 2, 3], "full": [0, 1, 2.1]}, epochs=4)
    high = record({"small": [1, 2, 3], "full": [5, 6, 7.5]}, epochs=8)
    gains = statistics.gains(pd.concat([low, high]), "epochs", "small", "full", "top1_raw_pct")
    found = statistics.compare(gains, 4, "gain").loc[8]
    test = stats.ttest_rel([4, 4, 4.5], [-1, -1, -0.9]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((test.low, test.high))
    assert found.verdict == "higher"


def test_intervals_are_those_of_the_paired_t_test():
    values = {"a": [60.0, 62.0, 61.0, 59.5, 60.5], "b": [61.0, 63.5, 61.5, 61.0, 61.2]}
    values["c"] = [60.5, 61.0, 61.5, 59.0, 60.4]
    found = statistics.compare(record(values), "a", "top1_raw_pct")
    for value in "bc":
        test = stats.ttest_rel(values[value], values["a"])
        expected = test.confidence_interval(0.95)
        row = found.loc[value]
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
        assert row.n == 5
        assert (row.verdict == "higher") == (test.pvalue < 0.05)
    assert found.verdict.to_dict() == {"b": "higher", "c": "no difference seen"}


def test_seeds_without_a_partner_are_left_out():
    table = record({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.0, 1.0], "c": [5.0]})
    found = statistics.compare(table, "a", "top1_raw_pct")
    assert found.n.to_dict() == {"b": 3, "c": 1}
    assert found.verdict["c"] == "too few seeds"
    same = record({"a": [1.0, 2.0], "b": [1.0, 2.0]})
    equal = statistics.compare(same, "a", "top1_raw_pct")
    assert equal.verdict["b"] == "no difference seen"


def test_summary():
    found = statistics.summarize(record({"z": [1.0, 3.0], "a": [2.0, 2.0]}), "top1_raw_pct")
    assert list(found.index) == ["z", "a"]
    assert found.loc["z", ["mean", "n"]].tolist() == [2.0, 2]
    assert found.loc["z", "std"] == pytest.approx(2**0.5)


def test_the_detection_table_pairs_seeds():
    """Differences of 10 and 14 points: 12, with Student's interval of two pairs."""
    rows = [("from scratch", 0, 20.0), ("trained", 0, 30.0), ("from scratch", 1, 22.0)]
    rows.append(("trained", 1, 36.0))
    table = pd.DataFrame(rows, columns=["value", "seed", "map_pct"])
    table = table.assign(status="done", map50_pct=2 * table.map_pct)
    first, second = statistics.detection_table(table).to_dict("records")
    assert first["backbone"] == "from scratch"
    assert first["mAP (%)"] == "21.0 ± 1.4"
    assert first["mAP at IoU 0.5 (%)"] == "42.0 ± 2.8"
    assert first["difference in mAP [95 % interval]"] == "baseline"
    half = 12.706 * 2  # Student's t for one degree of freedom, times the standard error
    expected = f"+12.0 [{12 - half:+.1f}, {12 + half:+.1f}]"
    assert second["difference in mAP [95 % interval]"] == expected
    assert (second["verdict"], second["n"]) == ("no difference seen", 2)
