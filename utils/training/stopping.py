"""SIGINT and SIGTERM as a request to stop after the step at hand, by all processes together."""

import contextlib
import datetime
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TWICE_S = 2  # within which a SIGTERM may come twice from one hand


class Requested(Exception):
    """A signal came, and no step is under way."""


class StopRequest:
    """Catches SIGINT and SIGTERM inside its `with` block; the same one again interrupts at once.

    A SIGTERM less than `TWICE_S` after the first is no other: job managers send it to every
    process, and torchrun hands it on to its own. A signal that is ignored stays ignored. Outside
    the main thread nothing is caught.

    Args:
        catch: whether to; else nothing is ever requested.
        timeout_s: how long the processes wait for each other's flags.

    Attributes:
        signal: name of the first signal that came to this process, or None.
    """

    def __init__(self, catch: bool = True, timeout_s: float = 600) -> None:
        self.signal: str | None = None
        self._came_s: dict[int, float] = {}  # when each signal came first
        self._catches = catch and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, object] = {}
        self._group = None
        if dist.is_initialized():
            timeout = datetime.timedelta(seconds=timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._flag = torch.zeros(())
        self._work: dist.Work | None = None

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS if self._catches else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is one that C has set
        if self._work and error is None:
            with contextlib.suppress(RuntimeError):  # the others may have ended already
                self._work.wait()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number not in self._came_s:
            self._came_s[number] = time.monotonic()
            self.signal = self.signal or signal.Signals(number).name
        elif number == signal.SIGINT or time.monotonic() - self._came_s[number] > TWICE_S:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether all processes stop now; to be asked by each of them after each step.

        Of several processes, those that caught no signal hear of it one step later: the sum of all
        flags is under way during a step, and nothing waits for it.
        """
        if self._group is None:
            return self.signal is not None
        stop = False
        if self._work:
            self._work.wait()
            stop = bool(self._flag)
        self._flag = torch.tensor(float(self.signal is not None))
        self._work = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return stop

    def watch(self, items: Iterator) -> Iterator:
        """Passes items on, fewer if this process is to stop, and then raises `Requested` in all.

        Every process comes to the end of its items, and there they agree.
        """
        for item in items:
            if self.signal:
                break
            yield item
        stop = torch.tensor(float(self.signal is not None))
        if self._group is not None:
            dist.all_reduce(stop, group=self._group)
        if stop:
            raise Requested
