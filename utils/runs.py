"""A run's folder: what was run, what came of it, and the state to go on from.

- `config.json`: recipe, backbone, seed, classes, command, versions, commit, hardware
- `metrics.csv`: one row per epoch of what the seed determines
- `speed.csv`: one row per epoch of what the machine determines
- `last.pt`: weights, averaged weights, optimizer, step and the rows so far
- `curves.png`: drawn by `utils.plotting` when the run ends
"""

import json
import os
import pickle
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL
import torch
import torchvision

# What may differ between two starts of one run: where and by whom it is run, not what it computes.
PROVENANCE = ("command", "versions", "commit", "hardware", "workers", "data_dir", "compile")

CHECKPOINT_KEYS = {
    *("config", "model", "ema", "optimizer", "schedule"),
    *("step", "metrics", "speed", "skipped"),
}


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message names it."""


def describe_machine() -> dict[str, Any]:
    """Versions, commit and hardware: what a number needs beside it to be believed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # str: torch.load(weights_only=True) refuses torch's own class of versions
    versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, np, PIL)}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "gpus": torch.cuda.device_count(),
            "system": platform.platform(),
        },
    }


def command_line() -> str:
    """The command that runs now, without the interpreter's path."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Writes config.json, or checks that the one there describes the same run.

    Raises:
        RunError: the folder holds another run; the message names the first entry that differs.
    """
    path = run_dir / "config.json"
    if (run_dir / "last.pt").exists():
        refuse_other_run(run_dir, _read_config(path), json.loads(json.dumps(config)))
        return
    # Without a checkpoint nothing of an earlier start is worth keeping.
    ours = (path.name, path.name + ".partial", "last.pt.partial")
    if run_dir.is_dir() and any(entry.name not in ours for entry in run_dir.iterdir()):
        raise RunError(f"{run_dir}: holds other files and no run; choose another --output-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, config)


def save_checkpoint(run_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Writes last.pt, then the tables of its rows; each appears whole or not at all."""
    _replace(run_dir / "last.pt", lambda aside: torch.save(checkpoint, aside))
    save_tables(run_dir, checkpoint)


def save_tables(run_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Writes metrics.csv and speed.csv from the rows in a checkpoint."""
    for name in ("metrics", "speed"):
        write_table(run_dir / f"{name}.csv", checkpoint[name])


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; the file appears whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    _replace(path, lambda aside: aside.write_text(text))


def write_table(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda aside: pd.DataFrame(rows).to_csv(aside, index=False))


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
        RunError: the file is missing, no checkpoint, or not one of this project.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: not a checkpoint, or one that would run code") from error
    except Exception as error:  # torch raises many types for broken files
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise RunError(f"{path}: not a checkpoint of scripts/train.py")
    return checkpoint


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise RunError(f"{path}: missing or not readable beside last.pt; restore it")
    return config


def refuse_other_run(run_dir: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """RunError that names the first entry in which a run's config and what is asked differ."""
    for key in ["recipe", *sorted(there.keys() | asked.keys())]:  # what follows from it, later
        old, new = there.get(key), asked.get(key)
        if key in PROVENANCE or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            old, new = old.get(key), new.get(key)
        raise RunError(
            f"{run_dir}: holds a run with {key}={old!r}, not {new!r}; "
            "repeat its command, or choose another folder"
        )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path` and renames into place, so that `path` is never half a file."""
    aside = path.with_name(path.name + ".partial")
    write(aside)
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def _commit() -> str:
    """Short hash of the checkout, with "+" after it if files differ from it, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
