"""Studies: missing runs are trained, and nothing else; finished runs are never lost or mixed up."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from scripts import ablate
from utils.data.folders import hold_out, open_folders
from utils.recipe import RECIPES
from utils.records import file_digest, write_table
from utils.studies import runner, statistics
from utils.studies.runner import Study, Variant, curves_path, run_study
from utils.training.checkpoint import load_checkpoint

RECIPE = dataclasses.replace(
    RECIPES["quick"],
    epochs=2,
    batch_size=12,
    train_crop_px=32,
    eval_resize_px=32,
    eval_crop_px=32,
    width=0.125,
)
RELU = Variant("relu", "cspdarknet19", test_sizes_px=(64,))
MISH = Variant("Mish, ours", "cspdarknet19", {"act": "mish"})
TINY = Study("tiny", "act", "relu", RECIPE, (RELU, MISH), (0, 1))
HOT = Variant("Hot", "cspdarknet19", recipe={"lr_per_1024": 1e30})


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The tiny study, run once: the folder with runs/ and tiny.csv, and the table."""
    root = tmp_path_factory.mktemp("study")
    torch.set_num_threads(1)
    return root, run_study(TINY, folders, root / "runs", root / "tiny.csv")


def assert_same_results(table, other):
    """Equal in everything that the seed determines."""
    columns = ["images_per_s", "time_s", "commit", "command"]
    tables = (each.drop(columns=columns) for each in (table, other))
    pd.testing.assert_frame_equal(*tables, check_dtype=False)


def spy_on_fit(monkeypatch, interrupt_at=None):
    """A list that gets the name of every run's folder when `fit` begins with it."""
    started, fit = [], runner.fit

    def spy(model, data, recipe, run_dir, **options):
        started.append(run_dir.name)
        if len(started) == interrupt_at:
            raise KeyboardInterrupt
        return fit(model, data, recipe, run_dir, **options)

    monkeypatch.setattr(runner, "fit", spy)
    return started


def test_a_row_per_run_and_test_size_and_a_curve_per_run(finished):
    root, table = finished
    assert set(table.status) == {"done"}
    keys = list(table[["value", "seed", "test_crop_px"]].itertuples(index=False, name=None))
    assert keys == [
        (value, seed, px)
        for seed in (0, 1)
        for value, px in (("relu", 32), ("relu", 64), ("Mish, ours", 32))
    ]
    assert (table.val_images == 18).all()  # the validation set's, not the slice's 3
    written = pd.read_csv(root / "tiny.csv", dtype={"commit": str})
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    curves = pd.read_csv(curves_path(root / "tiny.csv"))
    assert len(curves) == 4 * RECIPE.epochs
    curve = curves[(curves.value == "Mish, ours") & (curves.seed == 1)]
    metrics = pd.read_csv(root / "runs" / "tiny" / "mish-ours-seed1" / "metrics.csv")
    assert curve.train_loss.tolist() == pytest.approx(metrics.train_loss.tolist(), abs=1e-4)
    assert metrics.val_top1_pct.isna().tolist() == [True, False]  # read once, at the end
    assert table.top1_raw_pct.iloc[-1] == pytest.approx(metrics.val_top1_pct.iloc[-1], abs=1e-3)


def test_rows_of_a_record_are_finished_runs_without_their_folders(finished, folders, tmp_path):
    """Also those of other seeds and values than are asked for: they stay where they are."""
    root, table = finished
    for path in root.glob("*.csv"):
        shutil.copy(path, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    for study in (TINY, dataclasses.replace(TINY, variants=(RELU,), seeds=(0,))):
        again = run_study(study, folders, tmp_path / "runs", tmp_path / "tiny.csv")
        pd.testing.assert_frame_equal(again, table, check_dtype=False)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == before
    partial = table.assign(lr_per_1024=table.lr_per_1024.where(table.seed > 0))
    partial.to_csv(tmp_path / "tiny.csv", index=False)  # older rows did not have this column
    assert len(run_study(TINY, folders, tmp_path / "runs", tmp_path / "tiny.csv")) == len(table)
    assert not (tmp_path / "runs").exists()


def test_a_trained_run_without_a_row_is_only_evaluated(finished, folders, tmp_path, monkeypatch):
    """Here for another record, and for a further test size."""
    root, table = finished
    monkeypatch.setattr("utils.training.loop.Trainer.train_step", lambda *_: pytest.fail("trains"))
    larger = dataclasses.replace(MISH, test_sizes_px=(64,))
    study = dataclasses.replace(TINY, variants=(RELU, larger))
    again = run_study(study, folders, root / "runs", tmp_path / "new.csv")
    assert again.test_crop_px.tolist() == [32, 64, 32, 64] * 2
    assert_same_results(again.drop(index=[3, 7]).reset_index(drop=True), table)


def test_an_interrupted_study_resumes(finished, folders, tmp_path, monkeypatch):
    started = spy_on_fit(monkeypatch, interrupt_at=3)
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, *places)
    assert len(pd.read_csv(places[2])) == 3
    assert_same_results(run_study(TINY, *places), finished[1])
    assert started == ["relu-seed0", "mish-ours-seed0", *["relu-seed1"] * 2, "mish-ours-seed1"]


