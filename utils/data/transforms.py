"""One image, from its file to the pixels that a network sees: decoding, crops, augmentation.

Twice as fast as torchvision's transforms, with the same results: crops are drawn from the size in
the header, a JPEG file is decoded no finer than its crop needs, and pixels are uint8 `[H, W, 3]`
arrays for OpenCV until the last step returns a channels_last tensor. PyTorch is avoided in
between: a call on a small image takes 50 us where OpenCV takes 5.
"""

import contextlib
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode, functional

from utils.cli import DataError, printable
from utils.recipe import Recipe

# Mean and standard deviation of ImageNet's RGB values, 0 to 255 (torchvision's, times 255).
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)
# Accepted formats, whatever the file's name: Pillow knows others that run programs, such as EPS.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "TIFF")
# EXIF orientation -> OpenCV's flip code, after the transposition of those above 4.
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million; ImageNet's largest image has 61 million
# Evaluation crops what is longer than so many times its shorter side: resized, a line of
# 1 x 65,000 pixels would take ten gigabytes.
MAX_ASPECT = 16

Box = tuple[int, int, int, int]  # top, left, height and width, pixels

cv2.setNumThreads(0)  # the loader's threads and processes share the cores
warnings.filterwarnings("ignore", module="PIL")  # palettes, broken EXIF: the pixels are fine


class CorruptImageError(DataError):
    """A file that is not a readable image; the message names its path."""


class Jpeg:
    """A JPEG file in memory with its header parsed, ten times as fast as Pillow does it.

    Attributes:
        orientation: of EXIF, 1 (upright) to 8.
        width, height, size: pixels of the upright image.

    Raises:
        ValueError: not a JPEG file, too large, or CMYK, which libjpeg-turbo converts unlike Pillow.
    """

    def __init__(self, content: bytes, filename: str) -> None:
        self.content, self.filename = content, filename
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray", "RGB") or width * height > MAX_PIXELS:
            raise ValueError
        self.orientation = _orientation(_find_exif(content))
        self.size = (height, width) if self.orientation > 4 else (width, height)
        self.width, self.height = self.size


def _find_exif(content: bytes) -> bytes:
    """The EXIF data of a JPEG file, in one of its first segments; takes a microsecond."""
    at = 2
    while b"\xff\xe0" <= content[at : at + 2] < b"\xff\xff":  # APPn, comments
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        if content[at + 4 : at + 10] == b"Exif\0\0":
            return content[at + 4 : end]
        at = end
    return b""


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 (upright) to 8; broken data count as upright."""
    if exif:  # parsed in 20 microseconds
        with contextlib.suppress(Exception):  # Pillow raises many types
            parsed = Image.Exif()
            parsed.load(exif)
            if parsed[ExifTags.Base.Orientation] in range(1, 9):
                return int(parsed[ExifTags.Base.Orientation])
    return 1


# An image whose header was read: a JPEG file that is not decoded yet, or upright RGB pixels.
OpenImage = Jpeg | Image.Image
# From an OpenImage and, for training, a random.Random to uint8 `[3, H, W]` in channels_last.
Transform = Callable[..., Tensor]


def open_image(path: str | Path, content: bytes | None = None) -> OpenImage:
    """Reads an image file, or its `content`, and parses the header.

    Raises:
        CorruptImageError: the file is missing or not an image.
    """
    with _readable(path):
        content = Path(path).read_bytes() if content is None else content
        try:
            return Jpeg(content, str(path))
        except ValueError:
            image = Image.fromarray(_decode(content))
            image.filename = str(path)
            return image


def pixels(image: OpenImage, min_px: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes an image of any mode to RGB, uint8 `[H, W, 3]`.

    The EXIF orientation is applied, as in viewers and unlike torchvision's ImageFolder, and broken
    EXIF data are ignored; transparency is ignored, as in ImageFolder and unlike viewers.

    Args:
        min_px: a sufficient width and height: a JPEG file may be decoded at half of its size or
            less, but not below these. None for the full size.

    Raises:
        CorruptImageError: the file is truncated or broken.
    """
    with _readable(getattr(image, "filename", "image")):
        if isinstance(image, Jpeg):
            width_px, height_px = min_px or image.size
            if image.orientation > 4:
                width_px, height_px = height_px, width_px
            # Pillow uses the same library with more overhead. It judges what simplejpeg rejects.
            with contextlib.suppress(ValueError):
                rgb = simplejpeg.decode_jpeg(
                    image.content, "RGB", min_width=width_px, min_height=height_px, min_factor=2
                )
                return _turn(rgb, image.orientation)
            return _decode(image.content)
        return np.array(image.convert("RGB"))


