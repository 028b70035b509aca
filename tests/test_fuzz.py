"""Readers of files that others made, on files that nobody means: read or refused, in one line.

A few examples of each kind, the same every time; thousands of new ones with

    pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
import pickle
import re
import struct
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLEAR_PEAK, at_most_mb
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import backbones
from backbones.weights import WeightsError, load_weights
from utils.cli import printable
from utils.data.imagenet import LayoutError, read_solution
from utils.data.transforms import FORMATS, CorruptImageError, open_image, pixels, resized_crop
from utils.training.checkpoint import CHECKPOINTED, RunError, load_checkpoint

# What is put into a good file: whatever has a meaning somewhere, and anything else.
PIECES = st.sampled_from(
    [b"", b",", b'"', b"\r", b"\n", b"\0", b"../", b"\xff\xfe", b"\xef\xbb\xbf", b"ImageId", b"n"]
    + [struct.pack("<q", n) for n in (-1, 0, 2**31 - 1, 2**40, 2**63 - 1)]
) | st.binary(max_size=12)


@st.composite
def mutated(draw, good):
    """A good file with up to six changes: cut, replaced, inserted, repeated, or one bit."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        end = draw(st.one_of(st.just(len(content)), st.integers(at, min(at + 60, len(content)))))
        how = draw(st.sampled_from(["cut", "insert", "replace", "repeat", "flip"]))
        if how == "cut":
            del content[at:end]
        elif how == "insert":
            content[at:at] = draw(PIECES)
        elif how == "replace":
            piece = draw(PIECES)
            content[at : at + len(piece)] = piece
        elif how == "repeat":
            content[at:at] = content[at:end]
        else:
            content[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


@contextmanager
def quiet_and_small(limit_mb=300):
    """What runs here takes so much memory, whatever a header asks for, and warns of nothing."""
    with at_most_mb(limit_mb), warnings.catch_warnings(record=True) as told:
        try:
            yield
        finally:
            assert [str(each.message) for each in told] == []


def assert_one_line(error, path):
    assert str(error).startswith(str(path))
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 2000


# ---- LOC_val_solution.csv ------------------------------------------------------------------------

SOLUTION = b"ImageId,PredictionString\n" + b"".join(
    b"ILSVRC2012_val_%08d,n0144353%d 1 2 30 40 \r\n" % (k, k) for k in range(4)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(st.one_of(mutated(SOLUTION), st.binary(max_size=300), st.text().map(str.encode)))
@example(SOLUTION)
@example(b"ImageId,PredictionString,ImageId\nx,n01443537,y\n")
@example(b"\xef\xbb\xbf\xef\xbb\xbf" + SOLUTION)
def test_solutions(folder, content):
    """Plain names to wnids, as they stand in the file, or LayoutError."""
    path = folder / "solution.csv"
    path.write_bytes(content)
    try:
        with quiet_and_small():
            labels = read_solution(path)
    except LayoutError as error:
        assert_one_line(error, path)
        return
    assert labels
    for image, wnid in labels.items():
        assert re.fullmatch(r"[A-Za-z0-9_-]+", image)
        assert re.fullmatch(r"n[0-9]{8}", wnid)
        assert image.encode() in content
        assert wnid.encode() in content


# ---- Darknet's .weights --------------------------------------------------------------------------

HEADER = struct.pack("<3iq", 0, 2, 5, 64)


def first_layers():
    """The first map of darknet53 needs four convolutions of its file alone."""
    return backbones.create("darknet53", out_indices=(0,), act="leaky_relu")


NET = first_layers()
COUNT = sum(tensor.numel() for key, tensor in NET.state_dict().items() if "num_batches" not in key)
NUMBERS = np.random.default_rng(0).uniform(0.1, 1, COUNT).astype("<f4")
WEIGHTS = HEADER + NUMBERS.tobytes()


@st.composite
def darknet_files(draw):
    """A good file, with another header, number or length; or no such file at all."""
    how = draw(st.sampled_from(["header", "numbers", "length", "bytes", "anything"]))
    int32, int64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
    near = st.integers(-1, 3)
    if how == "header":
        version = [draw(near | int32) for _ in range(3)]
        return struct.pack("<3iq", *version, draw(int64)) + NUMBERS.tobytes()
    if how == "numbers":
        numbers = NUMBERS.copy()
        places = st.integers(0, COUNT - 1) | st.integers(0, 127)  # 96 to 127: the first variances
        values = st.sampled_from([np.nan, np.inf, -np.inf, -1, -0.0, 1e38, 1e-45, 0])
        for place, value in draw(st.dictionaries(places, values, min_size=1)).items():
            numbers[place] = value
        return HEADER + numbers.tobytes()
    if how == "length":
        end = draw(st.integers(0, len(WEIGHTS)) | st.integers(0, 40))
        return WEIGHTS[:end] + bytes(draw(st.integers(0, 40) | st.just(4 * 1025)))
    if how == "bytes":
        return draw(mutated(WEIGHTS))
    return draw(st.binary(max_size=200))


@given(darknet_files(), st.booleans(), st.sampled_from(["x.weights", "x.conv.3"]))
@example(WEIGHTS, True, "x.weights")
@example(b"", False, "x.weights")
@example(HEADER, False, "x.weights")
def test_darknet_weights(folder, content, strict, name):
    """Loaded as they stand, or WeightsError and not a bit of the network has changed."""
    path = folder / name
    path.write_bytes(content)
    net = first_layers()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    try:
        with quiet_and_small():
            report = load_weights(net, path, strict=strict)
    except WeightsError as error:
        assert_one_line(error, path)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        return
    assert report.loaded
    assert not (strict and report.missing)
    for key, value in net.state_dict().items():
        assert value.isfinite().all()
        assert "running_var" not in key or (value >= 0).all()


# ---- images --------------------------------------------------------------------------------------


def drawn(format, mode="RGB", size_px=(24, 17), **options):
    """A small image file, of noise: nothing in it can be told from anything else."""
    noise = np.random.default_rng(2).integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


IMAGES = [drawn(format) for format in FORMATS] + [
    drawn("JPEG", "L"),
    drawn("JPEG", "CMYK"),
    drawn("JPEG", progressive=True),
    drawn("JPEG", size_px=(90, 70), quality=30, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
    drawn("PNG", "P", transparency=3),
    drawn("PNG", "RGBA"),
    drawn("PNG", "1"),
    drawn("PNG", "I;16"),
    drawn("WEBP", lossless=True),
    drawn("WEBP", "RGBA"),
    drawn("TIFF", compression="tiff_lzw"),
    drawn("TIFF", compression="jpeg"),
    drawn("TIFF", compression="tiff_deflate"),
    drawn("BMP", "P"),
]


@given(st.one_of(st.sampled_from(IMAGES).flatmap(mutated), st.binary(max_size=300)))
@example(IMAGES[0])
@example(b"")
def test_images(content):
    """Pixels of the size that the file claims, or CorruptImageError, by all ways of decoding."""
    name = "caf\udce9/x.JPEG"
    for decode in (pixels, lambda image: resized_crop(image, (0, 0, *image.size[::-1]), 4)):
        try:
            # Up to 89 million pixels, Pillow's limit: 4 bytes each, twice, and 3 bytes.
            with quiet_and_small(1100):
                image = open_image(name, content)
                found, (width, height) = decode(image), image.size
        except CorruptImageError as error:
            assert_one_line(error, printable(name))
            continue
        assert found.dtype == np.uint8
        assert found.shape == ((height, width, 3) if decode is pixels else (4, 4, 3))


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint():
    return {
        "config": {"recipe": {"epochs": 1}, "classes": ["a", "b"], "backbone": "darknet19"},
        "model": {"weight": torch.arange(12.0).view(3, 4)},
        "ema": {"n_averaged": torch.tensor(3), "module.weight": torch.zeros(3, 4)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "schedule": {"last_epoch": 3},
        "step": 3,
        "metrics": [{"epoch": 1, "train_loss": 0.5}],
        "speed": [{"epoch": 1, "train_time_s": 2.0}],
        "skipped": ["caf\udce9.JPEG: not a readable image"],
        "under_way": {"train_time_s": 0.0, "loss_sums": torch.zeros(1), "loss_count": 0},
    }


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


GOOD = saved(checkpoint())


def rezipped(change, name="data.pkl", content=GOOD):
    """The archive with one entry changed, whole and with the right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, change(data) if info.filename.endswith(name) else data)
    return buffer.getvalue()


with zipfile.ZipFile(io.BytesIO(GOOD)) as _archive:
    (PICKLE,) = (_archive.read(name) for name in _archive.namelist() if name.endswith("data.pkl"))

ENTRIES = ["data.pkl", "data/0", "version", "byteorder", "format_version", "storage_alignment"]
THINGS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(list(CHECKPOINTED)), inner)
    ),
    max_leaves=8,
)


class Trap:
    """Runs code as soon as a pickle of it is loaded without care."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        import os

        return {
            "system": (os.system, ("true",)),
            "eval": (eval, ("1",)),
            "open": (open, ("x", "w")),
        }[self.name]


@st.composite
def checkpoint_files(draw):
    """A good one, changed with or without its checksums; or a file of something else."""
    how = draw(st.sampled_from(["bytes", "pickle", "entry", "value", "thing", "trap", "anything"]))
    if how == "bytes":
        return draw(mutated(GOOD))
    if how == "pickle":
        return rezipped(lambda data: draw(mutated(data)))
    if how == "entry":
        return rezipped(lambda data: draw(st.binary(max_size=99)), draw(st.sampled_from(ENTRIES)))
    if how == "value":
        key = draw(st.sampled_from(list(CHECKPOINTED)))
        return saved(checkpoint() | {key: draw(THINGS)})
    value = (
        Trap(draw(st.sampled_from(["system", "eval", "open"]))) if how == "trap" else draw(THINGS)
    )
    if how == "anything":
        return draw(st.binary(max_size=200))
    kind = draw(st.sampled_from(["zip", "old", "pickle", "inside"]))
    if kind == "pickle":
        return pickle.dumps(value)
    if kind == "inside":
        return saved(checkpoint() | {"extra": value})
    return saved(value, _use_new_zipfile_serialization=kind == "zip")


EVENTS = []  # what code in a file would do
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.remove", "os.mkdir", "subprocess.Popen"}


def watch(event, args):
    written = event == "open" and isinstance(args[1], str) and "w" in args[1]
    named = written and not isinstance(args[0], int)  # a number is of a file that is open already
    if event in FORBIDDEN or (named and Path(args[0]) != CLEAR_PEAK):
        EVENTS.append(event)


@pytest.fixture(scope="module", autouse=True)
def _watched():
    sys.addaudithook(watch)  # for good: a hook cannot be taken away


@given(checkpoint_files())
@example(GOOD)
@example(b"")
def test_checkpoints(folder, content):
    """What every reader of a checkpoint relies on, or RunError; no code is run."""
    path = folder / "last.pt"
    path.write_bytes(content)
    EVENTS.clear()
    try:
        with quiet_and_small():
            found = load_checkpoint(path)
    except RunError as error:
        assert_one_line(error, path)
    else:
        assert isinstance(found, dict)
        assert all(isinstance(found[key], kind) for key, kind in CHECKPOINTED.items())
        assert isinstance(found["config"]["recipe"], dict)
    assert EVENTS == []
