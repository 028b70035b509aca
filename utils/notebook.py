"""Validation of a notebook's parameter cell, before anything is read or trained.

Every function here raises ParameterError for a wrong value: one line with its name, the value and
what it must be. papermill also sets these values, from the command line and with types of its own
choice.
"""

import dataclasses
import difflib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from backbones import create
from utils.data import sample
from utils.data.boxes import open_boxes
from utils.data.imagenet import check_layout, sort_val
from utils.recipe import RECIPES, DetectorRecipe, Recipe
from utils.records import LOCK_NAME
from utils.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, SCENES = ROOT / "data" / "sample", ROOT / "data" / "scenes"
MAX_SEED = 2**63 - 1  # of PyTorch's generators
MAX_EPOCHS = 10_000
T = TypeVar("T", Recipe, DetectorRecipe)


class ParameterError(ValueError):
    """A parameter has a wrong value."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line alone, because the cells are not at fault."""
        return [f"ParameterError: {self}"]


def validate_choice(names: Iterable[str], why: str = "", **values: Any) -> None:
    """Each value is one of `names`; of many, the error lists the nearest.

    Args:
        why: ends the line, to explain the choice.
    """
    names = list(names)
    for key, value in values.items():
        nearest = difflib.get_close_matches(str(value), names, cutoff=0.5)
        shown = nearest if len(names) > 8 and nearest else names
        good = isinstance(value, str) and value in names
        _require(good, key, value, f"one of {', '.join(shown)}{why}")


def validate_choices(names: Iterable[str], **values: Any) -> None:
    """Each value is a list of one or more of `names`, each once."""
    names = list(names)
    for key, value in values.items():
        good = isinstance(value, (list, tuple)) and len(value) > 0
        _require(good, key, value, f"a list of some of {', '.join(names)}")
        for k, each in enumerate(value):
            validate_choice(names, **{f"{key}[{k}]": each})
        _require(len(set(value)) == len(value), key, value, "a list of different names")


def validate_int(low: int, high: int, **values: Any) -> None:
    """Each value is an int from `low` to `high`."""
    for key, value in values.items():
        good = type(value) is int and low <= value <= high  # True is an instance of int
        _require(good, key, value, f"an integer from {low} to {high}")


def _require(good: bool, key: str, value: Any, wanted: str) -> None:
    if not good:
        raise ParameterError(f"{key}={value!r} must be {wanted}")


def make_recipe(name: str, epochs: int | None = None, **changes: Any) -> Recipe:
    """The recipe of that name with the changes that are not None.

    The warm-up takes at most half of the epochs, so that short runs are possible.
    """
    validate_choice(RECIPES, recipe=name)
    changes = {key: value for key, value in changes.items() if value is not None}
    epochs = RECIPES[name].epochs if epochs is None else epochs
    return _with_epochs(RECIPES[name], epochs, **changes)


def make_detector_recipe(epochs: int) -> DetectorRecipe:
    """The detector's recipe with this number of epochs; at most half of them are warm-up."""
    return _with_epochs(DetectorRecipe(), epochs)


def _with_epochs(recipe: T, epochs: int, **changes: Any) -> T:
    validate_int(1, MAX_EPOCHS, epochs=epochs)
    warmup_epochs = min(changes.pop("warmup_epochs", recipe.warmup_epochs), epochs / 2)
    try:
        return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup_epochs, **changes)
    except ValueError as error:
        raise ParameterError(str(error)) from error


def data_folder(data_dir: str | Path) -> Path:
    """The folder with `train/` and `val/` of at least two classes; for "" the embedded sample.

    The sample is drawn and sorted if it is not there yet.
    """
    wanted = 'a folder with train/ and val/, or "" for the embedded sample'
    folder = _validate_path("data_dir", data_dir, wanted, check_layout)
    if folder is None:
        folder = sample.draw(SAMPLE)
        sort_val(SAMPLE / "LOC_val_solution.csv", folder / "val")
    return folder


def boxes_folder(data_dir: str | Path) -> Path:
    """The folder of images with boxes in COCO's layout; for "" the sample's scenes, drawn here."""
    wanted = 'a folder in COCO\'s layout, or "" for the embedded scenes'
    folder = _validate_path("data_dir", data_dir, wanted, open_boxes)
    return folder or sample.draw_scenes(SCENES)


def checkpoint_file(checkpoint: str | Path) -> Path | None:
    """The complete checkpoint of a run; None for ""."""
    wanted = 'a run\'s checkpoint, or "" to train one'
    return _validate_path("checkpoint", checkpoint, wanted, load_checkpoint)


def validate_weights(
    backbone: str, weights: str, options: dict[str, Any], data_dir: str | Path
) -> None:
    """`weights` is a file of the backbone's weights or a published name, or "" for the sample."""
    wanted = "a file or a name of backbones.list_weights() where there is a data_dir"
    _require(bool(weights) or not data_dir, "weights", weights, wanted)
    try:
        create(backbone, weights=weights or None, **options)
    except ValueError as error:
        raise ParameterError(f"weights={weights!r}: {error}") from error


def run_folder(output_dir: str | Path, number: str, ours: str) -> Path:
    """The folder of a run; for "" a new one below `runs/`, not created yet.

    Args:
        number: number of the notebook; a new folder's name begins with it.
        ours: a name that the folder of an earlier run of the notebook, to resume, has in it.
    """

    def check(folder: Path) -> None:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if names - {LOCK_NAME} and ours not in names:
            raise ValueError("holds other files and no run of this notebook; choose another folder")

    wanted = 'a new folder, or of a run to resume, or ""'
    folder = _validate_path("output_dir", output_dir, wanted, check)
    return (folder or ROOT / "runs" / f"{number}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


def _validate_path(key: str, value: Any, wanted: str, check: Callable[[Path], Any]) -> Path | None:
    """The value as a path that passes `check`, whose errors end the line; None for ""."""
    _require(isinstance(value, (str, Path)), key, value, f"the path of {wanted}")
    if value == "":
        return None
    path = Path(value).expanduser()
    try:
        check(path)
    except (ValueError, OSError) as error:
        raise ParameterError(f"{key}={str(value)!r}: {error}") from error
    return path
