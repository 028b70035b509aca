"""Draws the embedded sample: a small ImageNet download with ten kinds of simple objects.

`draw` writes JPEG files in exactly the layout of the Kaggle download (class folders in `train/`, a
flat `val/`, the solution files with one box per image, the class names), so that everything made
for ImageNet runs unchanged without a download. The class of an object is its outline and nothing
else: position, scale, rotation, colour, texture, clutter, occlusion, blur, noise and JPEG quality
have the same distribution in every class. Flips, rotations and inverted colours keep the class.

`draw_scenes` draws the same objects, several per image, with boxes in COCO's format.

    python -m utils.data.sample data/sample
"""

import colorsys
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from utils.cli import Parser, exit_code, int_at_least, progress_bar
from utils.records import LOCK_NAME, PARTIAL, lock, write_atomic

VERSION = 1  # of the drawing code: raise it with every change that changes the bytes
MARKER, UNFINISHED = "sample.json", "sample.unfinished.json"
SPLITS = ("train", "val")
SUPERSAMPLING = 2  # canvas pixels per image pixel, for smooth edges
GRAYSCALE_SHARE = 0.03  # ImageNet has about 0.02
CMYK_INDEX = 5  # this image of each split: ImageNet has a few, and naive decoders trip on them
SCENE_PX = 128  # sides of a scene
SCENE_STREAM = 4  # before a split's number in the seed of a scene, so that no image shares it

Box = tuple[int, int, int, int]
Rng = np.random.Generator
Outlines = Sequence[np.ndarray]  # points [n, 2] of each


