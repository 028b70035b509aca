"""One image from its file to the pixels that a network sees: decoding, crops, augmentation.

Fast where torchvision's own transforms are slow, and the same in what they give: crops are drawn
from the size in the header, a JPEG file is decoded no finer than its crop needs, and pixels are
uint8 `[H, W, 3]`, as OpenCV and Pillow have them, up to a transform's last step, a tensor in
channels_last. Calls of PyTorch are few: between two images a small one took 50 us, not 5.
"""

import contextlib
import io
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from utils.cli import DataError, printable
from utils.recipe import Recipe

# Mean and standard deviation of ImageNet's RGB values, 0 to 255 (torchvision's, times 255).
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)

# What is read, whatever the file's name: Pillow knows others that run programs, such as EPS.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM", "TIFF")
# Pillow's bound of what it opens without a warning, 89 million; ImageNet's largest has 61 million.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
# Longer than so many times their shorter side, images are evaluated by their middle: at full length
# a line of 1 x 65,000 pixels would be resized to ten gigabytes.
MAX_ASPECT = 16

cv2.setNumThreads(0)  # the loader's processes and threads share the cores out
_WARNINGS = threading.Lock()  # which warnings are shown is one list for all threads


class CorruptImageError(DataError):
    """A file that is no readable image; the message holds its path."""


