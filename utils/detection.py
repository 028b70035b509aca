"""Detectors: images with boxes read from COCO's format, training, mean average precision.

Nothing here knows a backbone: a detector is any of torchvision's, lists of images `[3, H, W]` and
targets in, losses or detections out. Labels are 1 to the number of classes; 0 is the background.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision import tv_tensors
from torchvision.transforms import v2

from utils.data import (
    SAMPLE_STREAM,
    STEP_STREAM,
    EvalBatches,
    Key,
    TrainBatches,
    make_loader,
    seeded,
)
from utils.errors import DataError
from utils.images import open_image, pixels
from utils.progress import progress_bar
from utils.recipe import DetectorRecipe
from utils.training import PROGRESS_STEPS, DivergedError, lr_factor, param_groups

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
        with open_image(self.path(key.index)) as opened:
            image = tv_tensors.Image(pixels(opened))
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
    """Opens a folder in COCO's layout, as `utils.sample.draw_scenes` and COCO's own have it.

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


def train_detector(
    model: nn.Module,
    images: BoxedImages,
    recipe: DetectorRecipe,
    *,
    seed: int = 0,
    workers: int = 0,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Trains a detector on its device; on a CPU the same seed and threads give the same bits.

    Returns:
        A row per epoch: `epoch`, `train_loss`, the mean over its steps of the sum of all losses.

    Raises:
        ValueError: a batch larger than the data.
        CorruptImageError: an image is unreadable.
        DivergedError: the loss is not finite.
    """
    device = next(model.parameters()).device
    batches = TrainBatches(len(images), recipe.batch_size, seed)
    loader = make_loader(images, batches, workers)
    optimizer = torch.optim.AdamW(param_groups(model, recipe.weight_decay), lr=recipe.lr)
    warmup, total = round(recipe.warmup_epochs * len(batches)), recipe.epochs * len(batches)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
    model.train()
    rows, step = [], 0
    count = total * recipe.batch_size
    with progress_bar(total=count, unit=" images", disable=quiet) as bar:
        for epoch in range(recipe.epochs):
            batches.begin(epoch)
            losses = []
            for batch in loader:
                with seeded(STEP_STREAM, seed, step):  # Faster R-CNN draws its regions
                    loss = sum(model(*_on_device(batch, device)).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                step += 1
                bar.update(len(batch.images))
                if step % PROGRESS_STEPS == 0 or len(losses) == len(batches):
                    _check(losses, step)
            rows.append({"epoch": epoch + 1, "train_loss": torch.stack(losses).mean().item()})
            bar.set_postfix_str(f"loss {rows[-1]['train_loss']:.3f}", refresh=False)
    return rows


def _on_device(batch: BoxedBatch, device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images as the detectors take them, 0 to 1, and targets."""
    images = [image.to(device).float() / 255 for image in batch.images]
    return images, [{key: value.to(device) for key, value in t.items()} for t in batch.targets]


def _check(losses: Sequence[Tensor], step: int) -> None:
    if not torch.stack(list(losses)).isfinite().all():
        raise DivergedError(f"the loss is not finite before step {step}; try a lower lr", step)


@torch.inference_mode()
def detect(model: nn.Module, images: BoxedImages, batch_size: int = 16) -> list[Target]:
    """What a detector sees in each image: `boxes`, `labels` and `scores`, best first, on the CPU.

    Raises:
        CorruptImageError: an image is unreadable.
    """
    device = next(model.parameters()).device
    model.eval()
    found = []
    for batch in make_loader(images, EvalBatches(len(images), batch_size), 0):
        of_batch = model(_on_device(batch, device)[0])
        found += [{key: value.cpu() for key, value in each.items()} for each in of_batch]
    return found


def mean_average_precision(found: Iterable[Target], targets: Iterable[Target]) -> dict[str, float]:
    """COCO's mean average precision of boxes, by torchmetrics and faster-coco-eval.

    Returns:
        `map_pct`, the mean over overlaps (IoU) of 0.50 to 0.95, and `map50_pct`, at 0.50; means
        over the classes that the targets have, in percent.
    """
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False  # COCO counts the best hundred of an image
    metric.update(list(found), list(targets))
    result = metric.compute()
    return {"map_pct": 100 * result["map"].item(), "map50_pct": 100 * result["map_50"].item()}
