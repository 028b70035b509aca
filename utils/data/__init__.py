"""Images from class folders or from shards, which offer the same attributes and loaders."""

import os
from pathlib import Path

from utils.cli import summarize, unicode_hint
from utils.data.folders import ImageFiles, Splits, open_folders
from utils.data.imagenet import LayoutError, check_layout
from utils.data.shards import Shards, open_shards
from utils.data.transforms import eval_transform
from utils.recipe import Recipe


def open_data(
    data_dir: str | Path, recipe: Recipe, seed: int = 0, val_share: float = 0.0
) -> Splits:
    """Opens the training and validation images of a folder, a brace pattern or a pipe of shards.

    Args:
        val_share: see `utils.data.folders.open_folders`.

    Raises:
        DataError: the folder or the shards are incomplete or inconsistent.
    """
    if not _is_shards(data_dir):
        return open_folders(data_dir, recipe, seed, val_share)
    if val_share:
        raise ValueError("--val-share is for class folders; shards hold a val split")
    return open_shards(data_dir, recipe, seed)


def open_val_data(
    data_dir: str | Path, classes: list[str], recipe: Recipe, val_share: float = 0.0
) -> ImageFiles | Shards:
    """Opens the validation images, of some or all of `classes`; LayoutError for other classes."""
    if val_share:
        val = open_data(data_dir, recipe, val_share=val_share).val
    elif _is_shards(data_dir):
        val = open_shards(data_dir, recipe).val
    else:
        found = check_layout(data_dir, ["val"])
        val = ImageFiles(Path(data_dir) / "val", found, eval_transform(recipe))
    if unknown := sorted(set(val.classes) - set(classes)):
        raise LayoutError(
            f"{data_dir}: classes that the network does not have: {summarize(unknown)}"
            f"{unicode_hint([*unknown, *classes])}"
        )
    return val


def _is_shards(data_dir: str | Path) -> bool:
    """Whether this is a brace pattern or a pipe of shards rather than a folder."""
    pattern = str(data_dir)
    return pattern.startswith("pipe:") or ("{" in pattern and not os.path.isdir(pattern))
