"""Images with boxes around the objects in them, read from COCO's format.

Labels are 1 to the number of classes, as torchvision's detectors have them; 0 is the background.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from utils.cli import DataError
from utils.data.folders import SAMPLE_STREAM, Key, seeded
from utils.data.transforms import as_tensor, open_image, pixels

Target = dict[str, Tensor]  # boxes [n, 4] as x1, y1, x2, y2 in pixels; labels [n]


class BoxedBatch(NamedTuple):
    """uint8 `images`, `[3, H, W]` each, and the objects in them."""

    images: list[Tensor]
    targets: list[Target]


class BoxedImages(Dataset):
    """Images with boxes of one file of annotations in COCO's format.

    Boxes end at the image's border; those without area, and crowds, are left out.

    Args:
        folder: of the images.
        annotations: the JSON file, with `images`, `annotations` (`bbox` is x, y, width, height)
            and `categories`.
        flip: whether half of the images are mirrored, which halves at each epoch.
        seed: of which are.

    Attributes:
        classes: names of the categories, in the order of their ids; labels count them from 1.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is not as it should be; the line names the file and the entry.
    """

    def __init__(
        self, folder: Path, annotations: Path, *, flip: bool = False, seed: int = 0
    ) -> None:
        self.folder, self.seed = folder, seed
        self.transform = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
        content = _read_json(annotations)
        try:
            self.names, self.targets, self.classes = _parse(content)
        except _BadEntry as error:
            raise DataError(f"{annotations}: {error}") from None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.folder / self.names[index]

    def __getitems__(self, keys: list[Key]) -> BoxedBatch:
        """What a loader asks for: a whole batch."""
        images, targets = zip(*(self[key] for key in keys), strict=True)
        return BoxedBatch(list(images), list(targets))

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        image = tv_tensors.Image(as_tensor(pixels(open_image(self.path(key.index)))))
        target = dict(self.targets[key.index])
        size = image.shape[-2:]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        with seeded(SAMPLE_STREAM, self.seed, *key):
            image, boxes = self.transform(image, boxes)
        return image.as_subclass(Tensor), target | {"boxes": boxes.as_subclass(Tensor)}


class _BadEntry(ValueError):
    """What is wrong in a file of annotations."""


def _read_json(path: Path) -> Any:
    if not path.is_file():  # a pipe would keep us waiting
        raise FileNotFoundError(f"{path}: no such file of annotations")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no readable JSON ({str(error) or 'too deep'})") from error


def _parse(content: Any) -> tuple[list[str], list[Target], list[str]]:
    """File names, targets and class names of COCO's content."""
    images, categories = _by_id(content, "images"), _by_id(content, "categories")
    names = [_text(images[key], "images", "file_name") for key in images]
    classes = [_text(categories[key], "categories", "name") for key in sorted(categories)]
    if not images or not classes or len(set(classes)) < len(classes):
        raise _BadEntry(f"{len(images)} images, {len(set(classes))} different names of categories")
    labels = {key: label for label, key in enumerate(sorted(categories), start=1)}
    found: dict[int, list[tuple[list[float], int]]] = {key: [] for key in images}
    for place, entry in enumerate(_entries(content, "annotations")):
        where = f"annotations[{place}]"
        image, label = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image, int) or image not in images:
            raise _BadEntry(f"{where}: image_id={image!r} is no image's id")
        if not isinstance(label, int) or label not in labels:
            raise _BadEntry(f"{where}: category_id={label!r} is no category's id")
        box = _corners(entry.get("bbox"), images[image], where)
        if box[0] < box[2] and box[1] < box[3] and not entry.get("iscrowd"):
            found[image].append((box, labels[label]))
    targets = [
        {
            "boxes": torch.tensor([box for box, _ in objects]).reshape(-1, 4),
            "labels": torch.tensor([label for _, label in objects], dtype=torch.long),
        }
        for objects in found.values()
    ]
    return names, targets, classes


def _entries(content: Any, key: str) -> list[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _BadEntry(f"has no list of {key}, as COCO's format has")
    return entries


def _by_id(content: Any, key: str) -> dict[int, dict[str, Any]]:
    entries = _entries(content, key)
    for place, entry in enumerate(entries):
        if type(entry.get("id")) is not int:
            raise _BadEntry(f"{key}[{place}]: id={entry.get('id')!r} must be an integer")
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise _BadEntry(f"{key}: an id stands there twice")
    return found


def _text(entry: Mapping[str, Any], kind: str, key: str) -> str:
    if not isinstance(entry.get(key), str) or not entry[key]:
        raise _BadEntry(f"{kind}, id {entry['id']}: {key}={entry.get(key)!r} must be a name")
    return entry[key]


def _corners(bbox: Any, image: Mapping[str, Any], where: str) -> list[float]:
    """x1, y1, x2, y2 within the image."""
    for name, values, count in (
        ("bbox", bbox, 4),
        ("width and height", [image.get("width"), image.get("height")], 2),
    ):
        good = isinstance(values, list) and len(values) == count
        if not good or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise _BadEntry(f"{where}: {name}={values!r} must be {count} finite numbers")
    x, y, width, height = bbox
    right, bottom = image["width"], image["height"]
    corners = ((x, right), (y, bottom), (x + width, right), (y + height, bottom))
    return [float(min(max(value, 0), most)) for value, most in corners]


@dataclass(frozen=True)
class BoxedSplits:
    """Training and validation images of one folder, with the names of their classes."""

    train: BoxedImages
    val: BoxedImages
    classes: list[str]


def open_boxes(data_dir: str | Path, seed: int = 0) -> BoxedSplits:
    """Opens a folder in COCO's layout, as `utils.data.sample.draw_scenes` and COCO's own have it.

    The images of `annotations/instances_train*.json` are in `train*/`, those of val likewise.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: it holds something else, or its two splits have other classes.
    """
    data_dir, found = Path(data_dir), {}
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    for split in ("train", "val"):
        paths = sorted(data_dir.glob(f"annotations/instances_{split}*.json"))
        if len(paths) != 1:
            raise DataError(
                f"{data_dir}: {len(paths)} files annotations/instances_{split}*.json, needs one; "
                "a detector needs boxes in COCO's format, which folders of classes have not"
            )
        folder = data_dir / paths[0].stem.removeprefix("instances_")
        found[split] = BoxedImages(folder, paths[0], flip=split == "train", seed=seed)
    train, val = found["train"].classes, found["val"].classes
    if train != val:
        raise DataError(f"{data_dir}: classes of train {train} are not those of val {val}")
    return BoxedSplits(**found, classes=train)