def _closed(radii: np.ndarray | list[float]) -> np.ndarray:
    """Points [n, 2] around the origin, one per radius at equal angles, the first straight up."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _cross(arm: float = 0.32) -> np.ndarray:
    upper = [[1, arm], [arm, arm], [arm, 1], [-arm, 1], [-arm, arm], [-1, arm]]
    return np.array(upper + [[-x, -y] for x, y in upper])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - up], axis=1) / 16


def _between_spokes(spokes: int = 5) -> list[np.ndarray]:
    starts = np.arange(spokes) * 2 * np.pi / spokes
    angles = starts[:, None] + np.linspace(0.14, 0.86, 6) * 2 * np.pi / spokes
    arcs = np.stack([np.cos(angles), np.sin(angles)], axis=2)
    return [np.concatenate([0.74 * arc, 0.22 * arc[::-1]]) for arc in arcs]


def _window() -> list[np.ndarray]:
    square = 0.78 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    return [square, *(0.35 * square + 0.46 * corner for corner in square)]


# Names -> outlines within about one unit of the origin: the first is filled, the others cut holes.
# Some pairs are alike on purpose (disc and hexagon, ring and wheel, star and flower and cross).
CLASSES: dict[str, Outlines] = {
    "disc, filled circle": (_closed([1] * 48),),
    "hexagon": (_closed([1] * 6),),
    "ring, annulus": (_closed([1] * 48), _closed([0.6] * 48)),
    "wheel, spoked wheel": (_closed([1] * 48), *_between_spokes()),
    "window, four panes": tuple(_window()),
    "gear, cogwheel": (_closed([1, 1, 0.74, 0.74] * 9),),
    "flower, five petals": (_closed(0.72 + 0.28 * np.cos(np.arange(60) * 2 * np.pi / 12)),),
    "star, pentagram": (_closed([1, 0.45] * 5),),
    "cross, plus sign": (_cross(),),
    "heart": (_heart(),),
}
# The form of WordNet's ids, with a first digit that WordNet does not use.
WNIDS = tuple(f"n9{number:07d}" for number in range(1, len(CLASSES) + 1))


def _colour(rng: Rng) -> np.ndarray:
    """A random RGB colour, 0 to 255."""
    hsv = rng.random(), rng.uniform(0.1, 0.9), rng.uniform(0.15, 1.0)
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv))


def _ink(rng: Rng) -> tuple[int, ...]:
    return tuple(_colour(rng).astype(int).tolist())


def _contrasting_colour(rng: Rng, background: np.ndarray) -> np.ndarray:
    """A colour lighter or darker than `background`, so that it shows in grayscale too."""
    threshold, luma = rng.uniform(50, 110), np.array([0.299, 0.587, 0.114])
    colour = _colour(rng)
    while abs(luma @ (colour - background)) < threshold:
        colour = _colour(rng)
    return colour


def _texture(
    rng: Rng, size_px: tuple[int, int], first: np.ndarray, second: np.ndarray
) -> Image.Image:
    """An image that blends two colours by a gradient, soft noise and, at times, stripes."""
    coarse_px = size_px[0] // SUPERSAMPLING, size_px[1] // SUPERSAMPLING  # nothing here is sharp
    x, y = (np.linspace(-1, 1, length, dtype=np.float32) for length in coarse_px)
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


def _scatter(rng: Rng, canvas: Image.Image, count: int) -> None:
    """Draws distractors: thin strokes and small irregular blobs, which are of no class."""
    pen, short_px = ImageDraw.Draw(canvas), min(canvas.size)
    for _ in range(count):
        centre = rng.random(2) * canvas.size
        if rng.random() < 0.5:
            steps = rng.normal(scale=0.22 * short_px, size=(rng.integers(2, 5), 2))
            points = centre + np.cumsum(steps, axis=0)
            width_px = round(short_px * rng.uniform(0.01, 0.04))
            pen.line(points.ravel().tolist(), fill=_ink(rng), width=width_px, joint="curve")
        else:
            radii = short_px * rng.uniform(0.02, 0.09) * rng.uniform(0.4, 1.3, size=9)
            pen.polygon((centre + _closed(radii)).ravel().tolist(), fill=_ink(rng))


def _bend(rng: Rng, class_index: int) -> Outlines:
    """The outlines of a class, rotated, stretched, sheared and tilted."""
    angle, stretch = rng.uniform(-0.4, 0.4), np.exp(rng.uniform(-0.1, 0.1))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    skew = np.array([[stretch, 0], [rng.uniform(-0.12, 0.12), 1 / stretch]])
    tilt = rng.uniform(-0.12, 0.12, size=2)
    bent = [points @ turn @ skew for points in list(CLASSES.values())[class_index]]
    return [points / (1 + points @ tilt)[:, None] for points in bent]


def _paste_object(rng: Rng, canvas: Image.Image, outlines: Outlines, ground: np.ndarray) -> Box:
    """Draws an object on a background, at times with a shadow, and returns its box in pixels."""
    colour = _contrasting_colour(rng, ground)
    mask = Image.new("L", canvas.size)
    for number, points in enumerate(outlines):
        ImageDraw.Draw(mask).polygon(points.ravel().tolist(), fill=0 if number else 255)
    if rng.random() < 0.35:
        shadow = mask.point(lambda value: value * 0.45)
        shadow = shadow.filter(ImageFilter.BoxBlur(rng.uniform(2, 6)))
        canvas.paste((0, 0, 0), tuple(rng.integers(-8, 9, size=2).tolist()), shadow)
    other = np.clip(colour + rng.normal(scale=30, size=3), 0, 255)
    canvas.paste(_texture(rng, canvas.size, colour, other), mask=mask)
    return mask.reduce(SUPERSAMPLING).getbbox()


def _cover(rng: Rng, canvas: Image.Image, centre: np.ndarray) -> None:
    """Hides a part of the object behind a bar that runs through the whole image."""
    angle, short_px = rng.uniform(0, 2 * np.pi), min(canvas.size)
    middle = centre + rng.normal(scale=0.15 * short_px, size=2)
    reach = 2 * short_px * np.array([np.cos(angle), np.sin(angle)])
    ends, width_px = [*(middle - reach), *(middle + reach)], short_px * rng.uniform(0.04, 0.14)
    ImageDraw.Draw(canvas).line(ends, fill=_ink(rng), width=round(width_px))


def _background(rng: Rng, size_px: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    """A canvas with a texture and clutter on it, and the mean of the texture's two colours."""
    first, second = _colour(rng), _colour(rng)
    second = first + rng.uniform(0.1, 0.7) * (second - first)
    canvas = _texture(rng, size_px, first, second)
    _scatter(rng, canvas, rng.integers(0, 5))
    return canvas, (first + second) / 2


