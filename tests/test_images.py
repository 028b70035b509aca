"""Decoding, crops and augmentation against Pillow's and torchvision's own."""

import collections
import dataclasses
import io
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from utils.data import transforms as images
from utils.data.folders import seeded
from utils.data.transforms import CorruptImageError
from utils.recipe import Recipe


def picture(mode="RGB", size_px=(37, 29)):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size_px, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")],
)
def test_decode_takes_what_imagenet_holds(tmp_path, mode, format):
    path = tmp_path / "image.JPEG"  # a PNG under this name too
    picture(mode).save(path, format)
    image = images.decode(path)
    assert (image.mode, image.size) == ("RGB", (37, 29))
    difference = np.asarray(image, int) - np.asarray(picture(mode).convert("RGB"), int)
    assert abs(difference).mean() < (12 if format == "JPEG" else 1)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_upper_eight(tmp_path, format):
    """Pillow's own conversion makes all above 255 white."""
    path = tmp_path / "image.JPEG"
    Image.fromarray(np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)).save(path, format)
    found = np.asarray(images.decode(path))
    assert found[0].tolist() == [[level] * 3 for level in (0, 0, 1, 156, 255)]


@pytest.mark.parametrize("size_px", [(3000, 2), (2, 3000), (40, 30), (640, 40)])
def test_evaluation_takes_lines_of_pixels_by_their_middle(size_px):
    """As the resized whole would give it, which may have no room in memory."""
    image = picture(size_px=size_px)
    expected = v2.Compose([v2.PILToTensor(), v2.Resize(16), v2.CenterCrop(14)])(image)
    found = images.eval_transform(16, 14)(image)
    assert found.shape == (3, 14, 14)
    assert (found.int() - expected.int()).abs().float().mean() < 4


def test_decode_takes_broken_exif_and_does_not_rotate(tmp_path, recwarn):
    path = tmp_path / "image.JPEG"
    picture().save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert images.decode(path).size == (37, 29)
    picture("CMYK").save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")
    assert images.decode(path).size == (37, 29)  # by Pillow, which would warn of it
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture().save(path, exif=exif)
    assert images.decode(path).size == (37, 29)
    assert not recwarn.list


def break_file(path, how):
    content = path.read_bytes()
    broken = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image\n"}
    path.write_bytes(broken[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_decode_names_the_broken_file(tmp_path, how):
    path = tmp_path / "image.JPEG"
    picture(size_px=(300, 200)).save(path)
    break_file(path, how)
    with pytest.raises(CorruptImageError, match=r"image\.JPEG: not a readable image") as error:
        images.decode(path)
    assert "\n" not in str(error.value)


def test_decode_of_photographs(photographs):
    paths = sorted(photographs.glob("*/*/*.JPEG"))
    assert len(paths) == 160
    assert {images.decode(path).size for path in paths} == {(224, 224)}


def test_decoded_photographs_are_pillows(photographs):
    """To the bit: both decoders are libjpeg-turbo's, with the same settings."""
    for path in sorted(photographs.glob("*/*/*.JPEG"))[::4]:
        expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(np.asarray(images.decode(path)), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_headers_are_read_without_pillow(tmp_path, mode, monkeypatch):
    path = tmp_path / "image.JPEG"
    picture(mode).save(path, "JPEG", progressive=mode == "L")
    expected = np.asarray(Image.open(path).convert("RGB"))
    monkeypatch.setattr(Image, "open", None)
    opened = images.open_image(path)
    assert (opened.size, opened.width, opened.height) == ((37, 29), 37, 29)
    assert np.array_equal(images.pixels(opened), expected)


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    """As Pillow's own limit has it, in the header alone: a small file may claim a gigabyte."""
    path = tmp_path / "image.JPEG"
    picture().save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptImageError, match=r"image\.JPEG: .*1073 pixels.* limit of 1000"):
        images.open_image(path)


def test_cmyk_is_converted_by_pillow(tmp_path):
    """libjpeg-turbo makes other colours of it."""
    path = tmp_path / "image.JPEG"
    picture("CMYK").save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(images.pixels(images.open_image(path)), expected)


def photograph(photographs, size_px, index=0):
    """One of the photographs enlarged, as a JPEG file of `size_px` in memory."""
    path = sorted(photographs.glob("*/*/*.JPEG"))[index]
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").resize(size_px, Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return images.open_image(path, buffer.getvalue())


def exact_crop(image, box, crop_px):
    """By Pillow from beginning to end, as RandomResizedCrop does it."""
    top, left, height, width = box
    whole = Image.open(io.BytesIO(image.content)).convert("RGB")
    part = whole.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((crop_px, crop_px), Image.Resampling.BILINEAR), int)


# Two independent draws of so many differ by more, in the largest distance of their cumulative
# distributions (Kolmogorov and Smirnov), once in ten thousand times.
DRAWS = 4000
FAR = 2.23 * (2 / DRAWS) ** 0.5


def distance(ours, theirs):
    grid = np.sort(np.concatenate([ours, theirs]))
    each = [np.searchsorted(np.sort(side), grid, "right") / DRAWS for side in (ours, theirs)]
    return abs(each[0] - each[1]).max()


def assert_alike(ours, theirs, size):
    """Boxes' area, aspect and where they lie in the room there is, one by one."""
    height, width = size
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: (b[:, 0] + 0.5) / (height - b[:, 2] + 1),
        lambda b: (b[:, 1] + 0.5) / (width - b[:, 3] + 1),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert distance(measure(ours), measure(theirs)) < FAR


# In the second a part of the draws do not fit, as the image is long.
@pytest.mark.parametrize(("size", "min_area"), [((375, 500), 0.08), ((100, 240), 0.35)])
def test_crops_are_drawn_as_random_resized_crop_draws_them(size, min_area):
    torch.manual_seed(0)
    rng, blank = random.Random(0), torch.empty(1, *size)
    draw = partial(transforms.RandomResizedCrop.get_params, blank, [min_area, 1.0], [3 / 4, 4 / 3])
    theirs = np.array([draw() for _ in range(DRAWS)])
    ours = np.array([images.draw_crop(rng, *size, min_area) for _ in range(DRAWS)])
    assert_alike(ours, theirs, size)


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (7, 400), (1, 9), (1, 1)])
def test_crops_of_long_images_are_their_middle(size):
    image = torch.empty(1, *size)
    expected = transforms.RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
    assert images.draw_crop(random.Random(0), *size, 0.5) == expected


