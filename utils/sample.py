"""Draws the embedded sample: the ImageNet download in small, from ten kinds of simple objects.

`draw` writes real JPEG files in exactly the shape of the Kaggle download (class folders under
`train/`, a flat `val/`, `LOC_val_solution.csv`, `LOC_synset_mapping.txt`), so that everything made
for ImageNet runs unchanged without a download. One object per image; its class is its outline and
nothing else: position, scale, rotation, colour, texture, clutter, occlusion, blur, noise and JPEG
quality come from the same distribution for every class. No class depends on handedness, so flips,
rotations and inverted colours keep the label.

    python -m utils.sample data/sample
"""

import argparse
import colorsys
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

VERSION = 1  # of the drawing: raise it with any change that changes the bytes
MARKER, UNFINISHED = "sample.json", "sample.unfinished.json"
SUPERSAMPLING = 2  # canvas pixels per image pixel, for smooth edges
GRAYSCALE_SHARE = 0.03
CMYK_INDEX = 5  # this image of either split is CMYK: ImageNet has a few, and decoders trip on them

Box = tuple[int, int, int, int]


def _closed(radii: np.ndarray | list[float]) -> np.ndarray:
    """Points [n, 2] of a closed outline around the origin, one per radius, at equal angles."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


def _cross(arm: float = 0.32) -> np.ndarray:
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2.5], axis=1) / 16


def _spoke_gaps(spokes: int = 5, inner: float = 0.22, outer: float = 0.74) -> list[np.ndarray]:
    gaps = []
    for k in range(spokes):
        angles = (k + np.linspace(0.14, 0.86, 6)) * 2 * np.pi / spokes
        arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        gaps.append(np.concatenate([outer * arc, inner * arc[::-1]]))
    return gaps


def _panes() -> list[np.ndarray]:
    pane = 0.36 * _closed([1] * 4)
    return [pane + 0.46*corner for corner in _closed([1] * 4)]

_WAVE = np.cos(5 * np.arange(60) * 2 * np.pi / 60)

CLASSES = {
    "disc, filled circle": (_closed([1] * 48),),
    "hexagon": (_closed([1] * 6),),
    "ring, annulus": (_closed([1] * 48), _closed([0.6] * 48)),
    "wheel": (_closed([1] * 48), *_spoke_gaps()),
    "window": (_closed([1] * 4), *_panes()),
    "gear": (_closed([1, 1, 0.74, 0.74] * 9),),
    "flower": (_closed(0.72 + 0.28 * _WAVE),),
    "star": (_closed([1, 0.45] * 5),),
    "cross, plus sign": (_cross(),),
    "heart": (_heart(),),
}
# The form of WordNet's ids with a first digit that WordNet does not use.
WNIDS = tuple(f"n9{number:07d}" for number in range(1, len(CLASSES) + 1))


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour, 0 to 255."""
    hsv = rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.15, 1.0)
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv))


def _fill(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in colour)


def _luma(colour: np.ndarray) -> float:
    return float(colour @ (0.299, 0.587, 0.114))