def render(rng: Rng, class_index: int) -> tuple[Image.Image, Box]:
    """Draws one image with one object of a class of `CLASSES`.

    Returns:
        The RGB image, short side 72 to 128 pixels, and the object's box (x1, y1, x2, y2) in pixels,
        x2 and y2 exclusive, clipped to the image; covered parts count.
    """
    short_px = int(rng.integers(72, 129))
    size_px = [short_px, round(short_px * np.exp(rng.uniform(0, 0.35)))]
    width_px, height_px = rng.permutation(size_px).tolist()
    canvas_px = (width_px * SUPERSAMPLING, height_px * SUPERSAMPLING)
    canvas, mean = _background(rng, canvas_px)
    bent = _bend(rng, class_index)
    radius_px, size = rng.uniform(0.38, 0.5) * min(canvas_px), np.array(canvas_px)
    # Near the middle, as in most photographs; at worst a fifth of the object leaves the image.
    centre = size * (0.5 + rng.normal(scale=0.06, size=2))
    centre = np.clip(centre, 0.6 * radius_px, size - 0.6 * radius_px)
    outlines = [centre + radius_px * points for points in bent]
    box = _paste_object(rng, canvas, outlines, mean)
    return _photograph(rng, canvas, outlines[0].mean(axis=0)), box


def render_scene(rng: Rng) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """Draws one square image with one to four objects, which may overlap a little.

    Returns:
        The RGB image, and the class index and the box, as in `render`, of each object.
    """
    canvas_px = (SCENE_PX * SUPERSAMPLING, SCENE_PX * SUPERSAMPLING)
    canvas, mean = _background(rng, canvas_px)
    objects = []
    for centre, radius_px in _places(rng, canvas_px[0]):
        label = int(rng.integers(len(CLASSES)))
        outlines = [centre + radius_px * points for points in _bend(rng, label)]
        objects.append((label, _paste_object(rng, canvas, outlines, mean)))
    return _photograph(rng, canvas), objects


def _places(rng: Rng, side_px: int) -> list[tuple[np.ndarray, float]]:
    """Centres and radii of one to four objects, nearly completely on the canvas."""
    places, wanted = [], rng.integers(1, 5)
    for _ in range(20):  # where there is no room for another, there are fewer
        radius_px = rng.uniform(0.12, 0.28) * side_px
        centre = rng.uniform(0.9 * radius_px, side_px - 0.9 * radius_px, size=2)
        if all(np.hypot(*(centre - other)) > 0.9 * (radius_px + r) for other, r in places):
            places.append((centre, radius_px))
        if len(places) == wanted:
            break
    return places


def _photograph(rng: Rng, canvas: Image.Image, centre: np.ndarray | None = None) -> Image.Image:
    """The noisy image of a canvas, at times blurred, or covered at its centre or anywhere."""
    if rng.random() < 0.2:
        _cover(rng, canvas, rng.random(2) * canvas.size if centre is None else centre)
    _scatter(rng, canvas, rng.integers(0, 3))
    image = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.6)))
    noise = rng.standard_normal((image.height, image.width, 1), dtype=np.float32)
    pixels = np.asarray(image) + rng.uniform(0, 8) * noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _save(rng: Rng, image: Image.Image, path: Path, *, cmyk: bool) -> None:
    if cmyk:
        image = image.convert("CMYK")
    elif rng.random() < GRAYSCALE_SHARE:
        image = image.convert("L")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=int(rng.integers(35, 96)))


def _draw_split(data: Path, split: str, seed: int, per_class: int, bar: tqdm) -> str:
    """Draws the images of one split and returns the text of its solution file."""
    number = SPLITS.index(split)
    shuffle = np.random.default_rng((seed, len(SPLITS) + number))
    # Each class once in every ten images, so that a small sample is the beginning of a large one.
    labels = np.concatenate([shuffle.permutation(len(CLASSES)) for _ in range(per_class)])
    lines = ["ImageId,PredictionString"]
    for index, label in enumerate(labels):
        wnid = WNIDS[label]
        if split == "train":
            folder, image_id = data / split / wnid, f"{wnid}_{index // len(CLASSES)}"
        else:
            folder, image_id = data / split, f"ILSVRC2012_val_{index + 1:08d}"
        rng = np.random.default_rng((seed, number, index))
        image, box = render(rng, label)
        _save(rng, image, folder / f"{image_id}.JPEG", cmyk=index == CMYK_INDEX)
        lines.append(f"{image_id},{wnid} {' '.join(map(str, box))} ")  # Kaggle's ends in a space
        bar.update()
    return "\n".join(lines) + "\n"


def _draw_once(root: Path, settings: dict[str, object], fill: Callable[[], None]) -> None:
    """Locks the folder and fills it, unless that is done; ValueError if it holds anything else."""
    marked = json.dumps(settings).encode() + b"\n"
    if _is_drawn(root, marked):  # before the lock, which writes to the folder
        return
    root.mkdir(parents=True, exist_ok=True)
    with lock(root):
        if not _is_drawn(root, marked):
            write_atomic(root / UNFINISHED, lambda path: path.write_bytes(marked))
            fill()
            (root / UNFINISHED).replace(root / MARKER)


