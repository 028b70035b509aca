"""The check of a notebook's parameter cell: a wrong value ends in one line that says what is right.

Nothing is read or trained before: papermill, too, sets these values, and types them as it likes.
"""

import dataclasses
import difflib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.data import sample
from utils.data.boxes import open_boxes
from utils.data.imagenet import check_layout, sort_val
from utils.recipe import RECIPES, DetectorRecipe, Recipe
from utils.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, SCENES = ROOT / "data" / "sample", ROOT / "data" / "scenes"
MAX_SEED = 2**63 - 1  # of PyTorch's generators


class ParameterError(ValueError):
    """A parameter has a wrong value."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the line alone, for the cells above it are not to blame."""
        return [f"ParameterError: {self}"]


def validate_choice(names: Iterable[str], why: str = "", **values: Any) -> None:
    """ParameterError for a value that is none of `names`; of many names it tells the nearest.

    Args:
        why: ends the line, where it is not plain why there are no others.
    """
    names = list(names)
    for key, value in values.items():
        if not isinstance(value, str) or value not in names:
            nearest = names
            if len(names) > 8:
                nearest = difflib.get_close_matches(str(value), names, cutoff=0.5) or names
            raise ParameterError(f"{key}={value!r} must be one of {', '.join(nearest)}{why}")


def validate_choices(names: Iterable[str], **values: Any) -> None:
    """ParameterError for a value that is no list of `names`, each at most once, at least one."""
    names = list(names)
    for key, value in values.items():
        if not isinstance(value, (list, tuple)) or not value:
            raise ParameterError(f"{key}={value!r} must be a list of some of {', '.join(names)}")
        for k, each in enumerate(value):
            validate_choice(names, **{f"{key}[{k}]": each})
            if each in value[:k]:
                raise ParameterError(f"{key}={value!r} has {each!r} twice")


def validate_int(least: int, most: int, **values: Any) -> None:
    """ParameterError for a value that is no whole number of this range, as 2.5, "3" and True."""
    for key, value in values.items():
        if type(value) is not int or not least <= value <= most:
            wanted = f"a whole number, {least} to {most}"
            raise ParameterError(f"{key}={value!r} must be {wanted}")


def make_recipe(name: str, epochs: int | None = None, **changes: Any) -> Recipe:
    """The recipe of that name, with those of the changes that are not None.

    The warm-up takes half of the epochs at most, so that few epochs can be asked for.

    Raises:
        ParameterError: no such recipe, or a wrong value of a field.
    """
    validate_choice(RECIPES, recipe=name)
    if epochs is not None:
        validate_int(1, 10_000, epochs=epochs)
        changes["epochs"] = epochs
    values = dataclasses.asdict(RECIPES[name])
    values |= {key: value for key, value in changes.items() if value is not None}
    values["warmup_epochs"] = min(values["warmup_epochs"], values["epochs"] / 2)
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ParameterError(str(error)) from error


def make_detector_recipe(epochs: int) -> DetectorRecipe:
    """The detector's recipe in so many epochs, the warm-up half of them at most."""
    validate_int(1, 10_000, epochs=epochs)
    return DetectorRecipe(
        epochs=epochs, warmup_epochs=min(DetectorRecipe.warmup_epochs, epochs / 2)
    )


def _path(wanted: str, **value: Any) -> Path | None:
    """The one value as a path, None for ""; ParameterError for what is neither."""
    ((key, given),) = value.items()
    if not isinstance(given, (str, Path)):
        raise ParameterError(f"{key}={given!r} must be {wanted}")
    return None if given == "" else Path(given).expanduser()


@contextmanager
def _naming(**value: Any) -> Iterator[None]:
    """Names the one value before what is wrong with its file or folder, in a ParameterError."""
    try:
        yield
    except (ValueError, OSError) as error:
        ((key, given),) = value.items()
        raise ParameterError(f"{key}={str(given)!r}: {error}") from error


def data_folder(data_dir: str | Path) -> Path:
    """The folder with `train/` and `val/`; for "" the embedded sample, drawn and sorted if need be.

    Raises:
        ParameterError: not a path, or not a folder of at least two classes in this layout.
    """
    wanted = 'the path of a folder with train/ and val/, or "" for the embedded sample'
    folder = _path(wanted, data_dir=data_dir)
    if folder is None:
        folder = sample.draw(SAMPLE)
        sort_val(SAMPLE / "LOC_val_solution.csv", folder / "val")
        return folder
    with _naming(data_dir=data_dir):
        classes = check_layout(folder)
    if len(classes) < 2:
        raise ParameterError(
            f"data_dir={str(data_dir)!r} holds one class, {classes[0]}; two at least"
        )
    return folder


def boxes_folder(data_dir: str | Path) -> Path:
    """The folder of images with boxes; for "" the embedded sample's scenes, drawn if need be.

    Raises:
        ParameterError: not a path, or not a folder in COCO's layout.
    """
    wanted = 'the path of a folder in COCO\'s layout, or "" for the embedded scenes'
    folder = _path(wanted, data_dir=data_dir)
    if folder is None:
        return sample.draw_scenes(SCENES)
    with _naming(data_dir=data_dir):
        open_boxes(folder)
    return folder


def checkpoint_file(checkpoint: str | Path) -> Path | None:
    """The checkpoint of a run, None for "".

    Raises:
        ParameterError: not a path, or no whole checkpoint.
    """
    path = _path('the path of a run\'s checkpoint, or "" to train one', checkpoint=checkpoint)
    if path is not None:
        with _naming(checkpoint=checkpoint):
            load_checkpoint(path)
    return path


def run_folder(output_dir: str | Path, number: str, ours: str) -> Path:
    """The folder of a run: the one asked for, or for "" a new one below `runs/`, not yet made.

    Args:
        number: of the notebook; a new folder's name begins with it.
        ours: what a folder with anything in it holds if an earlier run left it, to go on from.

    Raises:
        ParameterError: not a path, or it holds something else.
    """
    wanted = 'the path of a new folder, or of a run to go on with, or ""'
    folder = _path(wanted, output_dir=output_dir)
    if folder is None:
        return ROOT / "runs" / f"{number}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and not folder.is_dir():
        raise ParameterError(f"output_dir={str(output_dir)!r} is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ours).exists():
        raise ParameterError(
            f"output_dir={str(output_dir)!r} holds other files and no run of this notebook; "
            "choose another"
        )
    return folder.absolute()
