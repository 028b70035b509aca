"""Parameters, MACs, latency, throughput, memory: what a model or a trainer costs."""

import copy
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Numbers that can be learned, frozen ones included; running statistics are not among them."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, height_px: int, width_px: int, channels: int = 3) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image.

    Computed on PyTorch's meta device: from shapes alone, and the module stays as it is. A MAC is
    two floating point operations, which `FlopCounterMode` counts.
    """
    shadow = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, channels, height_px, width_px, device="meta"))
    return counter.get_total_flops() // 2


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    settle: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times calls by turns on one machine, so that its slow minutes hit all of them.

    Who goes first changes from round to round, and each is settled, untimed, before its turn.

    Args:
        calls: return when they are done, a GPU's work included.
        settle: what is called before each turn and once before the first round (default: `calls`).

    Returns:
        Seconds of each call, one entry per round.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    settle = settle or calls
    names, times_s = list(calls), {name: [] for name in calls}
    for name in names:  # starts workers and compiles kernels
        settle[name]()
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            settle[name]()
            start_s = clock()
            calls[name]()
            times_s[name].append(clock() - start_s)
    return times_s


def seconds_per_call(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    turn_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times short calls by turns (`time_interleaved`), each repeated for about `turn_s` a turn.

    Returns:
        Seconds of one call of each, one entry per round.
    """
    counts = {}
    for name, call in calls.items():
        call()  # the first packs weights, compiles, warms caches
        start_s = clock()
        call()
        counts[name] = max(1, math.ceil(turn_s / (clock() - start_s)))
    repeated = {name: partial(repeat, call, counts[name]) for name, call in calls.items()}
    times_s = time_interleaved(repeated, rounds, settle=calls, clock=clock)
    return {name: [t / counts[name] for t in times] for name, times in times_s.items()}


def repeat(call: Callable[[], object], count: int) -> None:
    """Makes a call so many times."""
    for _ in range(count):
        call()


def throughputs(
    trains: Mapping[str, Callable[[int], object]],
    batch_size: int,
    *,
    steps: int,
    rounds: int,
    settle_steps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Images per second of loops over a loader, by turns (`time_interleaved`).

    Loaders prefetch while another side is timed; the untimed steps at the start of a turn use those
    batches up, and let the other side's workers fill their queue and come to rest.

    Args:
        trains: each makes so many steps and returns when they are done.
        batch_size: images per step.
        steps: timed steps per turn.
        settle_steps: untimed steps before them; more than the batches a loader prefetches.

    Raises:
        ValueError: no steps or no rounds.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    timed = {side: partial(train, steps) for side, train in trains.items()}
    settle = {side: partial(train, settle_steps) for side, train in trains.items()}
    times_s = time_interleaved(timed, rounds, settle=settle, clock=clock)
    return {side: [steps * batch_size / t for t in times] for side, times in times_s.items()}


def by_steps(
    train: Callable[[Iterable[Any]], object], loader: DataLoader
) -> Callable[[int], object]:
    """Makes a function of batches one of a number of steps, which goes on where it stopped.

    Args:
        train: trains on the batches it is given.
        loader: read again and again; its batch sampler, or its dataset if that makes the batches,
            is told the number of the epoch.
    """

    def endless() -> Iterator[Any]:
        for epoch in itertools.count():
            ours = loader.batch_sampler or loader.dataset
            if hasattr(ours, "begin"):  # PyTorch's own sampler has its own order
                ours.begin(epoch)
            yield from loader

    batches = endless()
    return lambda steps: train(itertools.islice(batches, steps))


def peak_memory(prepare: Callable[..., Callable[[], object]], *args: Any) -> int:
    """Bytes by which a call raises the resident memory of a process, at its highest.

    A process of its own makes the call, since memory once freed stays with a process and would
    hide what a second call needs. What Linux counts includes the scratch memory of the kernels,
    which a count of tensors misses. Repeat it: allocators make it vary by some per cent.

    Args:
        prepare: run there with `args`, returns the call; what it keeps, such as a network's
            weights, is not counted. A function of a module, as are all that it is given.

    Raises:
        OSError: not on Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("peak memory is read from Linux's /proc/self/status, which is not here")
    context = multiprocessing.get_context("forkserver")  # one that has imported what is needed
    context.set_forkserver_preload([prepare.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, torch.get_num_threads(), prepare, args).result()


def _growth(threads: int, prepare: Callable[..., Callable[[], object]], args: tuple) -> int:
    torch.set_num_threads(threads)
    call = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, man 5 proc
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    """Bytes of an entry of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {entry}")
