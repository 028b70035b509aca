"""Decoding, crops and augmentation against Pillow's and torchvision's."""

import collections
import dataclasses
import io
import random
import runpy
import struct
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import at_most_mb
from PIL import Image
from scipy import stats
from torchvision import transforms as classic
from torchvision.transforms import InterpolationMode, v2

from utils.data import transforms
from utils.data.transforms import CorruptImageError, erase, open_image, pixels, resized_crop
from utils.recipe import Recipe

BROKEN = b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1"  # EXIF data, of which Pillow warns
ORIENTATION = 0x0112
# How each EXIF orientation stores an upright image (JEITA CP-3451, 4.6.4).
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(mode="RGB", size_px=(37, 29)):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size_px, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("L", {"format": "JPEG", "progressive": True}),
        ("CMYK", {"format": "JPEG"}),
        ("RGB", {"format": "JPEG", "exif": BROKEN}),
        ("P", {"format": "PNG"}),
        ("RGBA", {"format": "PNG"}),
        ("1", {"format": "PNG"}),
        *(("RGB", {"format": name}) for name in ("GIF", "WEBP", "BMP", "TIFF", "PPM")),
    ],
)
def test_what_imagenet_contains_is_decoded_as_pillow_does(tmp_path, mode, options):
    """Also broken EXIF data, and any format named .JPEG."""
    path = tmp_path / "image.JPEG"
    picture(mode).save(path, **options)
    opened = open_image(path)
    assert (opened.size, opened.width, opened.height) == ((37, 29), 37, 29)
    assert np.array_equal(pixels(opened), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_white_are_refused(tmp_path, dtype):
    """Pillow would clip both; float images are often of 0 to 1, which would be black."""
    path = tmp_path / "image.tif"
    Image.fromarray(np.ones((5, 5), dtype)).save(path)
    with pytest.raises(CorruptImageError, match="whose white is not defined"):
        pixels(open_image(path))


def turned(orientation, format, mode="RGB", size_px=(40, 30), **options):
    """An image file that a viewer shows as `picture(mode, size_px)`."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = orientation
    image = picture("L" if mode == "I;16" else mode, size_px).transpose(STORED[orientation])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
    image.save(buffer, format, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "P", "LA", "RGBA", "I;16")),
        *(("TIFF", mode) for mode in ("RGB", "I;16")),
        ("WEBP", "RGB"),
    ],
)
def test_an_image_is_upright_as_its_exif_orientation_says(orientation, format, mode):
    """As a viewer shows it, in any format and mode; Pillow turns TIFF files alone."""
    options = {"quality": 100} | ({"subsampling": 0} if format == "JPEG" and mode == "RGB" else {})
    opened = open_image("x", turned(orientation, format, mode, **options))
    assert opened.size == (40, 30)
    expected = picture("L" if mode == "I;16" else mode, (40, 30)).convert("RGB")
    difference = abs(pixels(opened).astype(int) - np.asarray(expected, int))
    assert difference.mean() < (4 if format == "WEBP" else 2)


@pytest.mark.parametrize("orientation", STORED)
def test_crops_are_of_the_upright_image(orientation):
    """Also of a JPEG file that is decoded at a quarter of its size."""
    box, size_px = (100, 300, 500, 600), (1200, 700)
    image = open_image("x", turned(orientation, "JPEG", size_px=size_px, quality=95))
    assert pixels(image, (300, 175)).shape == (175, 300, 3)
    expected = resized_crop(picture(size_px=size_px), box, 60)
    assert abs(resized_crop(image, box, 60).astype(int) - expected).mean() < 2


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path, format):
    """Pillow's own conversion makes all above 255 white."""
    path = tmp_path / "image.JPEG"
    Image.fromarray(np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)).save(path, format)
    assert pixels(open_image(path))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 156, 255)]


def saved(format, size_px=(300, 200)):
    buffer = io.BytesIO()
    picture(size_px=size_px).save(buffer, format)
    return buffer.getvalue()


