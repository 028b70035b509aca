"""The dry run: its arithmetic by hand, its steps those of a run, and nothing left behind."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SMALL, TINY, run

from backbones import create_classifier
from utils.data.folders import open_folders
from utils.data.packing import make_shards
from utils.training import rehearsal
from utils.training.loop import LossMeter, Trainer, fit
from utils.training.rehearsal import duration, rehearse

CPU = torch.device("cpu")


def make_model():
    torch.manual_seed(0)
    return create_classifier("cspdarknet19", 3, width=0.125)


def rehearsed(folders, recipe=TINY, **options):
    """The estimate in seconds, and the lines by their first words."""
    lines = []
    data = open_folders(folders, recipe)
    total_s = rehearse(make_model(), data, recipe, device=CPU, tell=lines.append, **options)
    return total_s, dict(line.split(": ", 1) for line in lines)


def test_what_it_tells(folders):
    total_s, said = rehearsed(folders, name="mine")
    assert total_s > 0
    parameters = sum(p.numel() for p in make_model().parameters()) / 1e6
    assert said["model"].startswith(f"mine, {parameters:.2f} M parameters")
    assert said["model"].endswith("at 32 x 32 pixels")
    assert said["data"] == (
        "3 classes, 48 training and 18 validation images, 6 steps of 8 images per epoch "
        "(0 images are left out of each)"
    )
    # The peak is 0.5 * 8 / 1024 = 0.003906; warm-up over 6 steps, then half a cosine over 12.
    assert said["schedule"] == (
        "3 epochs, 18 steps, learning rate 0.000651 at step 0, 0.00391 at step 5, 0.00333 at "
        "step 9, 6.66e-05 at the last (peak 0.00391, warm-up 1 epochs)"
    )
    assert said["device"] == "cpu, one process with 0 decoding processes each"
    assert "of training and" in said["estimate"]


@pytest.mark.parametrize(
    ("workers", "paces_s", "expected_s"),
    [
        # First batch and an image each of: training, evaluation, and their decoding alone.
        (0, [(9, 0.5), (9, 0.25)], 3 * (48 * 0.5 + 18 * 0.25)),
        (2, [(9, 0.5), (9, 0.25), (9, 0.8), (9, 0.2)], 3 * (48 * 0.5 + 18 * 0.25)),
        (2, [(9, 0.5), (9, 0.25), (9, 1.6), (9, 1.0)], 3 * (48 * 0.8 + 18 * 0.5)),
    ],
    ids=["no workers", "the step takes longer", "decoding takes longer"],
)
def test_the_estimate_by_hand(folders, monkeypatch, workers, paces_s, expected_s):
    paces = iter(paces_s)
    monkeypatch.setattr(rehearsal, "_pace", lambda *args, **options: next(paces))
    monkeypatch.setattr(LossMeter, "mean", lambda self: 0.0)
    total_s, said = rehearsed(folders, workers=workers)
    assert total_s == pytest.approx(expected_s)
    assert said["estimate"].startswith(f"{duration(expected_s)} for 3 epochs, each ")


def test_its_steps_are_those_of_the_run(folders, tmp_path, monkeypatch):
    """Two of them, with the same losses."""
    losses, step = [], Trainer.train_step

    def noted(self, batch):
        losses.append(step(self, batch).item())
        return torch.tensor(losses[-1])

    monkeypatch.setattr(Trainer, "train_step", noted)
    rehearsed(folders)
    fit(make_model(), open_folders(folders, TINY), TINY, tmp_path / "run", device=CPU, quiet=True)
    assert len(losses) == 2 + 18
    assert losses[:2] == losses[2:4]


def test_an_epoch_of_one_step_is_enough(folders):
    recipe = dataclasses.replace(TINY, epochs=1, warmup_epochs=0.0, batch_size=32)
    assert rehearsed(folders, recipe)[0] > 0


def test_memory_that_runs_out_is_told_with_what_helps(folders, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(
        MemoryError, match=r"^not enough memory on the GPU; try --accumulate 2, or a smaller"
    ):
        rehearsed(folders)


def test_durations():
    told = [duration(time_s) for time_s in (0.25, 119, 120, 7199, 7200, 172_800)]
    assert told == ["0.2 s", "119.0 s", "2.0 minutes", "120.0 minutes", "2.0 hours", "2.0 days"]


# ---- scripts/train.py --dry-run ------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_written(folders, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)  # where runs/ would be made
    args = ["--data-dir", folders, *SMALL, "--workers", workers, "--dry-run"]
    assert run("train.py", *args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model: cspdarknet19, ")
    assert lines[-1].startswith("estimate: ")
    assert run("train.py", *args, "--output-dir", "new") == 0
    assert list(tmp_path.iterdir()) == []


def test_on_shards(folders, tmp_path, capsys):
    make_shards(folders, tmp_path / "shards", images_per_shard=10)
    pattern = str(tmp_path / "shards" / "{train-{000000..000004},val-{000000..000001}}.tar")
    args = ["--data-dir", pattern, *SMALL, "--workers", 2, "--output-dir", tmp_path / "new"]
    assert run("train.py", *args, "--dry-run") == 0
    assert "48 training and 18 validation images, 6 steps of 8" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_under_torchrun(folders, tmp_path):
    """Every process takes part, also without an image to test; rank 0 alone tells."""
    val = tmp_path / "data" / "val" / "n00000000"
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / val.name).symlink_to(folders / "train" / val.name)
    val.mkdir(parents=True)
    (val / "0.JPEG").symlink_to(folders / "val" / val.name / "0.JPEG")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "scripts" / "train.py"), "--dry-run"]
    command += ["--data-dir", str(tmp_path / "data"), "--device", "cpu", *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"env": env, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == (
        ["model", "data", "schedule", "device", "first step", "a step", "estimate"]
    )
    assert "2 processes" in lines[3]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
