"""One image from its file to the pixels that a network sees: decoding, crops, augmentation.

Fast where torchvision's own transforms are slow, and the same in what they give: crops are drawn
from the size in the header, a JPEG file is decoded no finer than its crop needs, and pixels stay
uint8, each laid out beside the next (channels_last).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from utils.errors import DataError, printable
from utils.recipe import Recipe

# Mean and standard deviation of ImageNet's RGB values, 0 to 255 (torchvision's, times 255).
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)

# What is read, whatever the file's name: Pillow knows others that run programs, such as EPS.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "TIFF")
# Longer than so many times their shorter side, images are evaluated by their middle: at full length
# a line of 1 x 65,000 pixels would be resized to ten gigabytes.
MAX_ASPECT = 16

cv2.setNumThreads(0)  # the loader's processes share the cores out


class CorruptImageError(DataError):
    """A file that is no readable image; the message holds its path."""


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image in a file, its header read and its pixels not yet decoded.

    Args:
        content: the file's bytes, where they do not lie at `path`, which then only names them.

    Raises:
        CorruptImageError: the file is missing or no image.
    """
    with one_clear_line(path):
        content = Path(path).read_bytes() if content is None else content
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.filename = str(path)
        return image


def pixels(image: Image.Image, enough_px: tuple[int, int] | None = None) -> Tensor:
    """The pixels of an image as RGB, uint8 `[3, H, W]`, laid out pixel by pixel (channels_last).

    Takes grayscale, palette and CMYK images, PNG under a .JPEG name and broken EXIF, all of which
    ImageNet holds. The EXIF orientation is not applied, as nobody does on ImageNet.

    Args:
        image: from `open_image`, or any of Pillow's.
        enough_px: width and height that will do: a JPEG file may come at half of its size or less,
            and not below these. None for its own size.

    Raises:
        CorruptImageError: the file is truncated or broken.
    """
    content = image.fp if isinstance(getattr(image, "fp", None), io.BytesIO) else None
    if content and image.format == "JPEG" and image.mode in ("RGB", "L"):
        # libjpeg-turbo, as in Pillow, with less around it. What it has a doubt about, truncated
        # files among them, is left to Pillow's judgement.
        width_px, height_px = enough_px or image.size
        with contextlib.suppress(ValueError):
            rgb = simplejpeg.decode_jpeg(
                content.getbuffer(), "RGB", min_width=width_px, min_height=height_px, min_factor=2
            )
            return torch.from_numpy(rgb).permute(2, 0, 1)
    with one_clear_line(getattr(image, "filename", "image")):
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return from_pillow(image.convert("RGB"))


def decode(path: str | Path) -> Image.Image:
    """The image in a file as RGB, whatever the file's name says it is; see `pixels`.

    Raises:
        CorruptImageError: the file is missing, truncated or no image.
    """
    with open_image(path) as image:
        return to_pillow(pixels(image))