def _contrasting_colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A colour that differs from `background` in brightness, so that grayscale shows it too."""
    threshold = rng.uniform(25, 80)
    colour = _colour(rng)
    while abs(_luma(colour) - _luma(background)) < threshold:
        colour = _colour(rng)
    return colour


def _texture(
    rng: np.random.Generator, size_px: tuple[int, int], first: np.ndarray, second: np.ndarray
) -> Image.Image:
    """An image that blends two colours by a gradient, soft noise and, at times, stripes."""
    coarse_px = size_px[0] // SUPERSAMPLING, size_px[1] // SUPERSAMPLING  # nothing here is sharp
    x, y = (np.linspace(-1, 1, pixels, dtype=np.float32) for pixels in coarse_px)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
    blend = 0.5 + rng.uniform(0, 0.5) * across
    for cells in (4, 16):
        noise = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        blend += rng.uniform(0, 0.25) * np.asarray(
            noise.resize(coarse_px, Image.Resampling.BICUBIC)
        )
    if rng.random() < 0.3:
        blend += rng.uniform(0.1, 0.5) * np.sin(rng.uniform(8, 40) * across + rng.uniform(0, 6))
    pixels = first + np.clip(blend, 0, 1)[..., None] * (second - first)
    return Image.fromarray(pixels.astype(np.uint8)).resize(size_px, Image.Resampling.BILINEAR)


def _scatter(rng: np.random.Generator, canvas: Image.Image, count: int) -> None:
    """Draws `count` distractors, thin strokes and small irregular blobs, onto the canvas."""
    draw, short_px = ImageDraw.Draw(canvas), min(canvas.size)
    for _ in range(count):
        colour, centre = _fill(_colour(rng)), rng.random(2) * canvas.size
        if rng.random() < 0.5:
            steps = rng.normal(scale=0.22 * short_px, size=(rng.integers(2, 5), 2))
            points = centre + np.cumsum(steps, axis=0)
            width_px = round(short_px * rng.uniform(0.01, 0.04))
            draw.line([*map(tuple, points)], fill=colour, width=width_px, joint="curve")
        else:
            radii = short_px * rng.uniform(0.02, 0.09) * rng.uniform(0.4, 1.3, size=9)
            draw.polygon([*map(tuple, centre + _closed(radii))], fill=colour)


def _place(
    rng: np.random.Generator, outlines: tuple[np.ndarray, ...], size_px: tuple[int, int]
) -> list[np.ndarray]:
    """Outlines in canvas pixels after a random rotation, stretch, shear, tilt, scale and shift."""
    angle, stretch = rng.uniform(-0.5, 0.5), np.exp(rng.uniform(-0.15, 0.15))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    skew = np.array([[stretch, 0], [rng.uniform(-0.15, 0.15), 1 / stretch]])
    tilt = rng.uniform(-0.12, 0.12, size=2)
    radius_px = rng.uniform(0.34, 0.48) * min(size_px)
    size = np.array(size_px)
    # Mostly near the middle, as in photographs; at worst a fifth of the object leaves the image.
    centre = size * (0.5 + rng.normal(scale=0.06, size=2))
    centre = np.clip(centre, 0.6 * radius_px, size - 0.6 * radius_px)
    bent = [points @ turn @ skew for points in outlines]
    return [centre + radius_px * points / (1 + points @ tilt)[:, None] for points in bent]


def _paste_object(
    rng: np.random.Generator, canvas: Image.Image, outlines: list[np.ndarray], colour: np.ndarray
) -> Box:
    """Draws the object, some with a shadow or a rim, and returns its box in image pixels."""
    mask = Image.new("L", canvas.size)
    for number, points in enumerate(outlines):
        ImageDraw.Draw(mask).polygon([*map(tuple, points)], fill=0 if number else 255)
    if rng.random() < 0.35:
        dx, dy = rng.integers(-8, 9, size=2)
        shadow = mask.point(lambda value: value * 0.45)
        shadow = shadow.filter(ImageFilter.BoxBlur(rng.uniform(2, 6)))
        canvas.paste((0, 0, 0), (int(dx), int(dy)), shadow)
    other = np.clip(colour + rng.normal(scale=30, size=3), 0, 255)
    canvas.paste(_texture(rng, canvas.size, colour, other), mask=mask)
    box = mask.reduce(SUPERSAMPLING).getbbox()
    assert box is not None, "an object lies outside its image"
    return box


def _cover(rng: np.random.Generator, canvas: Image.Image, centre: np.ndarray) -> None:
    """Hides a part of the object behind a bar that runs through the whole image."""
    angle, short_px = rng.uniform(0, 2 * np.pi), min(canvas.size)
    along = np.array([np.cos(angle), np.sin(angle)])
    middle = centre + rng.normal(scale=0.15 * short_px, size=2)
    ends = [tuple(middle + reach * along) for reach in (-2 * short_px, 2 * short_px)]
    width_px = round(short_px * rng.uniform(0.04, 0.14))
    ImageDraw.Draw(canvas).line(ends, fill=_fill(_colour(rng)), width=width_px)


def render(rng: np.random.Generator, class_index: int) -> tuple[Image.Image, Box]:
    """Draws one image with one object.

    Args:
        rng: The only source of randomness.
        class_index: Position of the class in `CLASSES`.

    Returns:
        The RGB image, short side 72 to 128 pixels, and the box (x1, y1, x2, y2) of the whole
        object clipped to the image, in pixels, x2 and y2 exclusive. A covered part of the object
        counts as part of it.
    """
    short_px, aspect = rng.integers(72, 129), np.exp(rng.uniform(-0.35, 0.35))
    long_px = round(short_px * max(aspect, 1 / aspect))
    size_px = (long_px, int(short_px)) if aspect > 1 else (int(short_px), long_px)
    canvas_px = (size_px[0] * SUPERSAMPLING, size_px[1] * SUPERSAMPLING)

    first, second = _colour(rng), _colour(rng)
    second = first + rng.uniform(0.1, 0.7) * (second - first)
    canvas = _texture(rng, canvas_px, first, second)
    _scatter(rng, canvas, rng.integers(0, 7))
    outlines = _place(rng, list(CLASSES.values())[class_index], canvas_px)
    colour = _contrasting_colour(rng, (first + second) / 2)
    box = _paste_object(rng, canvas, outlines, colour)
    if rng.random() < 0.3:
        _cover(rng, canvas, outlines[0].mean(axis=0))
    _scatter(rng, canvas, rng.integers(0, 3))

    image = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    noise = rng.uniform(0, 10) * rng.standard_normal((*image.size[::-1], 1), dtype=np.float32)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)), box


def _is_drawn(root: Path, settings: bytes) -> bool:
    """Whether `root` holds the finished drawing; False where it is free or ours to finish.

    Raises:
        ValueError: `root` holds anything else, which is not ours to touch.
    """
    remedy = "choose another folder, or remove this one yourself"
    for marker in (root / UNFINISHED, root / MARKER):
        if marker.is_file():
            if marker.read_bytes() != settings:
                raise ValueError(f"{root} holds a sample with other settings: {remedy}")
            return marker.name == MARKER and (root / "ILSVRC").is_dir()
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ValueError(f"{root} holds files that are not a sample: {remedy}")
    return False


def _save(rng: np.random.Generator, image: Image.Image, path: Path, *, cmyk: bool) -> None:
    if cmyk:
        image = image.convert("CMYK")
    elif rng.random() < GRAYSCALE_SHARE:
        image = image.convert("L")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=int(rng.integers(35, 96)))


def _draw_train(folder: Path, seed: int, per_class: int, bar: tqdm) -> None:
    for index in range(per_class * len(CLASSES)):
        number, label = divmod(index, len(CLASSES))
        rng = np.random.default_rng((seed, 0, index))
        image, _ = render(rng, label)
        path = folder / WNIDS[label] / f"{WNIDS[label]}_{number}.JPEG"
        _save(rng, image, path, cmyk=index == CMYK_INDEX)
        bar.update()


def _draw_val(folder: Path, seed: int, per_class: int, bar: tqdm) -> str:
    """Draws the flat val/ and returns the text of its solution file."""
    shuffle = np.random.default_rng((seed, 2))
    labels = np.concatenate([shuffle.permutation(len(CLASSES)) for _ in range(per_class)])
    lines = ["ImageId,PredictionString"]
    for index, label in enumerate(labels):
        rng = np.random.default_rng((seed, 1, index))
        image, box = render(rng, label)
        image_id = f"ILSVRC2012_val_{index + 1:08d}"
        _save(rng, image, folder / f"{image_id}.JPEG", cmyk=index == CMYK_INDEX)
        lines.append(f"{image_id},{WNIDS[label]} {' '.join(map(str, box))} ")  # space as Kaggle's
        bar.update()
    return "\n".join(lines) + "\n"


def draw(
    root: str | Path,
    *,
    seed: int = 0,
    train_per_class: int = 200,
    val_per_class: int = 50,
    progress: bool = False,
) -> Path:
    """Draws the sample under `root`, or does nothing if it is there, its val/ sorted or not.

    The same settings give the same bytes. An image depends on the seed, its split and its number
    alone: a smaller sample is the beginning of a larger one. Two processes must not draw into the
    same folder at the same time.

    Args:
        root: Folder to fill: missing, empty, or left by an interrupted call with these settings.
        seed: Not negative.
        train_per_class: Training images of each class, 1 or more.
        val_per_class: Validation images of each class, 1 or more.
        progress: Whether to show a progress bar.

    Returns:
        The folder that holds `train/` and `val/`.

    Raises:
        ValueError: A number out of range, or a `root` that holds something else.
    """
    if seed < 0 or train_per_class < 1 or val_per_class < 1:
        raise ValueError(f"seed {seed} is negative or a class has no image")
    root = Path(root)
    counts = {"train_per_class": train_per_class, "val_per_class": val_per_class}
    settings = json.dumps({"version": VERSION, "seed": seed, **counts}, indent=2).encode() + b"\n"
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    if _is_drawn(root, settings):
        return data

    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).write_bytes(settings)
    mapping = "".join(f"{wnid} {names}\n" for wnid, names in zip(WNIDS, CLASSES, strict=True))
    (root / "LOC_synset_mapping.txt").write_text(mapping, newline="\n")
    with tqdm(total=len(CLASSES) * sum(counts.values()), unit="image", disable=not progress) as bar:
        _draw_train(data / "train", seed, train_per_class, bar)
        solution = _draw_val(data / "val", seed, val_per_class, bar)
    (root / "LOC_val_solution.csv").write_text(solution, newline="\n")
    (root / MARKER).write_bytes(settings)
    (root / UNFINISHED).unlink(missing_ok=True)
    return data


def main(argv: list[str] | None = None) -> int:
    """Runs the command line: 0 when the sample is there, 2 when it cannot be drawn."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.sample", description="Draw the embedded sample."
    )
    parser.add_argument("root", help="folder to fill, for example data/sample")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        data = draw(args.root, seed=args.seed, progress=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The sample of {len(CLASSES)} classes is in {data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
