"""Damaged files of other programs are read, or refused in one line.

A few examples of each kind, the same in every run; thousands of new ones with

    pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
import re
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import at_most_mb
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import backbones
from backbones.weights import WeightsError, load_weights
from utils.cli import printable
from utils.data.imagenet import LayoutError, read_solution
from utils.data.transforms import FORMATS, CorruptImageError, open_image, pixels, resized_crop

# Inserted into a good file: bytes with a meaning somewhere, and any others.
PIECES = st.sampled_from(
    [b"", b",", b'"', b"\r", b"\n", b"\0", b"../", b"\xff\xfe", b"\xef\xbb\xbf", b"ImageId", b"n"]
    + [struct.pack("<q", n) for n in (-1, 0, 2**31 - 1, 2**40, 2**63 - 1)]
) | st.binary(max_size=12)


@st.composite
def mutated(draw, good):
    """A good file with up to six parts, also empty ones, cut, replaced or repeated."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content)))
        end = draw(st.just(len(content)) | st.integers(at, min(at + 60, len(content))))
        content[at:end] = draw(PIECES | st.just(bytes(2 * content[at:end])))
    return bytes(content)


@contextmanager
def one_line(kind, name, limit_mb=300):
    """The block may raise one error, of one line; memory stays small whatever a header claims."""
    try:
        with at_most_mb(limit_mb):
            yield
    except kind as error:
        text = str(error)
        assert text.startswith(str(name))
        assert len(text.splitlines()) == 1
        assert len(text) < 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


SOLUTION = b"ImageId,PredictionString\n" + b"".join(
    b"ILSVRC2012_val_%08d,n0144353%d 1 2 30 40 \r\n" % (k, k) for k in range(4)
)


@given(st.one_of(mutated(SOLUTION), st.binary(max_size=300), st.text().map(str.encode)))
@example(SOLUTION)
@example(b"ImageId,PredictionString,ImageId\nx,n01443537,y\n")
@example(b"\xef\xbb\xbf\xef\xbb\xbf" + SOLUTION)
def test_solutions(folder, content):
    """Plain names to wnids, as they stand in the file, or LayoutError."""
    path = folder / "solution.csv"
    path.write_bytes(content)
    with one_line(LayoutError, path):
        labels = read_solution(path)
        assert labels
        for image, wnid in labels.items():
            assert re.fullmatch(r"[A-Za-z0-9_-]+", image)
            assert re.fullmatch(r"n[0-9]{8}", wnid)
            assert image.encode() in content
            assert wnid.encode() in content


def first_layers():
    """The first map of darknet53 needs only four convolutions of its file."""
    return backbones.create("darknet53", out_indices=(0,), act="leaky_relu")


COUNT = sum(t.numel() for key, t in first_layers().state_dict().items() if "num_ba" not in key)
NUMBERS = np.random.default_rng(0).uniform(0.1, 1, COUNT).astype("<f4")
WEIGHTS = struct.pack("<3iq", 0, 2, 5, 64) + NUMBERS.tobytes()
ODD_HEADERS = mutated(WEIGHTS[:20]).map(lambda header: header + WEIGHTS[20:])


@given(
    st.one_of(ODD_HEADERS, mutated(WEIGHTS), st.binary(max_size=200)),
    st.booleans(),
    st.sampled_from(["x.weights", "x.conv.3"]),
)
@example(WEIGHTS, True, "x.weights")
@example(b"", False, "x.weights")
@example(WEIGHTS[:20], False, "x.weights")
def test_darknet_weights(folder, content, strict, name):
    """Loaded as they stand, or WeightsError and not a bit of the network has changed."""
    path = folder / name
    path.write_bytes(content)
    net, report = first_layers(), None
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with one_line(WeightsError, path):
        report = load_weights(net, path, strict=strict)
    for key, value in net.state_dict().items():
        assert report or torch.equal(value, before[key])
        assert value.isfinite().all()
        assert "running_var" not in key or (value >= 0).all()
    assert report is None or (report.loaded and not (strict and report.missing))


def drawn(format, mode="RGB", size_px=(24, 17), **options):
    """A small image file of noise, in which every byte matters."""
    noise = np.random.default_rng(2).integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


# Turned by a quarter.
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0"
IMAGES = [drawn(format) for format in FORMATS] + [
    *(drawn("JPEG", mode) for mode in ("L", "CMYK")),
    drawn("JPEG", progressive=True),
    drawn("JPEG", size_px=(90, 70), quality=30, exif=EXIF),
    drawn("PNG", "P", transparency=3, exif=EXIF),
    *(drawn("PNG", mode) for mode in ("RGBA", "1", "I;16")),
    *(drawn("TIFF", compression=f"tiff_{how}") for how in ("lzw", "deflate")),
    drawn("TIFF", compression="jpeg"),
    drawn("WEBP", "RGBA", lossless=True),
    drawn("BMP", "P"),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as utils.data.transforms has it
@given(st.one_of(st.sampled_from(IMAGES).flatmap(mutated), st.binary(max_size=300)))
@example(IMAGES[0])
@example(b"")
def test_images(content):
    """Pixels of the size that the file claims, or CorruptImageError, in both ways of decoding."""
    name = "caf\udce9/x.JPEG"
    for decode in (pixels, lambda image: resized_crop(image, (0, 0, *image.size[::-1]), 4)):
        # Up to 89 million pixels, the limit: 4 bytes each, twice, and 3 bytes.
        with one_line(CorruptImageError, printable(name), limit_mb=1100):
            image = open_image(name, content)
            found, (width, height) = decode(image), image.size
            assert found.dtype == np.uint8
            assert found.shape == ((height, width, 3) if decode is pixels else (4, 4, 3))
