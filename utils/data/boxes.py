"""Images with boxes around their objects, read from COCO's format.

Labels are 1 to the number of classes, as in torchvision's detectors; 0 is the background.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.cli import DataError, warn
from utils.data.folders import SAMPLE_STREAM, Key, Splits, seeded
from utils.data.transforms import as_tensor, open_image, pixels

# Mirrored and resized in float32, a thinner box may lose its area, which torchvision refuses.
MIN_SIDE_PX = 0.01
Target = dict[str, Tensor]  # boxes [n, 4] as x1, y1, x2, y2 in pixels; labels [n]


class BoxedBatch(NamedTuple):
    """uint8 `images`, `[3, H, W]` each, and their objects."""

    images: list[Tensor]
    targets: list[Target]


class BoxedImages(Dataset):
    """Images with the boxes of one annotation file in COCO's format.

    Boxes are of the upright image; see `utils.data.transforms.pixels`. They are clipped to it, and
    those without area, and crowds, are left out; the number is printed.

    Args:
        annotations: JSON with `images`, `annotations` (`bbox` is x, y, width, height) and
            `categories`.
        flip: whether to mirror half of the images, which `seed` and the epoch choose.

    Attributes:
        classes: names of the categories in the order of their ids; labels count them from 1.

    Raises:
        DataError: the file is invalid; the message names it and the entry.
    """

    def __init__(
        self, folder: Path, annotations: Path, *, flip: bool = False, seed: int = 0
    ) -> None:
        self.folder, self.flip, self.seed = folder, flip, seed
        self.names, self.sizes, self.targets, self.classes = _read(annotations)

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, keys: list[Key]) -> BoxedBatch:
        """A complete batch, as a DataLoader requests it."""
        images, targets = zip(*(self[key] for key in keys), strict=True)
        return BoxedBatch(list(images), list(targets))

    def __getitem__(self, key: Key) -> tuple[Tensor, Target]:
        path, size = self.folder / self.names[key.index], self.sizes[key.index]
        opened = open_image(path)
        if opened.size != size:
            found, wanted = ("{} x {}".format(*each) for each in (opened.size, size))
            raise DataError(f"{path}: {found} pixels upright, but its boxes are for {wanted}")
        image = as_tensor(pixels(opened))
        target = self.targets[key.index]
        with seeded(SAMPLE_STREAM, self.seed, *key):
            is_mirrored = self.flip and torch.rand(()) < 0.5
        if is_mirrored:
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            boxes = torch.stack([image.shape[2] - x2, y1, image.shape[2] - x1, y2], 1)
            image, target = image.flip(2), target | {"boxes": boxes}
        return image, target


def _read(path: Path) -> tuple[list[str], list[tuple[int, int]], list[Target], list[str]]:
    """File names, widths and heights, targets and class names of an annotation file."""
    entry = None  # the one that an error is about
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        labels = {entry["id"]: label for label, entry in enumerate(categories, start=1)}
        classes = [entry["name"] for entry in categories]
        images, objects = {}, {}
        for entry in content["images"]:
            images[entry["id"]] = entry["file_name"], (entry["width"], entry["height"])
            objects[entry["id"]] = []
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            if not math.isfinite(x + y + width + height):
                raise ValueError("bbox must be finite")
            labelled = [x, y, x + width, y + height, labels[entry["category_id"]]]
            objects[entry["image_id"]] += [] if entry.get("iscrowd") else [labelled]
        entry = None
        counts = [len(images), len(labels), len({*classes})]
        if not all(counts) or counts != [len(content["images"]), len(categories), len(categories)]:
            raise ValueError("needs images and categories with different ids and names")
        names, sizes = zip(*images.values(), strict=True)
        targets, changed = zip(*map(_target, objects.values(), sizes), strict=True)
        if not any(len(target["boxes"]) for target in targets):
            raise ValueError("no image has a box")
    except (ValueError, TypeError, LookupError) as error:
        reason = f"unknown or missing {error}" if isinstance(error, KeyError) else error
        where = "" if entry is None else f" in {entry!r:.200}"
        raise DataError(f"{path}: not valid in COCO's format: {reason}{where}") from error
    if sum(changed):
        warn(
            f"{path}: {sum(changed)} of {sum(map(len, objects.values()))} boxes reach beyond their "
            "image or have no area; they are clipped, or left out where nothing remains"
        )
    return list(names), list(sizes), list(targets), classes


def _target(objects: list[list[float]], size: tuple[int, int]) -> tuple[Target, int]:
    """The target of an image, and how many of its boxes are clipped by over a pixel or left out."""
    labelled = torch.tensor(objects, dtype=torch.float32).reshape(-1, 5)
    boxes = labelled[:, :4].clamp(min=0).minimum(torch.tensor([*size, *size]))
    is_clipped = ((labelled[:, :4] - boxes).abs() > 1).any(1)
    has_area = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE_PX).all(1)
    target = {"boxes": boxes[has_area], "labels": labelled[has_area, 4].long()}
    return target, int((is_clipped | ~has_area).sum())


def open_boxes(data_dir: str | Path, seed: int = 0) -> Splits:
    """Opens a folder in COCO's layout, such as one of `utils.data.sample.draw_scenes`.

    The images of `annotations/instances_train*.json` are in `train*/`, those of val likewise.

    Raises:
        FileNotFoundError: there is no such folder.
        DataError: a file is missing or invalid, or its two splits have different classes.
    """
    data_dir, found = Path(data_dir), {}
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{data_dir}: no such folder")
    for split in ("train", "val"):
        paths = sorted(data_dir.glob(f"annotations/instances_{split}*.json"))
        if len(paths) != 1:
            raise DataError(
                f"{data_dir}: {len(paths)} files annotations/instances_{split}*.json, needs one; "
                "a detector needs boxes in COCO's format, which class folders do not have"
            )
        folder = data_dir / paths[0].stem.removeprefix("instances_")
        found[split] = BoxedImages(folder, paths[0], flip=split == "train", seed=seed)
    train, val = found["train"].classes, found["val"].classes
    if train != val:
        raise DataError(f"{data_dir}: classes of train {train} are not those of val {val}")
    return Splits(**found, classes=train)