def test_a_failed_run_is_a_row_and_tried_again(finished, folders, tmp_path, monkeypatch):
    root, _ = finished
    study = dataclasses.replace(TINY, variants=(MISH, HOT), baseline="Hot", seeds=(0,))
    shutil.copytree(root / "runs", tmp_path / "runs")
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    started = spy_on_fit(monkeypatch)
    for _ in range(2):
        table = run_study(study, *places)
    assert started == ["mish-ours-seed0", "hot-seed0", "hot-seed0"]
    assert table.status[0] == "done"
    assert table.status[1].startswith("failed: the loss is not finite")
    assert set(pd.read_csv(curves_path(places[2])).value) == {MISH.value}
    assert statistics.differences(study, table).low.isna().all()


def test_a_killed_process_is_a_failed_run_and_the_others_give_the_same(finished, folders, tmp_path):
    """Of two processes at a time the first one is killed; the study is repeated afterwards."""
    torch.set_num_threads(2)  # one for each process
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    before = set(multiprocessing.active_children())

    def kill():
        while not (started := set(multiprocessing.active_children()) - before):
            time.sleep(0.01)
        os.kill(started.pop().pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    table = run_study(TINY, *places, processes=2, devices=["cpu", "cpu"])
    (status,) = table.status[table.status != "done"]
    assert status.startswith("failed: its process was killed (exit code -9)")
    torch.set_num_threads(1)
    assert_same_results(run_study(TINY, *places), finished[1])  # three of four are kept


def test_an_interrupt_ends_the_processes_of_a_study(folders, tmp_path, monkeypatch):
    """Ctrl-C after the first run: no further run is recorded, and no process is left."""
    before = set(multiprocessing.active_children())

    def interrupt(*args):
        write_table(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "write_table", interrupt)
    study = dataclasses.replace(TINY, seeds=tuple(range(50)))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, folders, tmp_path, tmp_path / "tiny.csv", processes=2)
    assert set(multiprocessing.active_children()) == before
    assert pd.read_csv(tmp_path / "tiny.csv").groupby(["value", "seed"]).ngroups == 1


def test_another_run_in_a_folder_is_a_failed_run(finished, folders, tmp_path):
    """Of another recipe, and of other images."""
    root, _ = finished
    longer = dataclasses.replace(TINY, recipe=dataclasses.replace(RECIPE, epochs=9))
    data = shutil.copytree(folders, tmp_path / "data")
    next((data / "train").rglob("*.JPEG")).unlink()
    for study, images, words in (
        (longer, folders, "holds a run with epochs=2, not 9"),
        (TINY, data, "holds a run with train_files="),
    ):
        table = run_study(study, images, root / "runs", tmp_path / "new.csv")
        assert table.status.str.startswith("failed: ").all()
        assert f"relu-seed0: {words}" in table.status[0]
    with pytest.raises(NotADirectoryError, match="nowhere"):
        run_study(TINY, tmp_path / "nowhere", root / "runs", tmp_path / "new.csv")


def test_a_record_of_other_runs_is_an_error_and_stays(finished, folders, tmp_path):
    """Other settings, another autocast type where runs are missing, another study, another file."""
    _, table = finished
    other = {"bfloat16": "float32", "float32": "bfloat16"}[table.autocast[0]]
    longer = dataclasses.replace(TINY, recipe=dataclasses.replace(RECIPE, epochs=9))
    record = tmp_path / "tiny.csv"
    for study, content, words in (
        (longer, table, "'relu' with seed 0 was recorded with epochs=2, not 9"),
        (TINY, table.assign(val_images=9), "was recorded with val_images=9, not 18"),
        (TINY, table[3:].assign(autocast=other), f"autocast='{other}', not '{table.autocast[0]}'"),
        (TINY, table.assign(study="act"), "not a record of the study tiny"),
        (TINY, b"", "not a record of the study tiny"),
        (TINY, b"\xff\xfe\x00", "not a record of the study tiny"),
        (TINY, b"# Title\n\na, b, c\n", "not a record of the study tiny"),
    ):
        record.write_bytes(content if isinstance(content, bytes) else content.to_csv().encode())
        before = record.read_bytes()
        with pytest.raises(ValueError, match=rf"tiny\.csv: .*{words}"):
            run_study(study, folders, tmp_path / "runs", record)
        assert record.read_bytes() == before
    table.assign(autocast=other).to_csv(record, index=False)
    again = run_study(TINY, folders, tmp_path / "runs", record)  # nothing to train, nothing mixed
    assert set(again.autocast) == {other}