class Jpeg:
    """A JPEG file in memory, its header read, which Pillow takes ten times as long for.

    Args:
        content: the file's bytes.
        path: what names it.

    Raises:
        ValueError: for Pillow to judge: not a file that libjpeg-turbo reads, one of CMYK, whose
            colours it makes others of, or of too many pixels.
    """

    def __init__(self, content: bytes, path: str | Path) -> None:
        self.content, self.path = content, path
        self.height, self.width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray", "RGB"):
            raise ValueError(colours)
        if self.height * self.width > MAX_PIXELS:
            raise ValueError("too many pixels")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, as Pillow has it."""
        return self.width, self.height


# An image whose header was read, and its pixels not yet decoded.
OpenImage = Jpeg | Image.Image
# To uint8 `[3, H, W]` in channels_last, by the image's own generator of random numbers; without one
# a generator that PyTorch's seeds.
Transform = Callable[..., Tensor]


def open_image(path: str | Path, content: bytes | None = None) -> OpenImage:
    """The image in a file.

    Args:
        content: the file's bytes, where they do not lie at `path`, which then only names them.

    Raises:
        CorruptImageError: the file is missing or no image.
    """
    if content is None:
        with one_clear_line(path):
            content = Path(path).read_bytes()
    with contextlib.suppress(ValueError):
        return Jpeg(content, path)
    return _open_in_pillow(path, content)


def _open_in_pillow(path: str | Path, content: bytes) -> Image.Image:
    with one_clear_line(path), _few_warnings():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.filename = str(path)
        return image


def pixels(image: OpenImage, enough_px: tuple[int, int] | None = None) -> np.ndarray:
    """The pixels of an image as RGB, uint8 `[H, W, 3]`.

    Takes grayscale, palette and CMYK images, PNG under a .JPEG name and broken EXIF, all of which
    ImageNet holds. The EXIF orientation is not applied, as nobody does on ImageNet.

    Args:
        image: from `open_image`, or any of Pillow's.
        enough_px: width and height that will do: a JPEG file may come at half of its size or less,
            and not below these. None for its own size.

    Raises:
        CorruptImageError: the file is truncated or broken.
    """
    if isinstance(image, Jpeg):
        # libjpeg-turbo, as in Pillow, with less around it. What it has a doubt about, truncated
        # files among them, is left to Pillow's judgement.
        width_px, height_px = enough_px or image.size
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                image.content, "RGB", min_width=width_px, min_height=height_px, min_factor=2
            )
        image = _open_in_pillow(image.path, image.content)
    with one_clear_line(getattr(image, "filename", "image")), _few_warnings():
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def decode(path: str | Path) -> Image.Image:
    """The image in a file as RGB, whatever the file's name says it is; see `pixels`.

    Raises:
        CorruptImageError: the file is missing, truncated or no image.
    """
    return Image.fromarray(pixels(open_image(path)))


def as_tensor(rgb: np.ndarray) -> Tensor:
    """uint8 `[3, H, W]` in channels_last of `[H, W, 3]`, in the same memory."""
    return torch.from_numpy(rgb).permute(2, 0, 1)


@contextmanager
def _few_warnings() -> Iterator[None]:
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and odd palettes: the pixels are fine
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # above MAX_PIXELS
        yield


@contextmanager
def one_clear_line(path: str | Path) -> Iterator[None]:
    try:
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


def _random_box(
    rng: random.Random,
    height: int,
    width: int,
    areas: tuple[float, float],
    aspects: tuple[float, float],
    whole_sides: bool,
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a box in an image; None if ten do not fit.

    Args:
        areas: smallest and largest, shares of the whole.
        aspects: smallest and largest ratio of width to height.
        whole_sides: whether a box may be as high or as wide as the image.
    """
    highest, widest = (height, width) if whole_sides else (height - 1, width - 1)
    for _ in range(10):
        area = height * width * rng.uniform(*areas)
        aspect = math.exp(rng.uniform(*map(math.log, aspects)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= highest and 0 < w <= widest:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return None


def draw_crop(
    rng: random.Random, height: int, width: int, min_area: float
) -> tuple[int, int, int, int]:
    """The box of a RandomResizedCrop (arXiv:1409.4842), drawn as torchvision draws it.

    Args:
        height, width: of the image.
        min_area: smallest crop, share of the image's area.

    Returns:
        top, left, height and width.
    """
    aspects = (3 / 4, 4 / 3)
    if box := _random_box(rng, height, width, (min_area, 1.0), aspects, whole_sides=True):
        return box
    # A long image: its middle.
    h, w = min(height, round(width / aspects[0])), min(width, round(height * aspects[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: OpenImage, box: tuple[int, int, int, int], crop_px: int) -> np.ndarray:
    """The pixels in `box`, resized to a square: bilinear with antialiasing.

    Pillow's values to one level of 255, while the crop is less than four times as large as the
    result. Of a larger one a JPEG file is decoded at 1/2, 3/8, 1/4 or 1/8 of its size, no smaller
    than twice the result; values are off by about two levels on average (tests/test_images.py).

    Args:
        image: not yet decoded, or it is taken at its own size.
        box: top, left, height and width of the crop.

    Returns:
        uint8 `[crop_px, crop_px, 3]`.
    """
    top, left, height, width = box
    shrink = max(1.0, min(height, width) / (2 * crop_px))
    rgb = pixels(image, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    if rgb.shape[:2] == (image.height, image.width):
        # numpy copies faster than PyTorch would.
        crop = np.ascontiguousarray(rgb[top : top + height, left : left + width])
        batch = torch.from_numpy(crop).view(1, height, width, 3).permute(0, 3, 1, 2)
        batch = interpolate(batch, (crop_px, crop_px), mode="bilinear", antialias=True)
        return batch.permute(0, 2, 3, 1).numpy()[0]
    # libjpeg scales by eighths, and rounds sizes up.
    scale = math.floor(8 * rgb.shape[1] / image.width) / 8
    scaled = tuple(scale * edge for edge in (left, top, left + width, top + height))
    # Pillow takes a box between pixels.
    bilinear = Image.Resampling.BILINEAR
    return np.array(Image.fromarray(rgb).resize((crop_px, crop_px), bilinear, box=scaled))


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
LEVELS: dict[str, Callable[[float], np.ndarray]] = {
    "Brightness": lambda m: _blend_levels(0, 1 + 0.99 * m),
    "Posterize": lambda m: RAMP & (256 - 2 ** round(6 * m)),
    "Solarize": lambda m: np.where(255 * (1 - m) > RAMP, RAMP, 255 - RAMP),
}
# And by an image's histograms, a channel each, whatever the strength.
STRETCHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
# Between the image and a grey one, by strength m in -1 to 1.
COLOURS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "Color": lambda rgb, m: _blend(_grey(rgb), rgb, 1 + 0.99 * m),
    "Contrast": lambda rgb, m: _contrast(rgb, 1 + 0.99 * m),
    "Sharpness": lambda rgb, m: _blend(_smooth(rgb), rgb, 1 + 0.99 * m),
}
SIGNED = {*WARPS, *COLOURS, "Brightness"}
OPERATIONS = ("Identity", *WARPS, *COLOURS, *LEVELS, *STRETCHES)
RAMP = np.arange(256)


def trivial_augment(rng: random.Random, rgb: np.ndarray) -> np.ndarray:
    """TrivialAugmentWide (arXiv:2103.10158): one operation at random, at a random strength.

    The operations, their ranges and odds are those of torchvision's TrivialAugmentWide with a
    bilinear filter. In OpenCV warps and sharpening take a fifth of Pillow's time, the others more
    of it. At the same strength pixels are Pillow's, but that warps round coordinates to 1/32 of a
    pixel and blend with black at the border, and greys are rounded otherwise; torchvision rounds
    strengths to float32, which moves a threshold or a shift by one at times (tests/test_images.py).

    Shape:
        uint8 `[H, W, 3]` to the same.
    """
    name = rng.choice(OPERATIONS)
    strength = rng.randrange(MAGNITUDES) / (MAGNITUDES - 1)
    if name in SIGNED and rng.random() < 0.5:
        strength = -strength
    return augment(rgb, name, strength)


def augment(rgb: np.ndarray, name: str, strength: float) -> np.ndarray:
    """One of `OPERATIONS`, at a strength of 0 to 1, or of -1 to 1 where it is in `SIGNED`."""
    if name == "Identity":
        return rgb
    if name in WARPS:
        height, width = rgb.shape[:2]
        return _warp(rgb, WARPS[name](strength, width, height))
    if name in COLOURS:
        return COLOURS[name](rgb, strength)
    if name in LEVELS:
        return cv2.LUT(rgb, LEVELS[name](strength).astype(np.uint8))
    tables = [STRETCHES[name](_histogram(rgb, channel)) for channel in range(3)]
    return cv2.LUT(rgb, np.stack(tables, axis=-1)[None])


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


def _blend_levels(from_level: int, factor: float) -> np.ndarray:
    """The levels of 0 to 255 moved away from one of them; Pillow cuts fractions off."""
    return (from_level + factor * (RAMP - from_level).astype(np.float32)).clip(0, 255)


def _blend(other: np.ndarray, rgb: np.ndarray, factor: float) -> np.ndarray:
    """other + factor (rgb - other)."""
    # Down to the next level, as Pillow has it; OpenCV would take the nearest.
    return cv2.addWeighted(other, 1 - factor, rgb, factor, -0.499)


def _grey(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _contrast(rgb: np.ndarray, factor: float) -> np.ndarray:
    mean = int(cv2.mean(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.LUT(rgb, _blend_levels(mean, factor).astype(np.uint8))


SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's


def _smooth(rgb: np.ndarray) -> np.ndarray:
    smooth = rgb.copy()  # Pillow leaves the border as it is
    smooth[1:-1, 1:-1] = cv2.filter2D(rgb, -1, SMOOTH)[1:-1, 1:-1]
    return smooth


def _histogram(rgb: np.ndarray, channel: int) -> np.ndarray:
    counts = cv2.calcHist([rgb], [channel], None, [256], [0, 256])
    return counts[:, 0].astype(np.int64)


def erase(rng: random.Random, rgb: np.ndarray) -> np.ndarray:
    """RandomErasing (arXiv:1708.04896) in the mean colour, about zero once normalised.

    Boxes are drawn as torchvision's RandomErasing draws them: 2 to 33 % of the image, up to 3.3
    times as high as wide or as wide as high.
    """
    areas, aspects = (0.02, 0.33), (1 / 3.3, 1 / 0.3)
    if box := _random_box(rng, *rgb.shape[:2], areas, aspects, whole_sides=False):
        top, left, height, width = box
        rgb = rgb.copy()
        rgb[top : top + height, left : left + width] = [round(c) for c in MEAN_RGB]
    return rgb


def train_transform(recipe: Recipe) -> Transform:
    """RandomResizedCrop, flip, TrivialAugmentWide and RandomErasing, from an image to uint8."""
    return partial(_train, recipe)


def _train(recipe: Recipe, image: OpenImage, rng: random.Random | None = None) -> Tensor:
    rng = rng or random.Random(int(torch.randint(2**62, ())))
    box = draw_crop(rng, image.height, image.width, recipe.min_crop_area)
    rgb = resized_crop(image, box, recipe.train_crop_px)
    if rng.random() < 0.5:
        rgb = cv2.flip(rgb, 1)
    if recipe.trivial_augment:
        rgb = trivial_augment(rng, rgb)
    if rng.random() < recipe.random_erasing:
        rgb = erase(rng, rgb)
    return as_tensor(rgb)


def eval_transform(resize_px: int, crop_px: int) -> Transform:
    """Shorter side to `resize_px`, then the centre crop, from an image to uint8."""
    return partial(_evaluate, resize_px, crop_px)


def _evaluate(
    resize_px: int, crop_px: int, image: OpenImage, rng: random.Random | None = None
) -> Tensor:
    """Nothing in it is random."""
    rgb = functional.resize(_middle(as_tensor(pixels(image))), [resize_px])
    return functional.center_crop(rgb, [crop_px])


def _middle(rgb: Tensor) -> Tensor:
    """The image, or its middle where it is longer than MAX_ASPECT has it."""
    longest = MAX_ASPECT * min(rgb.shape[1:])
    if max(rgb.shape[1:]) <= longest:
        return rgb
    return functional.center_crop(rgb, [min(edge, longest) for edge in rgb.shape[1:]])
