"""A user's mistakes: one clear line on stderr and an exit code, never a traceback.

Exit codes of every script: 0, done; 1, the data or a file is not right, or training failed; 2, bad
usage: an option, a value or a path that is not there; 75, stopped by a signal with everything saved
(EX_TEMPFAIL of sysexits.h: run the same command again); 130, interrupted at once.
"""

import argparse
import importlib
import io
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, NoReturn

OK, BAD_DATA, BAD_USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


class DataError(ValueError):
    """A file or folder is not as it should be; the text is one line that names it."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work after everything was saved; the text says how to go on."""


class Parser(argparse.ArgumentParser):
    """An argument parser with the module's docstring for its help, and errors of one line."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and ".tar" in message:
            message = "many .tar arguments where one is taken: quote the brace pattern"
        print(f"error: {message}; --help lists the options", file=sys.stderr)
        sys.exit(BAD_USAGE)


def whole_number(least: int) -> Callable[[str], int]:
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


def needed(package: str, what_for: str) -> ModuleType:
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


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs `work` and returns its exit code; what a user can mend is told in one line."""
    for stream in (sys.stdout, sys.stderr):  # a folder's name may hold any bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
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
    except MemoryError as error:
        return _tell("error", f"not enough memory {error}".strip(), BAD_DATA)
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
