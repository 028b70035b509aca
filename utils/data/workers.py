"""What decodes images: threads or processes; whom those obey, and how a run ends if one dies or
hangs.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from utils.cli import DataError


class WorkerError(ChildProcessError):
    """A decoding process died or gave no batch in time; the text is one line."""


def shared_memory() -> str:
    """How much there is, on Linux."""
    try:
        there = os.statvfs("/dev/shm")
    except (AttributeError, OSError):
        return "/dev/shm is not there"
    return f"/dev/shm has {there.f_blocks * there.f_frsize / 1e6:.3g} MB"


def watched(loader: DataLoader, timeout_s: float = 0) -> Iterator[Any]:
    """A loader's batches; an error of a worker's comes in the place of its batch.

    By itself PyTorch would raise it at the moment of a worker's death, amid a step for one, through
    SIGCHLD, and wait for ever for a worker that is stopped.

    Args:
        timeout_s: how long to wait for a batch before an error; 0 for ever, as outside of the main
            thread.

    Raises:
        WorkerError: a worker died, or gave nothing for so long, and all of them are killed; or
            has no shared memory.
        DataError: of a broken shard.
    """
    with _own_signals(loader):
        is_new = loader.num_workers and loader._iterator is None
        with _naming_workers(loader, timeout_s):
            batches = iter(loader)  # waits for workers that have made a pass before
        if is_new:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch has put its own there
            # As the last thing before Python joins its children, some of which may be stopped.
            Finalize(batches, _end, args=(batches._workers,), exitpriority=0)
        for count in itertools.count():
            with _naming_workers(loader, timeout_s, count):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, (DataError, WorkerError)):
                raise batch
            yield batch


class _LateError(BaseException):
    """A wait took too long; no Exception, as PyTorch catches those."""


def _raise_late(number: int, frame: FrameType | None) -> None:
    raise _LateError


@contextmanager
def _own_signals(loader: DataLoader) -> Iterator[None]:
    handlers = {}
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        handlers = {signal.SIGCHLD: signal.SIG_DFL, signal.SIGALRM: _raise_late}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _naming_workers(
    loader: DataLoader, timeout_s: float, count: int | None = None
) -> Iterator[None]:
    """Says which worker died in the block, or kept it waiting; then ends all of them.

    Args:
        count: number of the batch that the block waits for; None if it waits for all workers.
    """
    has_alarm = loader.num_workers and signal.getsignal(signal.SIGALRM) is _raise_late
    try:
        if has_alarm:  # again and again, as an exception may be lost in a destructor
            signal.setitimer(signal.ITIMER_REAL, timeout_s, 1)
        try:
            yield
        finally:
            if has_alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except (_LateError, RuntimeError, OSError, EOFError) as error:
        batches = loader._iterator
        if batches is None:
            raise
        # The broken connection to a worker may be seen before its death is.
        connection.wait([worker.sentinel for worker in batches._workers], timeout=1)
        dead = [str(worker.pid) for worker in batches._workers if not worker.is_alive()]
        if dead:
            text = f"a decoding process died (pid {', '.join(dead)}); out of memory, or of shared "
            text += f"memory ({shared_memory()})? try fewer --workers, or --workers 0"
        elif isinstance(error, _LateError):
            text = f"{_silent(batches._workers, count)} gave no batch in {timeout_s:g} s; is its "
            text += "disk there? --timeout-s sets the time"
        else:
            raise
        _end(batches._workers)
        batches._shutdown, loader._iterator = True, None  # PyTorch would wait for them
        raise WorkerError(text) from error


def _silent(workers: list[multiprocessing.Process], count: int | None) -> str:
    """Number and process id of the worker to blame: one that is stopped, or whose turn it is.

    One that is stopped may keep the queue from the others, whosever turn it is.
    """
    turn = range(len(workers)) if count is None else [count % len(workers)]
    which = [k for k, worker in enumerate(workers) if _is_stopped(worker.pid)] or turn
    names = [f"{k} of {len(workers)} (pid {workers[k].pid})" for k in which]
    return f"decoding process {', '.join(names)}"


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "Tt"
    except OSError:  # gone, or not Linux
        return False


def _end(workers: list[multiprocessing.Process]) -> None:
    """Kills decoding processes, which have nothing to lose."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)
        if worker.is_alive():  # in a system call that never ends, and Python would wait for it
            multiprocessing.process._children.discard(worker)
