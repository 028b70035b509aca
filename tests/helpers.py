"""What more than one test file uses and no fixture can be."""

import dataclasses
import runpy
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from utils.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[1]
# Options of scripts/train.py for a run of seconds on the fixture `folders`: six steps an epoch.
SMALL = [
    *("--recipe", "quick", "--epochs", "2", "--batch-size", "8", "--train-crop-px", "32"),
    *("--eval-resize-px", "36", "--eval-crop-px", "32", "--width", "0.125", "--workers", "0"),
]
# The whole recipe in small, for the same images: six steps an epoch.
TINY = dataclasses.replace(
    RECIPES["imagenet"],
    epochs=3,
    warmup_epochs=1.0,
    batch_size=8,
    train_crop_px=32,
    eval_resize_px=36,
    eval_crop_px=32,
    width=0.125,
)


def run(script, *args):
    """Exit code of a script's main, also where argparse ends it."""
    try:
        return runpy.run_path(str(ROOT / "scripts" / script))["main"]([str(arg) for arg in args])
    except SystemExit as error:
        return error.code


@contextmanager
def mounted(path, *options):
    """A mount on `path`, which is made, for the time of the block; skips where nobody may mount."""
    path = Path(path).absolute()
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may mount no file system here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def small_disk(path, size):
    """A file system of so many bytes (or "4k") on `path`."""
    return mounted(path, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def assert_same_bits(a, b, path=""):
    """Of nested dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def assert_same_run(one, other):
    """Two run folders hold the same weights, averages, optimizer and metrics.csv, bit for bit.

    The last ones and the best.
    """
    keys = ("model", "ema", "optimizer", "schedule", "step", "metrics")
    for name in ("last.pt", "best.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        assert_same_bits(*({key: state[key] for key in keys} for state in states))
    tables = [(folder / "metrics.csv").read_bytes() for folder in (one, other)]
    assert tables[0] == tables[1]


def randomise_norms(net):
    """Statistics and affine parameters that are not the identity, so that they are tested too."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return net
