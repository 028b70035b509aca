"""A user's mistakes: one clear line on stderr and an exit code, never a traceback.

`EXIT_CODES` are those of every script; 75 is EX_TEMPFAIL of sysexits.h.
"""

import argparse
import importlib
import io
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, NoReturn

from tqdm import tqdm

OK, BAD_DATA, BAD_USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
EXIT_CODES = """\
Exit codes of every script: 0, done; 1, the data or a file is not right, memory ran out, or training
failed; 2, a wrong option or path; 75, stopped by a signal and saved, so run the same command again;
130, interrupted at once."""

NO_MEMORY = re.compile(
    "(can't allocate|cannot allocate|not enough|out of|insufficient) memory|ALLOC_FAILED",
    re.IGNORECASE,
)
CLOSE_OTHERS = "again with other programs closed"


class DataError(ValueError):
    """A file or folder is not as it should be; the text is one line that names it."""


class OutOfMemory(MemoryError):
    """Memory ran out; the text is one line that says what helps."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work after everything was saved; the text says how to go on."""


class Parser(argparse.ArgumentParser):
    """A parser whose help is the module's docstring and the exit codes, and errors one line."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("epilog", EXIT_CODES)
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and ".tar" in message:
            message = "many .tar arguments where one is taken: quote the brace pattern"
        print(f"error: {message}; --help lists the options", file=sys.stderr)
        sys.exit(BAD_USAGE)


def int_at_least(least: int) -> Callable[[str], int]:
    """An argument's type: an integer of at least so much."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {least}")
        return value

    return convert


def import_optional(package: str, what_for: str) -> ModuleType:
    """A package that not everybody has, imported; ValueError where it is not installed.

    Args:
        what_for: ends the line that tells of it, such as "to compare with it".
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: pip install {package} {what_for}") from error


def printable(text: str) -> str:
    """One line that any terminal shows: line breaks, controls and stray bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def summarize(items: Sequence[str]) -> str:
    """Returns the count and the first three, as in "5 (a, b, c, ...)", on one printable line."""
    shown = [item if item.isprintable() else ascii(item) for item in items[:3]]
    return f"{len(items)} ({', '.join(shown + ['...'] * (len(items) > 3))})"


def warn(line: str) -> None:
    """Tells in one line of something that is not as it should be, and does no harm by itself."""
    print(f"warning: {printable(line)}", file=sys.stderr)


@contextmanager
def starting() -> Iterator[None]:
    """Ends the process in one line at a SIGINT that comes while the block imports slow modules."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or another's
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    yield
    signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    # No exception, which half an import may catch, lose or wrap.
    os._exit(_tell("interrupted", "nothing had begun", INTERRUPTED))


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, PyTorch's on a CPU or a GPU, OpenCV's, or a GPU's."""
    of_library = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    return isinstance(error, MemoryError) or (
        of_library and NO_MEMORY.search(str(error)) is not None
    )


@contextmanager
def advising_on_memory(advice: str) -> Iterator[None]:
    """Where memory runs out in the block, an OutOfMemory that says what helps."""
    try:
        yield
    except Exception as error:  # OpenCV's is of no other kind
        if isinstance(error, OutOfMemory) or not is_of_memory(error):
            raise
        where = " on the GPU" * ("CUDA" in str(error))
        raise OutOfMemory(f"not enough memory{where}; try {advice}") from error


def exit_code(work: Callable[[], int | None], memory_advice: str = CLOSE_OTHERS) -> int:
    """Runs `work` and returns its exit code; what a user can mend is told in one line.

    Args:
        memory_advice: what else helps where memory runs out, and nothing inside of `work` says so.
    """
    for stream in (sys.stdout, sys.stderr):  # a folder's name may hold any bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with advising_on_memory(memory_advice):
            return work() or OK
    except Stopped as error:
        return _tell("stopped", error, STOPPED)
    except KeyboardInterrupt as error:
        hint = str(error) or "the same command goes on from what was saved"
        return _tell("interrupted", hint, INTERRUPTED)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _tell("error", _of_system(error), BAD_USAGE)
    except OSError as error:
        return _tell("error", _of_system(error), BAD_DATA)
    except OutOfMemory as error:
        return _tell("error", error, BAD_DATA)
    except (DataError, ArithmeticError) as error:
        return _tell("error", error, BAD_DATA)
    except ValueError as error:
        return _tell("error", error, BAD_USAGE)


def _of_system(error: OSError) -> str:
    """Path and reason, without the number that Python puts first."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _tell(kind: str, reason: object, code: int) -> int:
    line = f"{kind}: {_who()}{reason}"
    print(printable(" ".join(line.splitlines())), file=sys.stderr)
    return code


def _who() -> str:
    """Which of torchrun's processes speaks, if it is one of them."""
    if not {"LOCAL_RANK", "RANK"} <= os.environ.keys():
        return ""
    return f"rank {os.environ['RANK']} on {socket.gethostname()}: "


class NotebookBar(tqdm):
    """A bar that redraws itself in place as plain text.

    A saved notebook then holds the last state only; tqdm's own bars would leave a widget that
    GitHub cannot show, or a line of stderr per redraw.
    """

    _handle = None

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        from IPython.display import display

        text = {"text/plain": str(self) if msg is None else msg}
        if self._handle is None:
            self._handle = display(text, raw=True, display_id=True)
        else:
            self._handle.update(text, raw=True)
        return True

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to clear: the text is not on a terminal's line."""

    @classmethod
    def write(cls, s: str, *args: Any, **kwargs: Any) -> None:
        print(s)


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm with these arguments, drawn for where it runs."""
    if not _in_notebook():
        interval_s = 0.1 if sys.stderr.isatty() else 10  # a log file needs no animation
        return tqdm(*args, dynamic_ncols=True, mininterval=interval_s, **kwargs)
    # What tqdm writes to its file beside the bar, a newline at the end, no notebook should keep.
    return NotebookBar(*args, ncols=100, file=io.StringIO(), **kwargs)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # a kernel has imported it; nothing else needs it here
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
