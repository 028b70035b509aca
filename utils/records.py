"""Files and records: atomic writes, folder locks, and the provenance of a number."""

import contextlib
import errno
import hashlib
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
from filelock import FileLock, Timeout

from utils.cli import DataError, warn

T = TypeVar("T")
PARTIAL = ".partial"  # suffix of a file that is being written
LOCK_NAME = ".lock"


def describe_machine() -> dict[str, Any]:
    """Versions, commit and hardware: what a reader needs to judge a number."""
    # str: torch.load(weights_only=True) refuses torch's own version class
    versions = {m.__name__: str(m.__version__) for m in (torch, torchvision, np, PIL)}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "hardware": {
            "cpu": _cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpus": torch.cuda.device_count(),
            "system": platform.platform(),
        },
    }


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """The columns of a record that say how and where a run was made.

    Args:
        config: the config of a run, or the result of `describe_machine` with a `command`.
    """
    return {
        "threads": config["hardware"]["threads"],
        "hardware": config["hardware"]["gpu"] or config["hardware"]["cpu"],
        "torch": config["versions"]["torch"],
        "commit": config["commit"],
        "command": config["command"],
    }


def command_line() -> str:
    """The running command, without the path of the interpreter."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically; makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_table(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV, atomically; makes the folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: pd.DataFrame(rows).to_csv(temporary, index=False))


def write_atomic(path: Path, write: Callable[[Path], T]) -> T:
    """Writes a temporary file, syncs it to the disk and renames it to `path`.

    Readers see the old file or the new one, never a part, also after a loss of power.

    Args:
        write: writes the temporary file, whose path it gets; its result is returned.

    Raises:
        OSError: the disk is full, or the folder is not writable; it names `path`.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        temporary.unlink(missing_ok=True)  # left by a kill; it may be a link to a file to keep
        result = write(temporary)
        _sync(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every system can open folders
            _sync(path.parent)
        return result
    except OSError as error:
        # The error of a full disk may name no file.
        if error.filename is not None and str(temporary) not in (error.filename, error.filename2):
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk needs the space


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Locks a folder against other processes by its file `.lock`; a kill ends the lock, too.

    Args:
        wait: whether to wait for another process that holds the lock, instead of an error.

    Raises:
        DataError: another process holds the lock, and `wait` is false.
        OSError: the folder is missing or not writable.
    """
    file_lock = FileLock(folder / LOCK_NAME, timeout=-1 if wait else 0)
    try:
        file_lock.acquire()
    except Timeout as error:
        raise DataError(
            f"{folder}: another process is working in this folder; wait until it ends, or choose "
            "another folder"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # of some network drives
            raise
        warn(f"{folder}: no file locks on this drive ({error.strerror}); use no second process")
    try:
        yield
    finally:
        file_lock.release()


def _commit() -> str:
    """The short hash of the checkout, with "+" if tracked files differ, or "unknown".

    Records under results/ do not count: runs that add to one change it.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        code = (":/", ":(top,exclude)results")
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    # Virtual machines may hide the model; the vector instructions tell generations apart.
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {vectors}, {os.cpu_count()} cores"