def test_erasing_is_drawn_as_random_erasing_draws_it():
    torch.manual_seed(0)
    rng, blank = random.Random(0), torch.empty(3, 48, 40)
    white = np.full((48, 40, 3), 255, np.uint8)

    def draw():
        erased = (images.erase(rng, white) != 255).all(2)
        rows, columns = (erased.any(axis).nonzero()[0] for axis in (1, 0))
        box = (rows[0], columns[0], len(rows), len(columns))
        assert erased.sum() == box[2] * box[3]
        return box

    def reference():
        erasing = transforms.RandomErasing
        return erasing.get_params(blank, scale=(0.02, 0.33), ratio=(0.3, 3.3), value=[0.0])[:4]

    theirs = np.array([reference() for _ in range(DRAWS)])
    assert_alike(np.array([draw() for _ in range(DRAWS)]), theirs, (48, 40))
    assert (white == 255).all()


def test_erasing_leaves_something_of_every_row_and_column():
    """As torchvision's, which draws again; of a single row or column it erases nothing."""
    rng = random.Random(0)
    for shape in ((12, 9, 3), (1, 1, 3), (1, 40, 3), (40, 1, 3)):
        white = np.full(shape, 255, np.uint8)
        for _ in range(500):
            kept = (images.erase(rng, white) == 255).all(2)
            assert kept.any(0).all()
            assert kept.any(1).all()
            assert min(shape[:2]) > 1 or kept.all()


# In the last crops are up to four times as large as the result.
@pytest.mark.parametrize("size_px", [(500, 375), (301, 417), (64, 50), (800, 700)])
def test_crops_are_resized_as_pillow_does(photographs, size_px):
    """Pillow's filter and PyTorch's round half a level apart at times."""
    rng = random.Random(0)
    for index in range(20):
        image = photograph(photographs, size_px, index)
        box = images.draw_crop(rng, *size_px[::-1], 0.08)
        found = images.resized_crop(image, box, 176)
        assert found.flags.c_contiguous  # else all that follows takes ten times as long
        difference = abs(found - exact_crop(image, box, 176))
        assert difference.max() <= 1
        assert difference.mean() < 0.25


