"""Studies: what is missing is run, and nothing else; what is there is never lost or mixed up."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from backbones import create_classifier
from scripts import ablate
from utils.data.folders import hold_out, open_folders
from utils.recipe import RECIPES
from utils.records import write_table
from utils.studies import runner as study_module
from utils.studies import statistics
from utils.studies.definitions import STUDIES
from utils.studies.runner import Study, Variant, curves_path, run_study

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
        Variant("relu", "cspdarknet19", test_sizes_px=(64,)),
        Variant("Mish, ours", "cspdarknet19", {"act": "mish"}),
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
    written = pd.read_csv(root / "out" / "tiny.csv", dtype={"commit": str})
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
    shutil.copy(root / "out" / "tiny.csv", tmp_path)
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
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    again = run_study(TINY, create_classifier, *places, processes=2, devices=["cpu", "cpu"])
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
    diverging = {"lr_per_1024": 1e5, "precision": "float32", "epochs": 3, "warmup_epochs": 2.9}
    variants = (TINY.variants[0], Variant("Hot", "cspdarknet19", recipe=diverging))
    study = dataclasses.replace(TINY, variants=variants, seeds=(0,))
    table = run_study(study, create_classifier, folders, tmp_path / "runs", tmp_path / "tiny.csv")
    assert set(table.status[table.value == "relu"]) == {"done"}
    assert "failed: the loss is not finite" in table.status[table.value == "Hot"].item()
    assert set(pd.read_csv(curves_path(tmp_path / "tiny.csv")).value) == {"relu"}
    assert list(statistics.summarize(table, study.top1_column).index) == ["relu"]
    assert statistics.differences(study, table).empty
    hot = statistics.differences(dataclasses.replace(study, baseline="Hot"), table)
    assert hot.verdict.to_dict() == {"relu": "too few seeds"}


def test_a_killed_process_is_a_failed_run_and_not_the_end(finished, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED", str(tmp_path))
    _, table = finished
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    broken = run_study(TINY, killed_at_mish, *places, processes=2)
    relu = broken.value == "relu"
    assert broken.status[~relu].str.contains("failed: a process was killed").all()
    assert set(broken.status[relu]) == {"done"}  # though the second was in a pool that broke
    assert len(list(tmp_path.glob("kill*"))) >= 3
    assert len(broken) == len(table) == 2 * 2 + 2
    again = run_study(TINY, create_classifier, *places)
    pd.testing.assert_frame_equal(without_time(again), without_time(table), check_dtype=False)


def killed_at_mish(*args, act="relu", **options):
    """Killed in turn: beside the second run with ReLU, after it, and whenever tried again."""
    folder = Path(os.environ["KILLED"])

    def done():
        return len(list(folder.glob("runs/tiny/relu-*/result.json")))

    def kills():
        return len(list(folder.glob("kill*")))

    if act == "mish":
        while done() < min(kills() + 1, 2):
            time.sleep(0.1)
        time.sleep(1)  # while the result reaches the study
        (folder / f"kill{kills()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while done() == 1 and not kills():
        time.sleep(0.1)
    return create_classifier(*args, act=act, **options)


def test_an_interrupt_ends_the_processes_of_a_study(folders, tmp_path, monkeypatch):
    """Ctrl-C after the first run: no second one is trained on, and no process is left."""
    before = set(multiprocessing.active_children())
    original, interrupted = write_table, []

    def interrupt(*args):
        original(*args)
        interrupted.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "write_table", interrupt)
    study = dataclasses.replace(TINY, seeds=tuple(range(50)))
    with pytest.raises(KeyboardInterrupt):
        run_study(
            study, create_classifier, folders, tmp_path / "runs", tmp_path / "a.csv", processes=2
        )
    assert len(interrupted) == 1
    deadline_s = time.monotonic() + 30
    workers = set(multiprocessing.active_children()) - before
    while any(is_running(worker.pid) for worker in workers):
        assert time.monotonic() < deadline_s
        for worker in workers:
            worker.join(0.1)
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) < 10


def is_running(pid):
    """Asked of the system: the pool's own thread may have collected what is_alive() waits for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_another_run_in_the_folder_is_refused(finished, folders, tmp_path):
    root, _ = finished
    longer = dataclasses.replace(TINY, recipe=dataclasses.replace(RECIPE, epochs=9))
    with pytest.raises(ValueError, match=r"relu-seed0: holds a run with epochs=2, not 9"):
        run_study(longer, create_classifier, folders, root / "runs", tmp_path / "new.csv")
    shutil.copytree(folders, tmp_path / "data")
    next((tmp_path / "data" / "train").rglob("*.JPEG")).unlink()
    with pytest.raises(ValueError, match="train_images"):
        run_study(TINY, create_classifier, tmp_path / "data", root / "runs", tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


def test_a_record_is_not_overwritten_by_less(finished, folders, tmp_path):
    root, _ = finished
    record = tmp_path / "tiny.csv"
    shutil.copy(root / "out" / "tiny.csv", record)
    before = record.read_bytes()
    with pytest.raises(ValueError, match="4 finished runs that would be lost"):
        run_study(TINY, create_classifier, folders, tmp_path / "runs", record)
    fewer = dataclasses.replace(TINY, seeds=(0,))
    with pytest.raises(ValueError, match=r"2 finished runs .* 'Mish, ours' with seed 1"):
        run_study(fewer, create_classifier, folders, root / "runs", record)
    with pytest.raises(NotADirectoryError, match="nowhere"):
        run_study(TINY, create_classifier, tmp_path / "nowhere", root / "runs", record)
    with pytest.raises(ValueError, match="device"):
        run_study(TINY, create_classifier, folders, root / "runs", record, devices=["cuda:99"])
    assert record.read_bytes() == before
    for other in (b"a,b\n1,2\n", b"", b"\xff\xfe\x00", b"# Title\n\na, b, c\n"):
        (tmp_path / "other.csv").write_bytes(other)
        with pytest.raises(ValueError, match=r"other.csv: is no record of a study"):
            run_study(TINY, create_classifier, folders, root / "runs", tmp_path / "other.csv")


def test_a_finished_run_is_tested_anew_where_it_was_tested_otherwise(finished, folders, tmp_path):
    root, table = finished
    shutil.copytree(root / "runs", tmp_path / "runs")
    before = (tmp_path / "runs" / "tiny" / "mish-ours-seed0" / "metrics.csv").read_bytes()
    larger = dataclasses.replace(TINY.variants[1], test_sizes_px=(64,))
    study = dataclasses.replace(TINY, variants=(TINY.variants[0], larger), seeds=(0,))
    places = folders, tmp_path / "runs", tmp_path / "tiny.csv"
    again = run_study(study, create_classifier, *places)
    assert again.test_crop_px.tolist() == [32, 64, 32, 64]
    first = table[table.seed == 0]
    assert again.top1_raw_pct[:3].tolist() == first.top1_raw_pct.tolist()
    assert (tmp_path / "runs" / "tiny" / "mish-ours-seed0" / "metrics.csv").read_bytes() == before
    tuned = run_study(
        dataclasses.replace(study, tuning=True), create_classifier, *places[:2], tmp_path / "b.csv"
    )
    assert set(tuned.val_images) == {3}


def test_tuning_does_not_read_the_validation_images(folders, tmp_path):
    study = dataclasses.replace(
        TINY, variants=TINY.variants[1:], baseline="Mish, ours", tuning=True
    )
    data = shutil.copytree(folders, tmp_path / "data")
    for path in (data / "val").rglob("*.JPEG"):
        path.write_bytes(b"no image")
    table = run_study(study, create_classifier, data, tmp_path / "runs", tmp_path / "tiny.csv")
    assert table.val_images.tolist() == [3, 3]  # the slice's
    curves = pd.read_csv(curves_path(tmp_path / "tiny.csv"))
    last = curves[curves.epoch == RECIPE.epochs]
    assert last.held_out_top1_pct.tolist() == pytest.approx(table.top1_raw_pct.tolist(), abs=1e-3)


def test_the_script(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "STUDIES", {"tiny": TINY})
    places = ["--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path / "tiny.csv")]
    command = ["tiny", "--data-dir", str(folders), *places]
    assert ablate.main([*command, "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "too few seeds" in shown
    assert len(pd.read_csv(tmp_path / "tiny.csv")) == 3
    assert ablate.main(command) == 0
    assert len(pd.read_csv(tmp_path / "tiny.csv")) == 6
    for wrong, status in (
        (["--seeds", "0"], 2),
        (["--seeds", "3"], 2),
        (["--processes", "0"], 2),
        (["--devices", "abacus"], 2),
        (["--data-dir", "nowhere"], 2),
    ):
        assert ablate.main([*command, *wrong]) == status
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert wrong[1] in error
    diverging = Variant("Hot", "cspdarknet19", recipe={"lr_per_1024": 1e30, "precision": "float32"})
    study = dataclasses.replace(TINY, name="hot", variants=(*TINY.variants, diverging))
    monkeypatch.setattr(ablate, "STUDIES", {"hot": study})
    command = ["hot", "--data-dir", str(folders), *places[:3], str(tmp_path / "hot.csv")]
    assert ablate.main(command) == 1
    assert "Hot, seed 1: failed: the loss is not finite" in capsys.readouterr().err


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


# ---- declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"baseline": "none"}, "baseline='none' is none of"),
        ({"variants": (TINY.variants[0], TINY.variants[0])}, "a value stands there twice"),
        ({"variants": (TINY.variants[0], Variant("Relu!", "darknet19"))}, "share a folder"),
        ({"variants": (Variant("relu", "darknet19", recipe={"epochs": 0}),)}, "epochs=0 must be"),
    ],
)
def test_wrong_studies_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_declared_studies_can_be_built(study):
    assert len(study.seeds) >= 3 or study.tuning
    for variant in study.variants:
        recipe = study.recipe_of(variant)
        with torch.device("meta"):
            create_classifier(variant.backbone, 10, **variant.options, **recipe.backbone_options)