def to_pillow(rgb: Tensor) -> Image.Image:
    """The Pillow image of uint8 `[3, H, W]`."""
    return Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> Tensor:
    """uint8 `[3, H, W]` of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextmanager
def one_clear_line(path: str | Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and odd palettes: the pixels are fine
            # Above 89 million pixels; ImageNet's largest image has 61 million.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise CorruptImageError(
            f"{printable(str(path))}: not a readable image (of no known format)"
        ) from error
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # Pillow's readers raise more than OSError on broken files
        reason = getattr(error, "strerror", None) or error
        raise CorruptImageError(printable(f"{path}: not a readable image ({reason})")) from error


class RandomCrop:
    """RandomResizedCrop of an image that is decoded only now, and only as finely as need be.

    Crops are drawn by torchvision's own RandomResizedCrop, from the size in the file's header.

    Args:
        crop_px: side of the square result.
        min_area: smallest crop, share of the image's area.

    Shape:
        an image to uint8 `[3, crop_px, crop_px]`.
    """

    def __init__(self, crop_px: int, min_area: float) -> None:
        self.crop_px, self.scale = crop_px, [min_area, 1.0]

    def __call__(self, image: Image.Image) -> Tensor:
        box = transforms.RandomResizedCrop.get_params(image, self.scale, ratio=[3 / 4, 4 / 3])
        return resized_crop(image, box, self.crop_px)


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], crop_px: int) -> Tensor:
    """The pixels in `box`, resized to a square: bilinear with antialiasing.

    Pillow's values to one level of 255, while the crop is less than four times as large as the
    result. Of a larger one a JPEG file is decoded at 1/2, 3/8, 1/4 or 1/8 of its size, no smaller
    than twice the result; values are off by about two levels on average (tests/test_images.py).

    Args:
        image: not yet decoded, or it is taken at its own size.
        box: top, left, height and width of the crop.

    Returns:
        uint8 `[3, crop_px, crop_px]`.
    """
    top, left, height, width = box
    shrink = max(1.0, min(height, width) / (2 * crop_px))
    rgb = pixels(image, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    if rgb.shape[1:] == (image.height, image.width):
        return resize(rgb[:, top : top + height, left : left + width], (crop_px, crop_px))
    # libjpeg scales by eighths, and rounds sizes up.
    scale = math.floor(8 * rgb.shape[2] / image.width) / 8
    scaled = tuple(scale * edge for edge in (left, top, left + width, top + height))
    # Pillow takes a box between pixels.
    return from_pillow(
        to_pillow(rgb).resize((crop_px, crop_px), Image.Resampling.BILINEAR, box=scaled)
    )


def resize(rgb: Tensor, size_px: tuple[int, int]) -> Tensor:
    """uint8 `[3, H, W]` to `size_px` (height, width), bilinear with antialiasing, in uint8."""
    batch = rgb[None].contiguous(memory_format=torch.channels_last)
    return interpolate(batch, size_px, mode="bilinear", antialias=True)[0]


def _auto_contrast(histogram: np.ndarray) -> np.ndarray:
    """The levels that Pillow's ImageOps.autocontrast gives to 0 to 255: the darkest becomes 0."""
    there = histogram.nonzero()[0]
    low, high = int(there[0]), int(there[-1])
    if high == low:
        return np.arange(256, dtype=np.uint8)
    scale = 255 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalize(histogram: np.ndarray) -> np.ndarray:
    """The levels that Pillow's ImageOps.equalize gives to 0 to 255: equally many of each."""
    there = histogram[histogram > 0]
    step = int(there[:-1].sum()) // 255
    if not step:
        return np.arange(256, dtype=np.uint8)
    darker = histogram.cumsum() - histogram
    return ((step // 2 + darker) // step).clip(0, 255).astype(np.uint8)


MAGNITUDES = 31  # TrivialAugment's levels, from none to the largest

# Inverse maps (a, b, c, d, e, f) of the "wide" space's warps (arXiv:2103.10158, table 7), by
# strength m in -1 to 1 and size: output (x, y) shows input (a x + b y + c, d x + e y + f).
WARPS: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "ShearX": lambda m, w, h: (1, 0.99 * m, 0, 0, 1, 0),
    "ShearY": lambda m, w, h: (1, 0, 0, 0.99 * m, 1, 0),
    "TranslateX": lambda m, w, h: (1, 0, -int(32 * m), 0, 1, 0),
    "TranslateY": lambda m, w, h: (1, 0, 0, 0, 1, -int(32 * m)),
    "Rotate": lambda m, w, h: _rotation(math.radians(135 * m), w / 2, h / 2),
}
# What gives every level of 0 to 255 another, whatever the image, by strength m: in -1 to 1 for the
# first, else in 0 to 1.
LEVELS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Brightness": lambda image, m: functional.adjust_brightness(image, 1 + 0.99 * m),
    "Posterize": lambda image, m: functional.posterize(image, 8 - round(6 * m)),
    "Solarize": lambda image, m: functional.solarize(image, 255 * (1 - m)),
}
# And by an image's histograms, a channel each, whatever the strength.
STRETCHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
# The others that change colours, by strength m in -1 to 1.
COLOURS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Color": lambda image, m: functional.adjust_saturation(image, 1 + 0.99 * m),
    "Contrast": lambda image, m: functional.adjust_contrast(image, 1 + 0.99 * m),
}
SIGNED = {*WARPS, *COLOURS, "Brightness", "Sharpness"}
OPERATIONS = (
    *("Identity", *WARPS, "Sharpness", "Brightness", "Color", "Contrast", "Posterize", "Solarize"),
    *STRETCHES,
)
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])


