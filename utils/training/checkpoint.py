"""A run's folder: what was run, what came of it, and the state to go on from.

- `config.json`: recipe, backbone, seed, classes, command, versions, commit, hardware
- `metrics.csv`: one row per epoch of what the seed determines
- `speed.csv`: one row per epoch of what the machine determines
- `last.pt`: weights, averaged weights, optimizer, step and the rows so far
- `best.pt`: the same, at the epoch with the best averaged weights; `epoch_0010.pt` if asked for
- `curves.png`: drawn by `utils.plotting` when the run ends
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.cli import DataError, is_of_memory
from utils.records import PARTIAL, lock, write_atomic, write_json, write_table

# What may differ between two starts of one run: where and by whom it is run, not what it computes.
PROVENANCE = ("command", "versions", "commit", "hardware", "workers", "data_dir", "compile")

# What a checkpoint holds, and what everything that reads one needs of its config.
CHECKPOINTED = {
    **dict.fromkeys(("config", "model", "ema", "optimizer", "schedule", "under_way"), dict),
    **dict.fromkeys(("metrics", "speed", "skipped"), list),
    "step": int,
}
CONFIGURED = {"recipe": dict, "classes": list}

DIVERGED = "diverged.json"  # the images of the step at which a loss was not finite


class RunError(DataError):
    """A run folder that cannot be used as asked; the message names it."""


@contextlib.contextmanager
def open_run(run_dir: Path, config: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Keeps a run's folder for this process, and gives the checkpoint to go on from, if any.

    Raises:
        RunError: the folder holds another run or something else; the message names the first entry
            that differs. Nothing in it has changed.
        DataError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with lock(run_dir, wait=False):
        yield _ready(run_dir, config)


def _ready(run_dir: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    path, last = run_dir / "config.json", run_dir / "last.pt"
    config = json.loads(json.dumps(config))
    if last.exists():
        validate_same_run(run_dir, _read_config(path), config)
        checkpoint = load_checkpoint(last)
        validate_same_run(last, checkpoint["config"], config)
        return checkpoint
    # Without a checkpoint nothing of an earlier start is worth keeping.
    ours = (path.name, last.name, DIVERGED)
    if any(entry.name.removesuffix(PARTIAL) not in ours for entry in run_dir.iterdir()):
        raise RunError(f"{run_dir}: holds other files and no run; choose another --output-dir")
    write_json(path, config)
    return None


def save_checkpoint(run_dir: Path, checkpoint: dict[str, Any], keep_every: int = 0) -> None:
    """Writes last.pt, the tables of its rows, and what else is kept at the end of an epoch.

    Each file appears whole or not at all, and the one before it stays until then.

    Args:
        keep_every: also keep every so many epochs' checkpoint; 0 for none.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_atomic(run_dir / "last.pt", lambda aside: _save_tensors(checkpoint, aside))
    end_save(run_dir, checkpoint, keep_every)


def end_save(run_dir: Path, checkpoint: dict[str, Any], keep_every: int) -> None:
    """All that follows from last.pt, and may be done again."""
    rows = checkpoint["metrics"]
    if not rows:
        return
    for name in ("metrics", "speed"):
        write_table(run_dir / f"{name}.csv", checkpoint[name])
    if checkpoint["step"] != rows[-1]["step"]:  # amid an epoch
        return
    names = []
    if max(row["ema_val_top1_pct"] for row in rows) == rows[-1]["ema_val_top1_pct"]:
        names.append("best.pt")
    if keep_every and rows[-1]["epoch"] % keep_every == 0:
        names.append(f"epoch_{rows[-1]['epoch']:04d}.pt")
    for name in names:
        write_atomic(run_dir / name, lambda aside: _link(run_dir / "last.pt", aside))


def log_tensorboard(run_dir: Path, *rows: dict[str, float]) -> None:
    """Adds rows of one epoch to the folder's TensorBoard log (needs the package tensorboard)."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

    with SummaryWriter(run_dir) as writer:
        for row in rows:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `save_checkpoint`, on the CPU. No code of the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        RunError: it is no checkpoint, or not one of this project.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would keep us waiting
        if path.exists():
            raise RunError(f"{path}: not a checkpoint, no file at all")
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        if damage := _damage(path):
            raise RunError(f"{path}: not a whole checkpoint ({damage})")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: what comes of them is looked at below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RunError, MemoryError):
        raise
    except zipfile.BadZipFile as error:
        raise RunError(f"{path}: not a checkpoint, or cut short") from error
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: not a checkpoint, or one that would run code") from error
    except Exception as error:  # torch raises many types for broken files
        if is_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise RunError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINTED.keys():
        raise RunError(f"{path}: not a checkpoint of scripts/train.py")
    for key, kind in CHECKPOINTED.items():
        if not isinstance(checkpoint[key], kind):
            raise RunError(f"{path}: not a checkpoint of scripts/train.py ({key} is no {kind})")
    try:
        checkpoint["config"] = json.loads(json.dumps(checkpoint["config"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a checkpoint of scripts/train.py (its config)") from error
    if key := _odd_entry(checkpoint["config"]):
        raise RunError(f"{path}: not a checkpoint of scripts/train.py (its config's {key})")
    return checkpoint


def _odd_entry(config: dict[str, Any]) -> str | None:
    """The first entry that is missing from a config, or of another type than it should be."""
    return next(
        (key for key in CONFIGURED if not isinstance(config.get(key), CONFIGURED[key])), None
    )


def _damage(path: Path) -> str | None:
    """What is wrong with the zip archive that a checkpoint is; PyTorch checks no checksums.

    Raises:
        Exception: it is no zip archive at all, or broken.
    """
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():  # PyTorch packs nothing; a small file could unpack to much
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                return f"{info.filename} in it is compressed"
        bad = archive.testzip()
    return bad and f"{bad} in it is damaged"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise RunError(f"{path}: missing or not readable beside last.pt; restore it")
    if key := _odd_entry(config):
        raise RunError(f"{path}: not a config of scripts/train.py (its {key}); restore it")
    return config


def validate_same_run(run_dir: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """RunError that names the first entry in which a run's config and what is asked differ."""
    for key in ["recipe", *sorted(there.keys() | asked.keys())]:  # what follows from it, later
        old, new = there.get(key), asked.get(key)
        if key in PROVENANCE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(old.keys() | new.keys())
            key = next((k for k in keys if old.get(k) != new.get(k)), None)
            if key is None:  # they differ in what is nothing
                continue
            old, new = old.get(key), new.get(key)
        if isinstance(old, list) and isinstance(new, list):  # of classes: long, and alike
            pairs = enumerate(itertools.zip_longest(old, new))
            place, (old, new) = next((k, pair) for k, pair in pairs if pair[0] != pair[1])
            key = f"{key}[{place}]"
        raise RunError(
            f"{run_dir}: holds a run with {key}={_brief(old)}, not {_brief(new)}; "
            "repeat its command, or choose another folder"
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _save_tensors(value: Any, path: Path) -> None:
    # PyTorch's own writer hides the reason when a disk is full.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with path.open("wb") as file:
        file.write(buffer.getbuffer())


def _link(source: Path, path: Path) -> None:
    """A second name for a file that is never changed, or a copy where there are no such names."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
