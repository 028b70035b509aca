"""Run folders and checkpoints: what is saved, what resumes, and what is refused in one line."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY
from test_training import make_model

from utils.cli import DataError
from utils.data.folders import open_folders
from utils.training.checkpoint import (
    load_checkpoint,
    load_trained,
    open_run,
    save_checkpoint,
    validate_same_run,
)
from utils.training.loop import fit

RECIPE = dataclasses.replace(TINY, epochs=2)
MODEL = {"backbone": "cspdarknet19", "options": {"width": 0.125}}


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The folder of a finished run; read only."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    fit(make_model(), open_folders(folders, RECIPE), RECIPE, run_dir, config=MODEL)
    return run_dir


def test_a_trained_network_comes_back_with_both_weights(finished):
    trained, saved = load_trained(finished / "last.pt"), load_checkpoint(finished / "last.pt")
    assert (trained.backbone, trained.options) == ("cspdarknet19", {"width": 0.125})
    assert trained.classes == ["n00000000", "n00000001", "n00000002"]
    for name, value in trained.raw.state_dict().items():
        assert torch.equal(value, saved["model"][name])
        assert torch.equal(trained.ema.state_dict()[name], saved["ema"][f"module.{name}"])
    assert not torch.equal(trained.raw.head.weight, trained.ema.head.weight)


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        ({"recipe": {"momentum": 0.9}}, {"recipe": {"momentum": 0.8}}, "momentum=0.9, not 0.8"),
        ({"seed": 0}, {"seed": 1}, "seed=0, not 1"),
        ({"classes": ["a", "b"]}, {"classes": ["a", "c"]}, r"classes\[1\]='b', not 'c'"),
        ({"backbone": "a", "recipe": {"epochs": 1}}, {"recipe": {"epochs": 2}}, "epochs=1, not 2"),
        ({"options": {"act": "mish"}}, {"options": {}}, r"options\.act='mish', not None"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, found, wanted, words):
    with pytest.raises(DataError, match=f"{tmp_path}: holds a run with {words}; repeat"):
        validate_same_run(tmp_path, found, wanted)
    validate_same_run(tmp_path, {**found, "command": "x", "workers": 1}, {**found, "workers": 4})


def test_a_folder_with_another_run_is_left_untouched(folders, finished):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(DataError, match="holds a run with seed=0, not 1"):
        fit(make_model(), open_folders(folders, RECIPE), RECIPE, finished, config=MODEL, seed=1)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_resumes_on_the_same_images_alone(folders, finished, tmp_path, split):
    """In another place, too; not if two images have changed their classes."""
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folders, data)
    shutil.copytree(finished, run_dir)
    fit(make_model(), open_folders(data, RECIPE), RECIPE, run_dir, config=MODEL)
    one, two = (data / split / f"n0000000{label}" / "0.JPEG" for label in (0, 1))
    one.rename(tmp_path / "0.JPEG")
    two.rename(one)
    (tmp_path / "0.JPEG").rename(two)
    changed = open_folders(data, RECIPE)
    with pytest.raises(
        DataError, match=f"holds a run with {split}_files='paths and sizes [0-9a-f]"
    ):
        fit(make_model(), changed, RECIPE, run_dir, config=MODEL)


def test_a_folder_with_other_files_is_refused(tmp_path):
    for name in ("photo.jpg", ".DS_Store"):
        (tmp_path / name).touch()
    words = rf"{tmp_path}: holds 1 \(photo\.jpg\) and no run"
    with pytest.raises(DataError, match=words), open_run(tmp_path, {"seed": 0}):
        pass


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55  # inside a tensor, where PyTorch would not notice
    path.write_bytes(content)


def change(path, **entries):
    torch.save({**torch.load(path, weights_only=True), **entries}, path)


DAMAGED = "not a checkpoint, or damaged"
BROKEN = {
    "missing": (lambda path: path.unlink(), "no such checkpoint"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:9999]), DAMAGED),
    "a flipped bit": (flip_a_bit, DAMAGED),
    "code": (lambda path: torch.save({"model": Trap()}, path), DAMAGED),
    "a state dict": (
        lambda path: torch.save({"weight": torch.zeros(1)}, path),
        "not a checkpoint of scripts/train.py",
    ),
    "weights of another network": (lambda path: change(path, model={}), "do not fit its own"),
    "a recipe of another version": (
        lambda path: change(path, config={**MODEL, "classes": ["a"], "recipe": {"epochz": 1}}),
        "do not fit its own config .*epochz",
    ),
    "weights that are not finite": (
        lambda path: change(
            path,
            ema={
                name: value * float("nan") if value.is_floating_point() else value
                for name, value in torch.load(path, weights_only=True)["ema"].items()
            },
        ),
        "are not all finite",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_one_line(finished, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes((finished / "last.pt").read_bytes())
    prepare, words = BROKEN[kind]
    prepare(path)
    with pytest.raises((DataError, FileNotFoundError), match=rf"^{path}: .*{words}") as error:
        load_trained(path)
    assert "\n" not in str(error.value)
    assert not Path("sprung").exists()  # no code was run


def test_the_last_the_best_and_every_second_epoch_are_kept(tmp_path):
    rows = []
    for epoch, top1_pct in enumerate((50.0, 70.0, 60.0, 70.0, 65.0), start=1):
        rows.append({"epoch": epoch, "step": 3 * epoch, "ema_val_top1_pct": top1_pct})
        checkpoint = {"step": 3 * epoch, "metrics": rows, "speed": rows}
        save_checkpoint(tmp_path, checkpoint, keep_every=2)
    kept = {path.name: torch.load(path)["step"] // 3 for path in tmp_path.glob("*.pt")}
    assert kept == {"last.pt": 5, "best.pt": 4, "epoch_0002.pt": 2, "epoch_0004.pt": 4}


def test_each_file_is_synced_before_its_rename_and_the_rename_before_the_next_file(
    tmp_path, monkeypatch
):
    """Against a loss of power, which no test can cause: the order of the system calls."""
    fsync, replace, calls = os.fsync, os.replace, []

    def record_fsync(handle):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def record_replace(source, target):
        calls.append(("rename", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    row = {"epoch": 2, "step": 5, "ema_val_top1_pct": 50.0}
    checkpoint = {"step": 5, "metrics": [row], "speed": [row], "weights": torch.ones(9)}
    save_checkpoint(tmp_path, checkpoint, keep_every=2)
    names = ["last.pt", "metrics.csv", "speed.csv", "best.pt", "epoch_0002.pt"]
    assert calls == [
        call
        for name in names
        for call in (
            ("sync", f"{name}.partial"),
            ("rename", f"{name}.partial", name),
            ("sync", tmp_path.name),
        )
    ]