def _is_drawn(root: Path, settings: bytes) -> bool:
    remedy = "choose another folder, or remove this one yourself"
    for marker in (root / UNFINISHED, root / MARKER):
        if marker.is_file():
            if marker.read_bytes() != settings:
                raise ValueError(f"{root} holds a sample with other settings: {remedy}")
            return marker.name == MARKER and any(each.is_dir() for each in root.iterdir())
    ours = {root / LOCK_NAME, root / (UNFINISHED + PARTIAL)}
    if root.exists() and (not root.is_dir() or set(root.iterdir()) - ours):
        raise ValueError(f"{root} holds something that is not a sample: {remedy}")
    return False


def draw(
    root: str | Path,
    *,
    seed: int = 0,
    train_per_class: int = 200,
    val_per_class: int = 50,
    progress: bool = False,
) -> Path:
    """Draws the sample into a folder, or does nothing if it is there, with val/ sorted or not.

    The same settings give the same bytes. An image depends only on the seed, its split and its
    number. A second process waits until the first is done.

    Args:
        root: folder to fill: missing, empty, or left unfinished by a call with these settings.
        train_per_class, val_per_class: images of each class, 1 or more.

    Returns:
        The folder that holds `train/` and `val/`.

    Raises:
        ValueError: `root` holds something else.
    """
    root, counts = Path(root), {"train": train_per_class, "val": val_per_class}
    settings = {"version": VERSION, "seed": seed, "per_class": counts}
    data, images = root / "ILSVRC" / "Data" / "CLS-LOC", len(CLASSES) * sum(counts.values())

    def fill() -> None:
        names = "".join(f"{wnid} {words}\n" for wnid, words in zip(WNIDS, CLASSES, strict=True))
        (root / "LOC_synset_mapping.txt").write_text(names)
        with progress_bar(total=images, unit=" images", disable=not progress) as bar:
            for split in SPLITS:
                solution = _draw_split(data, split, seed, counts[split], bar)
                (root / f"LOC_{split}_solution.csv").write_text(solution)

    _draw_once(root, settings, fill)
    return data


def draw_scenes(
    root: str | Path,
    *,
    seed: int = 0,
    train_images: int = 400,
    val_images: int = 100,
    progress: bool = False,
) -> Path:
    """Draws scenes with boxes into a folder, as `draw` does, and returns the folder.

    It gets `train/`, `val/` and COCO's annotations of both, `annotations/instances_train.json` and
    `instances_val.json`. The categories are the sample's classes, with their first names.

    Raises:
        ValueError: `root` holds something else.
    """
    root, counts = Path(root), {"train": train_images, "val": val_images}
    settings = {"version": VERSION, "seed": seed, "scenes": counts}

    def fill() -> None:
        (root / "annotations").mkdir(exist_ok=True)
        with progress_bar(total=sum(counts.values()), unit=" images", disable=not progress) as bar:
            for number, split in enumerate(SPLITS):
                found = _draw_scenes(root / split, number, seed, counts[split], bar)
                (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))

    _draw_once(root, settings, fill)
    return root


def _draw_scenes(folder: Path, number: int, seed: int, count: int, bar: tqdm) -> dict[str, list]:
    """Draws the images of one split and returns the content of its COCO file."""
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng((seed, SCENE_STREAM + number, index))
        image, objects = render_scene(rng)
        name = f"{index + 1:06d}.jpg"
        _save(rng, image, folder / name, cmyk=False)
        size = {"width": image.width, "height": image.height}
        images.append({"id": index + 1, "file_name": name, **size})
        for label, (x1, y1, x2, y2) in objects:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            of_what = {"image_id": index + 1, "category_id": label + 1, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **of_what, **box})
        bar.update()
    categories = [{"id": k + 1, "name": name.split(",")[0]} for k, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = Parser("Draw the sample.", prog="python -m utils.data.sample")
    parser.add_argument("root", help="folder to fill, for example data/sample")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    name = f"The sample of {len(CLASSES)} classes is in"
    return exit_code(lambda: print(name, draw(args.root, seed=args.seed, progress=True)))


if __name__ == "__main__":
    sys.exit(main())
