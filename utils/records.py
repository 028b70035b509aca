"""Records and files: atomic writes, folder locks, and what a record says of its machine."""

import contextlib
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import PIL
import torch
import torchvision

from utils.cli import DataError, warn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

T = TypeVar("T")
PARTIAL = ".partial"  # of a file that is being written


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


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """The columns of a record that say how a run was made.

    Args:
        config: a run's, or `describe_machine`'s result with the `command`.
    """
    return {
        "threads": config["hardware"]["threads"],
        "hardware": config["hardware"]["gpu"] or config["hardware"]["cpu"],
        "torch": config["versions"]["torch"],
        "commit": config["commit"],
        "command": config["command"],
    }


def command_line() -> str:
    """The command that runs now, without the interpreter's path."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; the file appears whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda aside: aside.write_text(text))


def write_table(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda aside: pd.DataFrame(rows).to_csv(aside, index=False))


def write_atomic(path: Path, write: Callable[[Path], T]) -> T:
    """Writes a file beside `path` and renames it into place, so that `path` is never half a file.

    Its bytes and its name are on the disk before this returns: a machine may lose its power then.

    Args:
        write: gets the path to write to; whatever it raises, that file is removed.

    Returns:
        What `write` returns.

    Raises:
        OSError: the disk is full, or the folder cannot be written; it names `path`.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        aside.unlink(missing_ok=True)  # of a kill; it may be a link to a file that is kept
        result = write(aside)
        _put_in_place(aside, path)
        return result
    except OSError as error:
        # A full disk shows in calls that know no name.
        if error.filename is not None and str(aside) not in (error.filename, error.filename2):
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # a full disk needs the room


def _put_in_place(aside: Path, path: Path) -> None:
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)  # leaves both where both are names of one file
    with contextlib.suppress(OSError):  # not every system opens folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    # Virtual machines name generations alike that differ in what they compute in one instruction.
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {vectors}, {os.cpu_count()} cores"


_held: set[int] = set()  # open handles of this process's locked folders


@contextlib.contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keeps a folder for this process; the lock ends with the process, even killed.

    It is on the folder itself, and leaves no file in it. Windows has no such locks, nor have some
    network drives: there nothing is kept apart, and of such a drive a line warns.

    Args:
        wait: until another process has left the folder, instead of an error.

    Raises:
        DataError: another process is at work there, and `wait` is false.
        OSError: the folder is missing, or cannot be read.
    """
    if fcntl is None:
        yield
        return
    _leave_to_parent()
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        _release(handle)
        raise DataError(
            f"{folder}: another process is at work in this folder; "
            "wait until it ends, or choose another"
        ) from error
    except OSError as error:
        warn(
            f"{folder}: its drive locks no folders ({error.strerror}); "
            "see to it that no other process works there"
        )
    try:
        yield
    finally:
        _release(handle)


@functools.cache
def _leave_to_parent() -> None:
    # A lock is shared with forked processes: decoding ones would keep it for seconds after the
    # process that they decode for was killed.
    os.register_at_fork(after_in_child=lambda: [_release(handle) for handle in tuple(_held)])


def _release(handle: int) -> None:
    if handle in _held:
        _held.remove(handle)
        os.close(handle)
