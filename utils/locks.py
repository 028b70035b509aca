"""One process at a time in a folder."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from utils.errors import DataError, warn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

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