def _decode(content: bytes) -> np.ndarray:
    """The upright pixels of an image file, by Pillow."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, limit of {MAX_PIXELS}")
    image.load()  # turns TIFF files; only then is EXIF data behind the pixels of a PNG file known
    orientation = _orientation(image.info.get("exif", b""))
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ValueError(f"32-bit pixels of mode {image.mode}, whose white is not defined")
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return _turn(np.array(image.convert("RGB")), orientation)


def _turn(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels from those that are stored in an EXIF orientation."""
    rgb = cv2.transpose(rgb) if orientation > 4 else rgb
    return cv2.flip(rgb, FLIPS[orientation]) if orientation in FLIPS else rgb


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turns errors into CorruptImageError: Pillow raises more than OSError for broken files."""
    try:
        yield
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):  # its message holds an address in memory
            reason = "unknown format"
        raise CorruptImageError(printable(f"{path}: not a readable image ({reason})")) from error


def decode(path: str | Path) -> Image.Image:
    """An image file as an RGB image of Pillow's; see `pixels`."""
    return Image.fromarray(pixels(open_image(path)))


def as_tensor(rgb: np.ndarray) -> Tensor:
    """uint8 `[3, H, W]` in channels_last that shares the memory of `[H, W, 3]`."""
    return torch.from_numpy(rgb).permute(2, 0, 1)


def to_pixels(images: Tensor) -> Tensor:
    """Converts normalised images `[N, 3, H, W]`, a network's input, back to uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    return (images.cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)


def _random_box(
    rng: random.Random,
    size: tuple[int, int],
    areas: tuple[float, float],
    aspects: tuple[float, float],
    margin: int = 0,
) -> Box | None:
    """Draws a box as torchvision does; None if ten draws do not fit.

    Args:
        size: height and width of the image.
        areas, aspects: ranges of the box's share of the image and of width to height.
        margin: pixels by which the box must be smaller than the image.
    """
    height, width = size
    for _ in range(10):
        area = height * width * rng.uniform(*areas)
        aspect = math.exp(rng.uniform(*map(math.log, aspects)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height - margin and 0 < w <= width - margin:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


def draw_crop(rng: random.Random, height: int, width: int, min_area: float) -> Box:
    """Draws the box of a RandomResizedCrop (arXiv:1409.4842), at least `min_area` of the image."""
    if box := _random_box(rng, (height, width), (min_area, 1.0), (3 / 4, 4 / 3)):
        return box
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: OpenImage, box: Box, crop_px: int) -> np.ndarray:
    """Decodes the pixels in `box`, resized to a square: bilinear with antialiasing.

    Equal to Pillow's to one level of 255 if the crop is less than four times as large as the
    result. Of a larger one a JPEG file is decoded at 1/2, 3/8, 1/4 or 1/8 of its size, at least
    twice the result; values differ by about two levels (tests/test_transforms.py).

    Returns:
        uint8 `[crop_px, crop_px, 3]`.
    """
    top, left, height, width = box
    shrink = max(1.0, min(height, width) / (2 * crop_px))
    rgb = pixels(image, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    if rgb.shape[:2] == (image.height, image.width):
        crop = np.ascontiguousarray(rgb[top : top + height, left : left + width])
        batch = torch.from_numpy(crop).view(1, height, width, 3).permute(0, 3, 1, 2)
        batch = interpolate(batch, (crop_px, crop_px), mode="bilinear", antialias=True)
        return batch.permute(0, 2, 3, 1).numpy()[0]
    scale = math.floor(8 * rgb.shape[1] / image.width) / 8  # libjpeg rounds sizes up
    edges = tuple(scale * edge for edge in (left, top, left + width, top + height))
    bilinear = Image.Resampling.BILINEAR  # in Pillow, which accepts a box between pixels
    return np.array(Image.fromarray(rgb).resize((crop_px, crop_px), bilinear, box=edges))


def _warp(rgb: np.ndarray, *matrix: float) -> np.ndarray:
    """Output (x, y) shows input (a x + b y + c, d x + e y + f)."""
    a, b, c, d, e, f = matrix
    # In this matrix pixel centres have half coordinates, in OpenCV integer ones.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(rgb, centred, rgb.shape[1::-1], flags=flags)


def _rotate(rgb: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates counter-clockwise about the centre."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = rgb.shape[1] / 2, rgb.shape[0] / 2
    return _warp(rgb, c, -s, x - c * x + s * y, s, c, y - s * x - c * y)


def _blend(other: np.ndarray, rgb: np.ndarray, strength: float) -> np.ndarray:
    """Moves an image away from another one, or towards it."""
    factor = 1 + 0.99 * strength
    # OpenCV rounds to nearest, Pillow down; before, values are multiples of 0.001.
    return cv2.addWeighted(other, 1 - factor, rgb, factor, -0.4995)


def _grey(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _mean_grey(rgb: np.ndarray) -> np.ndarray:
    return np.full_like(rgb, cv2.mean(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))[0] + 0.5)


def _smooth(rgb: np.ndarray) -> np.ndarray:
    """Pillow's smoothing filter, which leaves the border as it is."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
    smooth = rgb.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(rgb, -1, kernel)[1:-1, 1:-1]
    return smooth


