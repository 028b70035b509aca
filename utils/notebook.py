"""Validation of a notebook's parameter cell: a wrong value is an error in one line.

It runs before anything is read or trained. papermill also sets these values, from the command line
and with types of its own choice.
"""

import dataclasses
import difflib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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


class ParameterError(ValueError):
    """A parameter has a wrong value."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line alone, because the cells are not at fault."""
        return [f"ParameterError: {self}"]


def validate_choice(names: Iterable[str], why: str = "", **values: Any) -> None:
    """Raises ParameterError for a value that is not one of `names`; of many it lists the nearest.

    Args:
        why: ends the line, to explain the choice.
    """
    names = list(names)
    for key, value in values.items():
        if not isinstance(value, str) or value not in names:
            nearest = difflib.get_close_matches(str(value), names, cutoff=0.5)
            shown = nearest if len(names) > 8 and nearest else names
            raise ParameterError(f"{key}={value!r} must be one of {', '.join(shown)}{why}")


def validate_choices(names: Iterable[str], **values: Any) -> None:
    """Raises ParameterError for a value that is not a list of one or more of `names`, each once."""
    names = list(names)
    for key, value in values.items():
        if not isinstance(value, (list, tuple)) or not value:
            raise ParameterError(f"{key}={value!r} must be a list of some of {', '.join(names)}")
        for k, each in enumerate(value):
            validate_choice(names, **{f"{key}[{k}]": each})
            if each in value[:k]:
                raise ParameterError(f"{key}={value!r} has {each!r} twice")


def validate_int(low: int, high: int, **values: Any) -> None:
    """Raises ParameterError for a value that is not an int from `low` to `high`."""
    for key, value in values.items():
        if type(value) is not int or not low <= value <= high:  # True is an instance of int
            raise ParameterError(f"{key}={value!r} must be an integer from {low} to {high}")


def make_recipe(name: str, epochs: int | None = None, **changes: Any) -> Recipe:
    """The recipe of that name with the changes that are not None.

    The warm-up takes at most half of the epochs, so that short runs are possible.

    Raises:
        ParameterError: no such recipe, or a wrong value of a field.
    """
    validate_choice(RECIPES, recipe=name)
    if epochs is not None:
        validate_int(1, MAX_EPOCHS, epochs=epochs)
    changes = {key: value for key, value in changes.items() if value is not None}
    values = dataclasses.asdict(RECIPES[name]) | changes
    values["epochs"] = epochs or values["epochs"]
    values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 2)
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ParameterError(str(error)) from error


def make_detector_recipe(epochs: int) -> DetectorRecipe:
    """The detector's recipe with this number of epochs; at most half of them are warm-up."""
    validate_int(1, MAX_EPOCHS, epochs=epochs)
    warmup_epochs = min(DetectorRecipe.warmup_epochs, epochs / 2)
    return DetectorRecipe(epochs=epochs, warmup_epochs=warmup_epochs)


def _validate_path(wanted: str, check: Callable[[Path], Any], **value: Any) -> Path | None:
    """The one value as a path that passes `check`; None for "".

    Raises:
        ParameterError: the value is not a path; or `check` raises, and the line says why.
    """
    ((key, given),) = value.items()
    if not isinstance(given, (str, Path)):
        raise ParameterError(f"{key}={given!r} must be {wanted}")
    if given == "":
        return None
    path = Path(given).expanduser()
    try:
        check(path)
    except (ValueError, OSError) as error:
        raise ParameterError(f"{key}={str(given)!r}: {error}") from error
    return path


def data_folder(data_dir: str | Path) -> Path:
    """The folder with `train/` and `val/` of at least two classes; for "" the embedded sample.

    The sample is drawn and sorted if it is not there yet.

    Raises:
        ParameterError: not a path, or not a folder of this layout.
    """

    def check(folder: Path) -> None:
        if len(classes := check_layout(folder)) < 2:
            raise ValueError(f"holds one class, {classes[0]}; needs at least two")

    wanted = 'the path of a folder with train/ and val/, or "" for the embedded sample'
    folder = _validate_path(wanted, check, data_dir=data_dir)
    if folder is None:
        folder = sample.draw(SAMPLE)
        sort_val(SAMPLE / "LOC_val_solution.csv", folder / "val")
    return folder


def boxes_folder(data_dir: str | Path) -> Path:
    """The folder of images with boxes; for "" the sample's scenes, drawn if need be.

    Raises:
        ParameterError: not a path, or not a folder in COCO's layout.
    """
    wanted = 'the path of a folder in COCO\'s layout, or "" for the embedded scenes'
    return _validate_path(wanted, open_boxes, data_dir=data_dir) or sample.draw_scenes(SCENES)


def checkpoint_file(checkpoint: str | Path) -> Path | None:
    """The checkpoint of a run, None for "".

    Raises:
        ParameterError: not a path, or not a complete checkpoint.
    """
    wanted = 'the path of a run\'s checkpoint, or "" to train one'
    return _validate_path(wanted, load_checkpoint, checkpoint=checkpoint)


def run_folder(output_dir: str | Path, number: str, ours: str) -> Path:
    """The folder of a run; for "" a new one below `runs/`, not created yet.

    Args:
        number: of the notebook; a new folder's name begins with it.
        ours: a name that the folder of an earlier run of the notebook, to resume, has in it.

    Raises:
        ParameterError: not a path, or the folder holds something else.
    """

    def check(folder: Path) -> None:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if names - {LOCK_NAME} and ours not in names:
            raise ValueError("holds other files and no run of this notebook; choose another folder")

    wanted = 'the path of a new folder, or of a run to resume, or ""'
    folder = _validate_path(wanted, check, output_dir=output_dir)
    return (folder or ROOT / "runs" / f"{number}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