def claiming(width, height):
    """A BMP file that claims a size, whatever it holds."""
    content = saved("BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


JPEG = saved("JPEG")
AT = JPEG.index(b"\xff\xc0") + 5  # height and width
BROKEN_FILES = {
    "cut short": JPEG[: len(JPEG) // 2],
    "empty": b"",
    "EPS, which is a program": saved("EPS"),
    "PNG with a broken checksum": saved("PNG")[:-300] + bytes(300),
    "above our limit and below Pillow's": claiming(13_000, 13_000),
    "JPEG of 4 billion pixels": JPEG[:AT] + struct.pack(">HH", 65_500, 65_500) + JPEG[AT + 4 :],
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named(tmp_path, name):
    path = tmp_path / "a\nb\x1b.JPEG"
    path.write_bytes(BROKEN_FILES[name])
    with at_most_mb(200), pytest.raises(CorruptImageError, match="not a readable") as error:
        transforms.decode(path)
    assert rf"{tmp_path}/a\nb\x1b.JPEG: not a readable image (" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(CorruptImageError, match=r"none\.JPEG: .*No such file"):
        open_image(tmp_path / "none.JPEG")


def test_pillow_prints_no_warnings(tmp_path):
    """In a new copy of the module, as pytest replaces Python's filters."""
    picture("CMYK").save(tmp_path / "x.JPEG", exif=BROKEN)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runpy.run_path(transforms.__file__)["decode"](tmp_path / "x.JPEG")
    assert not seen


DRAWS = 2000


def assert_same_distribution(ours, theirs, size):
    """Area, aspect and position of boxes, also in the room that they have (Kolmogorov-Smirnov)."""
    (height, width), found = size, []
    for boxes in (np.array(ours), np.array(theirs)):
        top, left, h, w = boxes.T
        assert ((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width)).all()
        room = [(top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)]
        found.append([h * w, h / w, top, left, *room])
    for one, other in zip(*found, strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-4


# In the second a part of the draws does not fit, as the image is long.
@pytest.mark.parametrize(("size", "min_area"), [((375, 500), 0.08), ((100, 240), 0.35)])
def test_crops_are_drawn_as_random_resized_crop_draws_them(size, min_area):
    torch.manual_seed(0)
    rng, blank = random.Random(0), torch.empty(1, *size)
    draw = partial(classic.RandomResizedCrop.get_params, blank, [min_area, 1.0], [3 / 4, 4 / 3])
    ours = [transforms.draw_crop(rng, *size, min_area) for _ in range(DRAWS)]
    theirs = [draw() for _ in range(DRAWS)]
    assert_same_distribution(ours, theirs, size)
    for limit in (min, max):
        extremes = [limit(w / h for _, _, h, w in boxes) for boxes in (ours, theirs)]
        assert extremes[0] == pytest.approx(extremes[1], rel=0.015)


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (7, 400), (1, 9), (1, 1)])
def test_crops_of_long_images_are_their_middle(size):
    image = torch.empty(1, *size)
    expected = classic.RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
    assert transforms.draw_crop(random.Random(0), *size, 0.5) == expected


def test_erasing_is_drawn_as_random_erasing_draws_it():
    torch.manual_seed(0)
    rng, blank = random.Random(0), torch.empty(3, 48, 40)
    white = np.full((48, 40, 3), 255, np.uint8)
    options = {"scale": (0.02, 0.33), "ratio": (0.3, 3.3), "value": [0.0]}
    theirs = [classic.RandomErasing.get_params(blank, **options)[:4] for _ in range(DRAWS)]
    ours = []
    for _ in range(DRAWS):
        erased = (erase(rng, white) == (124, 116, 104)).all(2)
        rows, columns = (erased.any(axis).nonzero()[0] for axis in (1, 0))
        ours.append((rows[0], columns[0], len(rows), len(columns)))
        assert erased.sum() == len(rows) * len(columns)
    assert_same_distribution(ours, theirs, (48, 40))
    assert (white == 255).all()


def test_erasing_leaves_something_of_every_row_and_column():
    """As torchvision's, which draws again."""
    rng = random.Random(0)
    for _ in range(200):
        kept = (erase(rng, np.full((12, 9, 3), 255, np.uint8)) == 255).all(2)
        assert kept.any(0).all()
        assert kept.any(1).all()


def photograph(photographs, size_px, index=0):
    """One of the photographs enlarged, as a JPEG file of `size_px` in memory."""
    path, buffer = sorted(photographs.glob("*/*/*.JPEG"))[index], io.BytesIO()
    image = Image.open(path).convert("RGB").resize(size_px, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=90)
    return open_image(path, buffer.getvalue())


def difference_to_pillow(image, box, crop_px):
    """Of a resized crop, to Pillow's from beginning to end, as in RandomResizedCrop."""
    top, left, height, width = box
    complete = Image.open(io.BytesIO(image.content)).convert("RGB")
    part = complete.crop((left, top, left + width, top + height))
    expected = np.asarray(part.resize((crop_px, crop_px), Image.Resampling.BILINEAR), int)
    found = resized_crop(image, box, crop_px)
    assert found.flags.c_contiguous  # otherwise all that follows takes ten times as long
    return abs(found - expected)


# In the last one crops are up to four times as large as the result.
@pytest.mark.parametrize("size_px", [(500, 375), (301, 417), (64, 50), (800, 700)])
def test_crops_are_resized_as_pillow_does(photographs, size_px):
    """Pillow and PyTorch round half a level differently at times."""
    rng = random.Random(0)
    for index in range(8):
        image = photograph(photographs, size_px, index)
        box = transforms.draw_crop(rng, *size_px[::-1], 0.08)
        difference = difference_to_pillow(image, box, 176)
        assert difference.max() <= 1
        assert difference.mean() < 0.25


@pytest.mark.parametrize(("crop_px", "scale"), [(64, 4), (64, 6), (48, 16)])
def test_large_crops_are_decoded_small(photographs, crop_px, scale):
    """As the docstring says: about two levels of 255 off on average, and few far off."""
    means, side = [], crop_px * scale
    for index in range(0, 40, 8):
        image = photograph(photographs, (side + 40, side + 31), index)
        difference = difference_to_pillow(image, (17, 23, side, side + 8), crop_px)
        means.append(difference.mean())
        assert np.percentile(difference, 99) < 32
    assert 0.3 < np.mean(means) < 2.5


@pytest.mark.parametrize("side", [769, 801, 808])
def test_large_crops_do_not_drift(side):
    """A ramp decoded at 1/8 and 1/4: libjpeg rounds an odd size up, which is no scale."""
    ramp = np.tile(np.linspace(0, 255, side), (side, 1)).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).convert("RGB").save(buffer, "JPEG", quality=98)
    left, width = 5, side - 9
    found = resized_crop(open_image("ramp", buffer.getvalue()), (5, left, width, width), 48)
    centres = left + (np.arange(48) + 0.5) * width / 48 - 0.5
    shift = (found[24, :, 0] - 255 * centres / (side - 1)) / (255 * width / 48 / (side - 1))
    assert abs(shift).max() < 0.2


@pytest.mark.parametrize("size_px", [(3000, 2), (2, 3000), (40, 30), (640, 40)])
def test_evaluation_of_lines_of_pixels_takes_their_middle(size_px):
    """As if the complete image were resized, which might not fit in memory."""
    image = picture(size_px=size_px)
    expected = v2.Compose([v2.PILToTensor(), v2.Resize(16), v2.CenterCrop(14)])(image)
    found = transforms.eval_transform(Recipe(eval_resize_px=16, eval_crop_px=14))(image)
    assert found.shape == (3, 14, 14)
    assert (found.int() - expected.int()).abs().float().mean() < 4


# Largest mean difference to torchvision's, in Pillow, in levels of 255: OpenCV's warps round
# coordinates to 1/32 of a pixel and blend with black at the border, where Pillow stops; its grey
# and its sums are rounded differently at times.
MEAN_DIFFERENCE = dict.fromkeys(transforms.OPERATIONS, 0) | {
    **dict.fromkeys(("ShearX", "ShearY", "Rotate"), 1.25),
    **dict.fromkeys(("Sharpness", "Color", "Contrast"), 0.02),
}


def magnitude_of(magnitudes, strength):
    """In float64: torchvision's float32 makes 15.999999 pixels of half of 32."""
    if magnitudes is None:
        return 0.0
    if magnitudes.is_floating_point():
        first, last = magnitudes.double()[[0, -1]].tolist()
        return first + strength * (round(last, 6) - first)
    return int(magnitudes[round(strength * 30)])


@pytest.mark.parametrize("name", transforms.OPERATIONS)
def test_operations_are_torchvisions(photographs, name):
    """At every strength, on photographs, with torchvision's own ranges."""
    reference = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    ranges, expected_sign = reference._AUGMENTATION_SPACE[name]
    magnitudes = ranges(31, 176, 160)
    signed, operation = transforms.OPERATIONS[name]
    assert signed == expected_sign
    for index in range(31):
        rgb = pixels(photograph(photographs, (176, 160), 5 * index))
        strength = (-1) ** (index * signed) * index / 30
        magnitude = magnitude_of(magnitudes, abs(strength)) * (-1 if strength < 0 else 1)
        expected = reference._apply_image_or_video_transform(
            Image.fromarray(rgb), name, magnitude, InterpolationMode.BILINEAR, {}
        )
        difference = abs(operation(rgb, strength).astype(int) - np.asarray(expected, int))
        assert difference.mean() <= MEAN_DIFFERENCE[name], strength
        if name == "Sharpness":  # Pillow leaves the border as it is
            assert difference[[0, -1]].max() == difference[:, [0, -1]].max() == 0


def test_operations_and_strengths_are_drawn_evenly(monkeypatch):
    """14 operations, 31 strengths, half of them negative where torchvision has a sign."""
    drawn, count = collections.Counter(), 14 * 31 * 100
    noted = {
        name: (signed, lambda rgb, m, name=name: drawn.update([(name, m)]))
        for name, (signed, _) in transforms.OPERATIONS.items()
    }
    monkeypatch.setattr(transforms, "OPERATIONS", noted)
    rng = random.Random(0)
    for _ in range(count):
        transforms.trivial_augment(rng, None)
    reference = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert {name for name, _ in drawn} == set(reference)
    for name, (_, signed) in reference.items():
        each = {strength: n for (other, strength), n in drawn.items() if other == name}
        assert sum(each.values()) == pytest.approx(count / 14, rel=0.1)
        assert len(each) == (61 if signed else 31)  # no strength has no sign
        for strength, n in each.items():
            assert n == pytest.approx(50 if signed and strength else 100, rel=0.6)


def test_the_recipe_turns_steps_on_and_off():
    """Half of the images are flipped and a share erased."""
    plain = Recipe(trivial_augment=False, random_erasing=0.0, train_crop_px=32, min_crop_area=1.0)
    erasing = dataclasses.replace(plain, random_erasing=0.25)
    augmenting = dataclasses.replace(plain, trivial_augment=True)
    image, seen = picture(size_px=(32, 32)), collections.Counter()
    upright = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for seed in range(400):
        steps = map(transforms.train_transform, (plain, erasing, augmenting))
        views = [transform(image, random.Random(seed)) for transform in steps]
        flipped = torch.equal(views[0], upright.flip(2))
        assert flipped or torch.equal(views[0], upright)
        assert views[0].permute(1, 2, 0).is_contiguous()  # channels_last, as batches are stacked
        erased, augmented = (not torch.equal(view, views[0]) for view in views[1:])
        seen.update(flipped=flipped, erased=erased, augmented=augmented)
    assert 160 < seen["flipped"] < 240
    assert 65 < seen["erased"] < 135
    assert seen["augmented"] > 320


def test_pixels_are_restored_from_the_networks_input():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.equal(transforms.to_pixels(normalize(images / 255)), images)