class TrivialAugment:
    """TrivialAugmentWide (arXiv:2103.10158): one operation at random, at a random strength.

    The operations, their ranges and odds are those of torchvision's TrivialAugmentWide with a
    bilinear filter. Warps and sharpening run in OpenCV, five to ten times as fast as in Pillow and
    off by its fixed-point rounding (tests/test_images.py); so do changes of levels, without any
    difference. The others are torchvision's.

    Shape:
        uint8 `[3, H, W]` to the same.
    """

    def __call__(self, rgb: Tensor) -> Tensor:
        name = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        strength = int(torch.randint(MAGNITUDES, ())) / (MAGNITUDES - 1)
        if name in SIGNED and torch.rand(()) < 0.5:
            strength = -strength
        return augment(rgb, name, strength)


def augment(rgb: Tensor, name: str, strength: float) -> Tensor:
    """One of `OPERATIONS`, at a strength of 0 to 1, or of -1 to 1 where it is in `SIGNED`."""
    if name == "Identity":
        return rgb
    if name in COLOURS:
        return from_pillow(COLOURS[name](to_pillow(rgb), strength))
    array = rgb.permute(1, 2, 0).contiguous().numpy()
    height, width = array.shape[:2]
    if name == "Sharpness":
        array = _sharpen(array, 1 + 0.99 * strength)
    elif name in LEVELS:
        array = cv2.LUT(array, np.asarray(LEVELS[name](RAMP, strength)))
    elif name in STRETCHES:
        tables = [STRETCHES[name](_histogram(array, channel)) for channel in range(3)]
        array = cv2.LUT(array, np.stack(tables, axis=-1)[None])
    else:
        array = _warp(array, WARPS[name](strength, width, height))
    return torch.from_numpy(array).permute(2, 0, 1)


def _rotation(angle: float, x: float, y: float) -> tuple[float, ...]:
    """Counter-clockwise about (x, y); the inverse map, with y pointing down."""
    c, s = math.cos(angle), math.sin(angle)
    return (c, -s, x - c * x + s * y, s, c, y - s * x - c * y)


def _warp(array: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    a, b, c, d, e, f = matrix
    # Pixels lie at half coordinates in the map, at whole ones in OpenCV.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]], dtype=np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(array, centred, array.shape[1::-1], flags=flags)


SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's


def _sharpen(array: np.ndarray, factor: float) -> np.ndarray:
    smooth = array.copy()  # Pillow leaves the border as it is
    smooth[1:-1, 1:-1] = cv2.filter2D(array, -1, SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(smooth, 1 - factor, array, factor, 0)


def _histogram(array: np.ndarray, channel: int) -> np.ndarray:
    counts = cv2.calcHist([array], [channel], None, [256], [0, 256])
    return counts[:, 0].astype(np.int64)


def flip(rgb: Tensor) -> Tensor:
    """uint8 `[3, H, W]` from right to left."""
    return torch.from_numpy(cv2.flip(rgb.permute(1, 2, 0).numpy(), 1)).permute(2, 0, 1)


class Erase:
    """RandomErasing (arXiv:1708.04896) in the mean colour: zero once normalised."""

    def __init__(self) -> None:
        self.erasing = v2.RandomErasing(p=1, value=[round(c) for c in MEAN_RGB])

    def __call__(self, rgb: Tensor) -> Tensor:
        return self.erasing.transform(rgb, self.erasing.make_params([rgb]))


def train_transform(recipe: Recipe) -> v2.Compose:
    """RandomResizedCrop, flip, TrivialAugmentWide and RandomErasing, from an image to uint8."""
    # v2.RandomHorizontalFlip and v2.RandomErasing first look for the images in what they get, which
    # takes longer than to flip one.
    steps = [RandomCrop(recipe.train_crop_px, recipe.min_crop_area), v2.RandomApply([flip], 0.5)]
    if recipe.trivial_augment:
        steps.append(TrivialAugment())
    if recipe.random_erasing:
        steps.append(v2.RandomApply([Erase()], recipe.random_erasing))
    return v2.Compose(steps)


def eval_transform(resize_px: int, crop_px: int) -> v2.Compose:
    """Shorter side to `resize_px`, then the centre crop, from an image to uint8."""
    return v2.Compose([pixels, _middle, v2.Resize(resize_px), v2.CenterCrop(crop_px)])


def _middle(rgb: Tensor) -> Tensor:
    """The image, or its middle where it is longer than MAX_ASPECT has it."""
    longest = MAX_ASPECT * min(rgb.shape[1:])
    if max(rgb.shape[1:]) <= longest:
        return rgb
    return functional.center_crop(rgb, [min(edge, longest) for edge in rgb.shape[1:]])
