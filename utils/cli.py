"""Command lines: options, exit codes, progress bars, and one clear line for every error."""

import argparse
import ast
import contextlib
import functools
import importlib
import io
import os
import socket
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from tqdm import tqdm

OK, BAD_DATA, BAD_USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL of sysexits.h
EXIT_CODES = """\
Exit codes of every script: 0, success; 1, bad data or a bad file, not enough memory, or a failed
training run; 2, a wrong option or path; 75, stopped by a signal after saving: run the same command
again to resume; 130, interrupted without saving."""


class DataError(ValueError):
    """A file or folder is invalid. The text is one line that names it."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the work after everything was saved. The text says how to resume."""


class Parser(argparse.ArgumentParser):
    """An argument parser with the module's docstring as help and one-line errors."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options |= {"epilog": EXIT_CODES, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and ".tar" in message:
            message = "several .tar arguments where one is expected: quote the brace pattern"
        print(f"error: {message}; --help lists the options", file=sys.stderr)
        sys.exit(BAD_USAGE)


def int_at_least(minimum: int) -> Callable[[str], int]:
    """An argument type: an integer of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {minimum}")
        return value

    return convert


def share(text: str) -> float:
    """An argument type: a number above 0 and below 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and below 1, such as 0.2")


def backbone_option(text: str) -> tuple[str, Any]:
    """An argument type: KEY=VALUE, a keyword argument of `backbones.create`, as a pair."""
    key, _, value = text.partition("=")
    if not value or not key.isidentifier() or key in ("name", "weights"):
        example = "act=mish or out_indices=2,3,4"
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE, such as {example}")
    with contextlib.suppress(ValueError, SyntaxError):  # a string needs no quotes
        return key, ast.literal_eval(value)
    return key, value


def import_optional(package: str, purpose: str) -> ModuleType:
    """Imports an optional package; ValueError, which ends in `purpose`, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: pip install {package} {purpose}") from error


def printable(text: str) -> str:
    """`text` with line breaks, control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def summarize(items: Sequence[str]) -> str:
    """The number of items and the first three, as in "5 (a, b, c, ...)", on one line."""
    shown = [item if item.isprintable() else ascii(item) for item in items[:3]]
    return f"{len(items)} ({', '.join(shown + ['...'] * (len(items) > 3))})"


def first_line(error: Exception) -> str:
    """The first line of an error's text; without one, its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@functools.cache
def warn(line: str) -> None:
    """Prints a one-line warning to stderr, once, and in the first of torchrun's processes alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {printable(line)}", file=sys.stderr)


def unicode_hint(names: Iterable[str]) -> str:
    """The end of an error message about names of which some only look the same."""
    names = {*names}
    if len({unicodedata.normalize("NFC", name) for name in names}) == len(names):
        return ""
    return "; some are the same name in two Unicode forms (NFC, NFD): rename one"


def exit_code(work: Callable[[], int | None]) -> int:
    """Runs `work` and returns its exit code; prints one line for an error that a user can fix."""
    for stream in (sys.stdout, sys.stderr):  # a folder's name may hold any bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or OK
    except Stopped as error:
        return _report("stopped", error, STOPPED)
    except KeyboardInterrupt as error:
        hint = str(error) or "the same command resumes from what was saved"
        return _report("interrupted", hint, INTERRUPTED)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _report("error", _describe_os_error(error), BAD_USAGE)
    except OSError as error:
        return _report("error", _describe_os_error(error), BAD_DATA)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = f"not enough memory ({first_line(error)}); try smaller batches"
        return _report("error", reason, BAD_DATA)
    except (DataError, ArithmeticError) as error:
        return _report("error", error, BAD_DATA)
    except ValueError as error:
        is_bad_file = getattr(error, "is_bad_file", False)  # of backbones.weights
        return _report("error", error, BAD_DATA if is_bad_file else BAD_USAGE)
    except RuntimeError as error:
        if str(error).startswith("DataLoader"):  # a worker process died, or hangs
            return _report("error", f"{error}; try fewer --workers, or --workers 0", BAD_DATA)
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = f"torch.compile failed ({first_line(error)})"
        return _report("error", f"{reason}; install a C++ compiler, or omit --compile", BAD_USAGE)


def _describe_os_error(error: OSError) -> str:
    """Path and reason, without the error number."""
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _report(kind: str, reason: object, code: int) -> int:
    rank = ""
    if {"LOCAL_RANK", "RANK"} <= os.environ.keys():  # one of torchrun's processes
        rank = f"rank {os.environ['RANK']} on {socket.gethostname()}: "
    print(printable(" ".join(f"{kind}: {rank}{reason}".splitlines())), file=sys.stderr)
    return code


class NotebookBar(tqdm):
    """A progress bar as plain text, of which a saved notebook holds the last state alone.

    tqdm's own bars leave a widget that GitHub cannot show, or a line of stderr for each update.
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


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """tqdm with these arguments, for a terminal, a log file or a notebook."""
    ipython = sys.modules.get("IPython")  # imported already if this is a kernel
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        interval_s = 0.1 if sys.stderr.isatty() else 10  # a log file needs few updates
        return tqdm(*args, dynamic_ncols=True, mininterval=interval_s, **kwargs)
    # tqdm also writes a newline to its file, which a notebook should not keep.
    return NotebookBar(*args, ncols=100, file=io.StringIO(), **kwargs)