def test_tuning_does_not_read_the_validation_images(folders, tmp_path):
    study = dataclasses.replace(TINY, variants=(MISH,), baseline=MISH.value, seeds=(0,))
    data = shutil.copytree(folders, tmp_path / "data")
    for path in (data / "val").rglob("*.JPEG"):
        path.write_bytes(b"no image")
    places = data, tmp_path / "runs", tmp_path / "tiny.csv"
    (row,) = run_study(dataclasses.replace(study, tuning=True), *places).itertuples()
    curve = pd.read_csv(curves_path(places[2]))
    assert len(curve.dropna()) == RECIPE.epochs
    last = curve.iloc[-1]
    assert row.val_images == 3  # the slice's
    assert row.top1_raw_pct == pytest.approx(last.held_out_top1_pct, abs=1e-3)


def test_the_script(finished, folders, tmp_path, monkeypatch, capsys):
    root, _ = finished
    record = shutil.copy(root / "tiny.csv", tmp_path)
    studies = {"tiny": TINY, "hot": dataclasses.replace(TINY, name="hot", variants=(RELU, HOT))}
    monkeypatch.setattr(ablate, "STUDIES", studies)
    options = ["--data-dir", str(folders), "--runs-dir", str(tmp_path / "runs"), "--output"]
    command = ["tiny", *options, str(record)]
    assert ablate.main(command) == 0
    assert "detectable" in capsys.readouterr().out
    for wrong in (["--seeds", "3"], ["--processes", "0"], ["--devices", "abacus"]):
        assert ablate.main([*command, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert wrong[1] in line
    assert ablate.main(["hot", *options, str(tmp_path / "hot.csv"), "--seeds", "1"]) == 1
    assert "Hot, seed 0: failed: the loss is not finite" in capsys.readouterr().err


def test_variants_start_from_weights_and_train_on_a_share(folders, finished, tmp_path):
    """A third of the images of each class; a rate of almost 0 leaves the weights as they were."""
    weights = finished[0] / "runs" / "tiny" / "relu-seed0" / "last.pt"
    still = {"lr_per_1024": 1e-9}
    variants = (
        Variant("few", "cspdarknet19", recipe={"epochs": 3}, train_share=1 / 3),
        Variant("tuned", "cspdarknet19", recipe=still, pretrained=True),
    )
    study = Study("tuned", "start", "few", RECIPE, variants, (0,))
    with pytest.raises(ValueError, match="the study tuned needs --weights"):
        run_study(study, folders, tmp_path, tmp_path / "x.csv")
    table = run_study(study, folders, tmp_path, tmp_path / "x.csv", weights=weights)
    assert table.status.tolist() == ["done", "done"]
    steps = [load_checkpoint(tmp_path / "tuned" / f"{v.slug}-seed0" / "last.pt") for v in variants]
    assert [each["step"] for each in steps] == [3 * (15 // 12), 2 * (48 // 12)]
    name = "backbone.stem.conv.weight"
    source = load_checkpoint(weights)["ema"][f"module.{name}"]
    torch.testing.assert_close(steps[1]["model"][name], source)
    assert steps[1]["config"]["weights_sha256"] == file_digest(weights)


def test_the_slice_is_cut_from_training_alone(folders):
    data = open_folders(folders, RECIPE)
    cut = hold_out(data, RECIPE, 0.2)
    both = [set(map(bytes, part.names)) for part in (cut.train, cut.val)]
    assert not both[0] & both[1]
    assert both[0] | both[1] == set(map(bytes, data.train.names))
    assert np.bincount(cut.val.labels).tolist() == [3, 3, 3]  # of 16 each
    paths = [cut.val.path(i) for i in range(len(cut.val))]
    names = [data.classes[label] for label in cut.val.labels]
    assert [path.parts[-3:-1] for path in paths] == [("train", name) for name in names]
    with pytest.raises(ValueError, match="too few images to split off"):
        hold_out(data, RECIPE, 1 / 17)
