"""Images from class folders or from shards, opened and loaded by the same functions."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from utils.cli import summarize
from utils.data.folders import (
    EvalBatches,
    ImageFiles,
    Splits,
    TrainBatches,
    make_loader,
    open_folders,
    open_val,
)
from utils.data.imagenet import LayoutError, check_layout
from utils.data.shards import ShardBatches, Shards, is_shards, open_shards
from utils.distributed import world_size
from utils.recipe import Recipe


def open_data(data_dir: str | Path, recipe: Recipe, seed: int = 0) -> Splits:
    """Opens the training and validation images of a folder, a brace pattern or a pipe of shards.

    Raises:
        DataError: the folder or the shards are incomplete or inconsistent.
    """
    if not is_shards(str(data_dir)):
        return open_folders(data_dir, recipe, seed)
    return Splits(*open_shards(str(data_dir), recipe, seed))


def open_val_data(data_dir: str | Path, classes: list[str], recipe: Recipe) -> ImageFiles | Shards:
    """Opens the validation images; LayoutError if their classes are not those of a checkpoint."""
    if is_shards(str(data_dir)):
        _, val, found = open_shards(str(data_dir), recipe)
    else:
        found = check_layout(data_dir)
        val = open_val(data_dir, found, recipe)
    if found != classes:
        differing = summarize(sorted(set(found) ^ set(classes)))
        raise LayoutError(
            f"{data_dir}: {len(found)} classes, the checkpoint has {len(classes)}; only one of the "
            f"two has {differing}"
        )
    return val


def train_loader(
    images: ImageFiles | Shards, batch_size: int, seed: int, *options: Any
) -> DataLoader:
    """A loader of this process's share of the training batches; `begin` sets the epoch.

    Args:
        batch_size: images per step over all processes.
        options: workers, pin_memory, timeout_s; see `utils.data.folders.make_loader`.
    """
    if isinstance(images, Shards):
        return make_loader(ShardBatches(images, batch_size, train=True), None, *options)
    return make_loader(images, TrainBatches(len(images), batch_size, seed), *options)


def eval_loader(images: ImageFiles | Shards, batch_size: int, *options: Any) -> DataLoader:
    """A loader of this process's share of the images, each once."""
    if isinstance(images, Shards):
        return make_loader(ShardBatches(images, batch_size, train=False), None, *options)
    batches = EvalBatches(len(images), max(1, batch_size // world_size()))
    return make_loader(images, batches, *options)


def begin(loader: DataLoader, epoch: int, first_step: int = 0) -> None:
    """Sets the epoch of a training loader's next pass, and how many of its batches are skipped."""
    (loader.batch_sampler or loader.dataset).begin(epoch, first_step)


def describe(images: ImageFiles | Shards) -> dict[str, Any] | None:
    """What identifies the images of shards when a run is resumed; None for class folders."""
    return {"files": images.index["files"]} if isinstance(images, Shards) else None
