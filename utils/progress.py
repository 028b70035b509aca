"""One progress bar for terminals and notebooks."""

import io
import sys
from typing import Any

from tqdm import tqdm


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
