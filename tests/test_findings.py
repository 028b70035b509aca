"""Findings against paired tests by SciPy and against sums by hand, on records made up here."""

import dataclasses

import pandas as pd
import pytest
from scipy import stats

from utils import findings
from utils.recipe import RECIPES
from utils.study import Arm, Study

TOP1 = {"bare": [50.0, 52.0, 51.0], "with x": [55.0, 56.0, 57.0], "with y": [50.5, 51.0, 51.2]}
ARMS = tuple(Arm(value, "cspdarknet19") for value in TOP1)
STUDY = Study("made_up", "recipe", "bare", RECIPES["quick"], ARMS, (0, 1, 2), weights="raw")


def record(top1=TOP1, **columns):
    """A row per value and seed, as a study writes it; the averaged weights are 2, 2, 5 ahead."""
    rows = [
        {
            "status": "done", "value": value, "seed": seed, "network": f"net {value}",
            "test_crop_px": 64, "top1_raw_pct": top1_pct,
            "top1_ema_pct": top1_pct + (2, 2, 5)[seed],
            "parameters": 10, "gmacs": 1.0, "images_per_s": 5.0, "time_s": 60,
        }
        for value, values in top1.items()
        for seed, top1_pct in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def costs():
    rows = [
        ("net bare", "training", "ms", 0, 10.0), ("net bare", "training", "ms", 1, 20.0),
        ("net with x", "training", "ms", 0, 5.0), ("net with x", "training", "ms", 1, 30.0),
        ("net with y", "training", "ms", 0, 10.0), ("net with y", "training", "ms", 1, 12.0),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["network", "quantity", "unit", "round", "value"])


def test_differences_are_those_of_the_studys_weights_and_test_size():
    other_size = record({value: [0.0] * 3 for value in TOP1}, test_crop_px=96)
    found = findings.differences(STUDY, pd.concat([record(), other_size]))
    test = stats.ttest_rel(TOP1["with x"], TOP1["bare"]).confidence_interval(0.95)
    row = found.loc["with x"]
    assert row.difference == pytest.approx(5)
    assert (row.low, row.high) == pytest.approx((test.low, test.high))
    assert row.verdict == "higher"
    assert found.verdict["with y"] == "no difference seen"


@pytest.mark.parametrize(("weights", "value", "sign"), [("raw", "with", 1), ("ema", "without", -1)])
def test_averaging_is_one_of_the_tricks(weights, value, sign):
    study = dataclasses.replace(STUDY, weights=weights)
    row = findings.differences(study, record()).loc[f"{value} EMA"]
    expected = stats.ttest_1samp([sign * 2, sign * 2, sign * 5], 0).confidence_interval(0.95)
    assert row.difference == pytest.approx(sign * 3)
    assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
    other = dataclasses.replace(STUDY, factor="act")
    assert list(findings.differences(other, record()).index) == ["with x", "with y"]


def test_leaving_out_is_the_other_way_round():
    found = findings.differences(STUDY, record())
    turned = findings.negated(found)
    assert turned.verdict["with x"] == "lower"
    assert turned.verdict["with y"] == "no difference seen"
    row, other = found.loc["with x"], turned.loc["with x"]
    assert (other.low, other.difference, other.high) == (-row.high, -row.difference, -row.low)


def test_differences_within_groups():
    four = record({"small, 4 epochs": [1, 2, 3], "full, 4 epochs": [0, 1, 2.1]}, epochs=4)
    eight = record({"small, 8 epochs": [1, 2, 3], "full, 8 epochs": [5, 6, 7.5]}, epochs=8)
    length = findings.by_length(pd.concat([four, eight]))
    found = findings.differences_within(length, "epochs", "small")
    assert list(found.index) == [(4, "full"), (8, "full")]
    assert found.difference.tolist() == pytest.approx([-2.9 / 3, 12.5 / 3])
    assert found.verdict.tolist() == ["lower", "higher"]


def test_training_sizes_are_compared_at_each_test_size():
    parts = [
        record({name: values}, train_crop_px=px, test_crop_px=size)
        for size, gain in ((64, 0), (96, 3))
        for name, px, values in (
            ("bare", 64, [10.0, 11.0, 12.0]),
            ("with FixRes", 48, [11.0 + gain, 12.0 + gain, 13.5 + gain]),
            ("with x", 64, [0.0, 0.0, 0.0]),
        )
    ]
    pair = findings.by_training_size(pd.concat(parts), ("bare", "with FixRes"))
    found = findings.differences_within(pair, "test_crop_px", "64 px")
    assert list(found.index) == [(64, "48 px"), (96, "48 px")]
    assert found.difference.tolist() == pytest.approx([3.5 / 3, 3.5 / 3 + 3])


def test_cost_ratios_are_taken_within_rounds():
    found = findings.cost_ratios(costs(), "training", "net bare").loc["net with x"]
    assert found.to_dict() == {"median": 1.0, "min": 0.5, "max": 1.5}
    assert findings.cost_table(costs())["training (ms)"].tolist() == [15.0, 17.5, 11.0]


def test_study_table_puts_the_interval_beside_the_verdict():
    study = dataclasses.replace(STUDY, factor="act")
    table = findings.study_table(study, record(), costs()).set_index("act")
    assert table["top-1 (%)"]["with x"] == "56.0 ± 1.0"
    assert table["difference [95 % interval]"]["with x"] == "+5.0 [+2.5, +7.5]"
    assert table["training (ms)"]["with x"] == 17.5
    assert table.loc["bare", ["difference [95 % interval]", "verdict"]].tolist() == ["baseline", ""]
    sentence = findings.sentences(findings.differences(study, record()), "bare")[0]
    assert sentence == "with x against bare: +5.0 [+2.5, +7.5] points, n = 3: higher"