LEVELS = np.arange(256, dtype=np.uint8)
# TrivialAugment's "wide" space (arXiv:2103.10158, table 7): whether the strength m of 0 to 1 may be
# negative, and the operation on uint8 `[H, W, 3]`.
OPERATIONS: dict[str, tuple[bool, Callable[[np.ndarray, float], np.ndarray]]] = {
    "Identity": (False, lambda rgb, m: rgb),
    "ShearX": (True, lambda rgb, m: _warp(rgb, 1, 0.99 * m, 0, 0, 1, 0)),
    "ShearY": (True, lambda rgb, m: _warp(rgb, 1, 0, 0, 0.99 * m, 1, 0)),
    "TranslateX": (True, lambda rgb, m: _warp(rgb, 1, 0, -int(32 * m), 0, 1, 0)),
    "TranslateY": (True, lambda rgb, m: _warp(rgb, 1, 0, 0, 0, 1, -int(32 * m))),
    "Rotate": (True, lambda rgb, m: _rotate(rgb, 135 * m)),
    "Color": (True, lambda rgb, m: _blend(_grey(rgb), rgb, m)),
    "Contrast": (True, lambda rgb, m: _blend(_mean_grey(rgb), rgb, m)),
    "Sharpness": (True, lambda rgb, m: _blend(_smooth(rgb), rgb, m)),
    "Brightness": (True, lambda rgb, m: _blend(np.zeros_like(rgb), rgb, m)),
    "Posterize": (False, lambda rgb, m: rgb & np.uint8(256 - 2 ** round(6 * m))),
    "Solarize": (
        False,
        lambda rgb, m: cv2.LUT(rgb, np.where(255 * (1 - m) > LEVELS, LEVELS, 255 - LEVELS)),
    ),
    "AutoContrast": (False, lambda rgb, m: np.array(ImageOps.autocontrast(Image.fromarray(rgb)))),
    "Equalize": (False, lambda rgb, m: np.array(ImageOps.equalize(Image.fromarray(rgb)))),
}


def trivial_augment(rng: random.Random, rgb: np.ndarray) -> np.ndarray:
    """TrivialAugmentWide (arXiv:2103.10158): one random operation at one of 31 strengths.

    Ranges, odds and pixels are those of torchvision's TrivialAugmentWide with bilinear
    interpolation, except that warps round coordinates to 1/32 of a pixel and blend with black at
    the border, and that blends are rounded differently at times (tests/test_transforms.py).
    """
    signed, operation = OPERATIONS[rng.choice(list(OPERATIONS))]
    strength = rng.randrange(31) / 30
    return operation(rgb, -strength if signed and rng.random() < 0.5 else strength)


def erase(rng: random.Random, rgb: np.ndarray, colour: Sequence[float] = MEAN_RGB) -> np.ndarray:
    """RandomErasing (arXiv:1708.04896) with one colour, drawn as torchvision draws it."""
    if box := _random_box(rng, rgb.shape[:2], (0.02, 0.33), (1 / 3.3, 1 / 0.3), margin=1):
        top, left, height, width = box
        rgb = rgb.copy()
        rgb[top : top + height, left : left + width] = np.round(colour)
    return rgb


def train_transform(recipe: Recipe) -> Transform:
    """RandomResizedCrop, flip, TrivialAugmentWide and RandomErasing, as the recipe says."""
    return partial(_train, recipe)


def _train(recipe: Recipe, image: OpenImage, rng: random.Random) -> Tensor:
    box = draw_crop(rng, image.height, image.width, recipe.min_crop_area)
    rgb = resized_crop(image, box, recipe.train_crop_px)
    if rng.random() < 0.5:
        rgb = cv2.flip(rgb, 1)
    if recipe.trivial_augment:
        rgb = trivial_augment(rng, rgb)
    if rng.random() < recipe.random_erasing:
        rgb = erase(rng, rgb, [255 * value for value in recipe.mean])
    return as_tensor(rgb)


def eval_transform(recipe: Recipe) -> Transform:
    """Resizes the shorter side and crops the centre, as the recipe says; nothing is random."""
    return partial(_evaluate, recipe)


def _evaluate(recipe: Recipe, image: OpenImage, rng: random.Random | None = None) -> Tensor:
    rgb = as_tensor(pixels(image))
    longest_px = MAX_ASPECT * min(rgb.shape[1:])
    rgb = functional.center_crop(rgb, [min(edge_px, longest_px) for edge_px in rgb.shape[1:]])
    rgb = functional.resize(
        rgb, [recipe.eval_resize_px], InterpolationMode(recipe.eval_interpolation)
    )
    return functional.center_crop(rgb, [recipe.eval_crop_px])