@pytest.mark.parametrize(("crop_px", "scale"), [(64, 4), (64, 6), (48, 16)])
def test_large_crops_are_decoded_small(photographs, crop_px, scale):
    """As the docstring says: about two levels of 255 off on average, and few far off."""
    means = []
    for index in range(0, 40, 4):
        side = crop_px * scale
        image = photograph(photographs, (side + 40, side + 31), index)
        box = (17, 23, side, side + 8)
        enough_px = tuple(-(-s * 2 * crop_px // side) for s in image.size)
        assert images.pixels(image, enough_px).shape[0] <= -(-image.height // 2)
        found = images.resized_crop(image, box, crop_px)
        assert found.shape == (crop_px, crop_px, 3)
        difference = abs(found - exact_crop(image, box, crop_px))
        means.append(difference.mean())
        assert means[-1] < 4
        assert np.percentile(difference, 99) < 32
    assert np.mean(means) < 2.5


def test_enough_pixels_are_kept(photographs, monkeypatch):
    """Of a crop that is decoded small, twice as many pixels a side as the result has."""
    decoded = []
    opened = Image.fromarray

    def note(rgb):
        image = opened(rgb)
        image.resize = lambda size_px, filter, box: decoded.append((rgb.shape, size_px, box)) or rgb
        return image

    sizes = np.random.default_rng(0)
    for seed in range(200):
        size_px = tuple(int(side) for side in sizes.integers(20, 700, 2))
        crop_px = int(sizes.integers(8, 100))
        image = photograph(photographs, size_px)
        box = images.draw_crop(random.Random(seed), *size_px[::-1], 0.08)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "fromarray", note)
            images.resized_crop(image, box, crop_px)
    assert len(decoded) > 20
    for (height, width, _), (crop_px, _), (left, top, right, bottom) in decoded:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert min(right - left, bottom - top) >= 2 * crop_px - 1


def test_scaled_crops_do_not_drift():
    """A ramp decoded at 1/8 and 1/4: libjpeg rounds an odd size up, which is no scale."""
    for side in (769, 801, 808):
        ramp = np.tile(np.linspace(0, 255, side), (side, 1)).round().astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(ramp).convert("RGB").save(buffer, "JPEG", quality=98)
        left, width = 5, side - 9
        image = images.open_image("ramp", buffer.getvalue())
        found = images.resized_crop(image, (5, left, width, width), 48)
        centres = left + (np.arange(48) + 0.5) * width / 48 - 0.5
        expected = 255 * centres / (side - 1)
        shift = (found[24, :, 0] - expected) / (255 * width / 48 / (side - 1))
        assert abs(shift).max() < 0.2


# Largest mean difference to torchvision's in Pillow, in levels of 255: OpenCV's warps round
# coordinates to 1/32 of a pixel, and blend with black at the border, where Pillow stops short; its
# grey and its sums round apart from Pillow's at times.
MEAN_DIFFERENCE = dict.fromkeys(images.OPERATIONS, 0) | {
    "ShearX": 1.25, "ShearY": 1.25, "Rotate": 1.25,
    "Sharpness": 0.02, "Color": 0.02, "Contrast": 0.02,
}  # fmt: skip


def magnitude_of(magnitudes, strength):
    """In float64: torchvision's float32 makes 15.999999 pixels of half of 32."""
    if magnitudes is None:
        return 0.0
    if magnitudes.is_floating_point():
        first, last = magnitudes.double()[[0, -1]].tolist()
        last = round(last, 6)  # 0.99 and such
        return first + strength * (last - first)
    return int(magnitudes[round(strength * (images.MAGNITUDES - 1))])


@pytest.mark.parametrize("name", images.OPERATIONS)
def test_operations_are_torchvisions(photographs, name):
    """At every strength, on photographs, with torchvision's own ranges."""
    reference = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    ranges, signed = reference._AUGMENTATION_SPACE[name]
    magnitudes = ranges(images.MAGNITUDES, 176, 160)
    assert (name in images.SIGNED) == signed
    for index in range(images.MAGNITUDES):
        rgb = images.pixels(photograph(photographs, (176, 160), 5 * index))
        strength = index / (images.MAGNITUDES - 1)
        for sign in (1, -1) if signed else (1,):
            magnitude = magnitude_of(magnitudes, strength)
            expected = reference._apply_image_or_video_transform(
                Image.fromarray(rgb), name, sign * magnitude, InterpolationMode.BILINEAR, {}
            )
            found = images.augment(rgb, name, sign * strength)
            difference = abs(found.astype(int) - np.asarray(expected, int))
            assert difference.mean() <= MEAN_DIFFERENCE[name], (strength, sign)
            if name == "Sharpness":  # Pillow leaves the border as it is
                assert difference[[0, -1]].max() == difference[:, [0, -1]].max() == 0


def test_operations_and_strengths_are_drawn_evenly(monkeypatch):
    drawn = collections.Counter()
    monkeypatch.setattr(images, "augment", lambda rgb, *drawing: drawn.update([drawing]))
    rng = random.Random(0)
    count = 14 * 31 * 100
    for _ in range(count):
        images.trivial_augment(rng, None)
    reference = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert {name for name, _ in drawn} == set(reference)
    for name, (_, signed) in reference.items():
        each = {strength: n for (other, strength), n in drawn.items() if other == name}
        assert sum(each.values()) == pytest.approx(count / 14, rel=0.1)
        assert len(each) == (61 if signed else 31)  # no strength has no sign
        levels = collections.Counter()
        for strength, n in each.items():
            levels[round(abs(strength) * 30)] += n
        assert all(n == pytest.approx(100, rel=0.5) for n in levels.values())
        negative = sum(n for strength, n in each.items() if strength < 0)
        assert not signed or negative == pytest.approx(count / 14 / 2 * 30 / 31, rel=0.1)


def test_colours_leave_a_flat_grey_as_it_is():
    rgb = np.full((20, 24, 3), 90, dtype=np.uint8)
    for name in (*images.COLOURS, "AutoContrast", "Equalize"):
        assert np.array_equal(images.augment(rgb, name, 0.5), rgb)


def test_operations_have_names():
    with pytest.raises(KeyError, match="Sharpnes"):
        images.augment(np.zeros((4, 4, 3), np.uint8), "Sharpnes", 0.5)


def test_erasing_leaves_the_mean_colour():
    recipe = Recipe(trivial_augment=False, random_erasing=1.0, train_crop_px=32)
    with seeded(0):
        image = images.train_transform(recipe)(Image.new("RGB", (40, 40), (255, 0, 0)))
    colours, counts = image.flatten(1).unique(dim=1, return_counts=True)
    assert colours.T.tolist() == [[124, 116, 104], [255, 0, 0]]
    assert 0.02 <= counts[0] / counts.sum() <= 0.4


def test_recipes_turn_steps_on_and_off():
    """Half of the images are flipped and a share erased, by PyTorch's seed alone."""
    plain = Recipe(trivial_augment=False, random_erasing=0.0, train_crop_px=32, min_crop_area=1.0)
    image = picture(size_px=(32, 32))
    upright = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    seen = collections.Counter()
    erasing = dataclasses.replace(plain, random_erasing=0.25)
    for seed in range(400):
        with seeded(seed):
            view = images.train_transform(plain)(image)
        with seeded(seed):
            again = images.train_transform(erasing)(image)
        flipped = torch.equal(view, upright.flip(2))
        assert flipped or torch.equal(view, upright)
        assert view.permute(1, 2, 0).is_contiguous()  # channels_last, as batches are stacked
        seen.update(flipped=flipped, erased=not torch.equal(view, again))
    assert 160 < seen["flipped"] < 240
    assert 65 < seen["erased"] < 135
    augmented = images.train_transform(dataclasses.replace(plain, trivial_augment=True))
    views = [augmented(image) for _ in range(20)]
    assert sum(not any(torch.equal(v, u) for u in (upright, upright.flip(2))) for v in views) > 10


@pytest.mark.parametrize("name", images.STRETCHES)
def test_levels_of_odd_histograms(name):
    """One level, two, few pixels: what Pillow makes of them."""
    rng = np.random.default_rng(0)
    for high, size_px in ((1, (9, 7)), (2, (40, 30)), (3, (2, 2)), (256, (5, 4)), (30, (64, 48))):
        array = rng.integers(0, high, (*size_px, 3), dtype=np.uint8) + np.uint8(90 * (high < 99))
        image = Image.fromarray(array)
        expected = {"AutoContrast": ImageOps.autocontrast, "Equalize": ImageOps.equalize}[name]
        assert np.array_equal(images.augment(array, name, 0.0), np.asarray(expected(image)))
