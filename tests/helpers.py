"""What more than one test file uses and no fixture can be."""

import dataclasses
import json
import re
import runpy
import subprocess
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image

from utils.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[1]
CLEAR_PEAK = Path("/proc/self/clear_refs")
# Options of scripts/train.py for a run of seconds on the fixture `folders`: six steps an epoch.
SMALL = [
    *("--recipe", "quick", "--epochs", "2", "--batch-size", "8", "--train-crop-px", "32"),
    *("--eval-resize-px", "36", "--eval-crop-px", "32", "--width", "0.125", "--workers", "0"),
]
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
)
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


def run_check(notebook, **values):
    """The names of a notebook after its imports, its parameters with these values, and their check.

    Args:
        notebook: the beginning of its name, such as "03".
    """
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code].index(True)
    names = {}
    exec(re.sub(r"(?m)^ *[%!].*$", "", code[0].source), names)
    exec(code[tagged].source, names)
    assert values.keys() <= names.keys(), "not a parameter of this notebook"
    names |= values
    exec(code[tagged + 1].source, names)
    return names


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


@contextmanager
def at_most_mb(limit_mb):
    """The block raises this process's memory by less at its highest; on Linux alone it is known."""
    if CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")  # the peak begins anew, man 5 proc
    before = _status_mb("VmRSS")
    yield
    assert _status_mb("VmHWM") < before + limit_mb


def _status_mb(entry):
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) / 1024


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


def write_coco(root, **changes):
    """A folder in COCO's format of one image a split with one box; changes are of train's file."""
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 6, 10, 12.5]}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "ant"}],
    }
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        entries = content | (changes if split == "train" else {})
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(entries))
        Image.new("RGB", (40, 30)).save(root / split / "a.jpg")
    return root


def assert_near(found, expected, tolerance=1e-4):
    """Equal up to a share of the largest value of each map: float32 sums in another order."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def randomise_norms(net):
    """Statistics and affine parameters that are not the identity, so that they are tested too."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return net
