"""Studies: what is missing is run, and nothing else; intervals against SciPy's own test."""

import dataclasses
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from backbones.classifier import create_classifier
from utils import study as study_module
from utils.data import hold_out, open_folders
from utils.recipe import RECIPES
from utils.studies import STUDIES
from utils.study import Arm, Study, compare, curves_path, run_study, summarise

RECIPE = dataclasses.replace(
    RECIPES["quick"],
    epochs=2,
    batch_size=12,
    train_crop_px=32,
    eval_resize_px=32,
    eval_crop_px=32,
    width=0.125,
)
TINY = Study(
    "tiny",
    "act",
    "relu",
    RECIPE,
    (
        Arm("relu", "cspdarknet19", test_sizes_px=(64,)),
        Arm("Mish, ours", "cspdarknet19", {"act": "mish"}),
    ),
    (0, 1),
)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The tiny study, run once: where its runs and its table are, and the table."""
    root = tmp_path_factory.mktemp("study")
    torch.set_num_threads(1)
    table = run_study(TINY, create_classifier, folders, root / "runs", root / "out" / "tiny.csv")
    return root, table


def without_time(table):
    """What the seed determines."""
    return table.drop(columns=["images_per_s", "time_s", "commit", "command"])


def test_a_row_per_run_and_test_size(finished):
    root, table = finished
    assert len(table) == 2 * 2 + 2
    assert set(table.status) == {"done"}
    keys = table[["value", "seed", "test_crop_px"]].apply(tuple, axis=1)
    sizes = {("relu", 32), ("relu", 64), ("Mish, ours", 32)}
    assert set(keys) == {(value, seed, px) for value, px in sizes for seed in (0, 1)}
    written = pd.read_csv(root / "out" / "tiny.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert {path.name for path in (root / "runs" / "tiny").iterdir()} == {
        *("relu-seed0", "relu-seed1", "mish-ours-seed0", "mish-ours-seed1")
    }
    assert (table.val_images == 18).all()  # the validation's, not the slice's 3


def test_curves_are_those_of_the_runs(finished):
    root, _ = finished
    curves = pd.read_csv(curves_path(root / "out" / "tiny.csv"))
    assert len(curves) == 4 * RECIPE.epochs
    for (value, seed), curve in curves.groupby(["value", "seed"]):
        folder = "relu" if value == "relu" else "mish-ours"
        metrics = pd.read_csv(root / "runs" / "tiny" / f"{folder}-seed{seed}" / "metrics.csv")
        for ours, theirs in (
            ("epoch", "epoch"),
            ("train_loss", "train_loss"),
            ("held_out_top1_pct", "val_top1_pct"),
            ("ema_held_out_loss", "ema_val_loss"),
        ):
            assert curve[ours].tolist() == pytest.approx(metrics[theirs].tolist(), abs=1e-4)
    assert set(curves.study) == {"tiny"}
    assert set(curves.factor) == {"act"}


def test_finished_runs_are_not_repeated(finished, folders, monkeypatch):
    root, table = finished
    monkeypatch.setattr(study_module.training, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run_study(TINY, create_classifier, folders, root / "runs", root / "again.csv")
    pd.testing.assert_frame_equal(again, table, check_dtype=False)


def test_a_deleted_run_is_made_again_alone_with_the_same_numbers(
    finished, folders, tmp_path, monkeypatch
):
    root, table = finished
    shutil.copytree(root / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "relu-seed1")
    trained, fit = [], study_module.training.fit

    def spy(model, data, recipe, run_dir, **options):
        trained.append(run_dir.name)
        return fit(model, data, recipe, run_dir, **options)

    monkeypatch.setattr(study_module.training, "fit", spy)
    again = run_study(TINY, create_classifier, folders, tmp_path / "runs", tmp_path / "tiny.csv")
    assert trained == ["relu-seed1"]
    pd.testing.assert_frame_equal(without_time(again), without_time(table), check_dtype=False)


def test_two_processes_give_the_same(finished, folders, tmp_path):
    _, table = finished
    torch.set_num_threads(2)  # shared by the two
    output = tmp_path / "tiny.csv"
    again = run_study(TINY, create_classifier, folders, tmp_path / "runs", output, processes=2)
    pd.testing.assert_frame_equal(without_time(again), without_time(table), check_dtype=False)


def test_an_interrupted_study_keeps_its_rows_and_goes_on(finished, folders, tmp_path, monkeypatch):
    _, table = finished
    fit, calls = study_module.training.fit, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(study_module.training, "fit", interrupted)
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, create_classifier, *places)
    assert len(pd.read_csv(places[2])) == 3
    again = run_study(TINY, create_classifier, *places)
    assert len(calls) == 5  # the third twice
    pd.testing.assert_frame_equal(without_time(again), without_time(table), check_dtype=False)


def test_a_run_that_fails_is_a_row_that_says_so(finished, folders, tmp_path):
    diverging = {"lr_per_1024": 1e30, "precision": "float32"}
    arms = (TINY.arms[0], Arm("hot", "cspdarknet19", recipe=diverging))
    study = dataclasses.replace(TINY, arms=arms, seeds=(0,))
    table = run_study(study, create_classifier, folders, tmp_path / "runs", tmp_path / "tiny.csv")
    assert set(table.status[table.value == "relu"]) == {"done"}
    assert "failed: the loss is not finite" in table.status[table.value == "hot"].item()
    assert set(pd.read_csv(curves_path(tmp_path / "tiny.csv")).value) == {"relu"}
    table = table[table.test_crop_px != 64]
    assert list(summarise(table).index) == ["relu"]
    assert compare(table, "relu").empty


def test_the_slice_is_cut_from_training_alone(folders):
    data = open_folders(folders, RECIPE)
    cut = hold_out(data, RECIPE, every=5)
    both = [set(map(bytes, part.names)) for part in (cut.train, cut.val)]
    assert not both[0] & both[1]
    assert both[0] | both[1] == set(map(bytes, data.train.names))
    assert np.bincount(cut.val.labels).tolist() == [3, 3, 3]  # of 16 each
    assert cut.val.folder == data.train.folder
    for part in (cut.train, cut.val):
        names = [data.classes[label] for label in part.labels]
        assert [part.path(i).parent.name for i in range(len(part))] == names
    with pytest.raises(ValueError, match="every=1 must be at least 2"):
        hold_out(data, RECIPE, every=1)
    with pytest.raises(ValueError, match="fewer than 17 images"):
        hold_out(data, RECIPE, every=17)


# ---- statistics ----------------------------------------------------------------------------------


def table_of(values):
    rows = [
        {"status": "done", "value": value, "seed": seed, "top1_ema_pct": top1, "parameters": 1}
        for value, column in values.items()
        for seed, top1 in enumerate(column)
    ]
    return pd.DataFrame(rows).assign(gmacs=1.0, images_per_s=2.0, time_s=3.0)


def test_intervals_are_those_of_the_paired_t_test():
    values = {"a": [60.0, 62.0, 61.0, 59.5, 60.5], "b": [61.0, 63.5, 61.5, 61.0, 61.2]}
    values["c"] = [60.5, 61.0, 61.5, 59.0, 60.4]
    found = compare(table_of(values), "a")
    for value in "bc":
        test = stats.ttest_rel(values[value], values["a"])
        expected = test.confidence_interval(0.95)
        row = found.loc[value]
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
        assert row.n == 5
        assert (row.verdict == "higher") == (test.pvalue < 0.05)
    assert found.verdict.to_dict() == {"b": "higher", "c": "no difference seen"}


def test_seeds_without_a_partner_are_left_out():
    table = table_of({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.0, 1.0], "c": [5.0]})
    found = compare(table, "a")
    assert found.n.to_dict() == {"b": 3, "c": 1}
    assert found.verdict["c"] == "too few seeds"
    equal = compare(table_of({"a": [1.0, 2.0], "b": [1.0, 2.0]}), "a")
    assert equal.verdict["b"] == "no difference seen"


def test_summary():
    found = summarise(table_of({"z": [1.0, 3.0], "a": [2.0, 2.0]}))
    assert list(found.index) == ["z", "a"]
    assert found.loc["z", ["mean", "n"]].tolist() == [2.0, 2]
    assert found.loc["z", "std"] == pytest.approx(2**0.5)


# ---- declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"baseline": "none"}, "baseline='none' is none of"),
        ({"arms": (TINY.arms[0], TINY.arms[0])}, "a value stands there twice"),
        ({"arms": (Arm("relu", "darknet19", recipe={"epochs": 0}),)}, "epochs=0 must be"),
    ],
)
def test_wrong_studies_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_declared_studies_can_be_built(study):
    assert len(study.seeds) >= 3
    for arm in study.arms:
        recipe = study.recipe_of(arm)
        with torch.device("meta"):
            create_classifier(arm.backbone, 10, **arm.options, **recipe.backbone_options)
