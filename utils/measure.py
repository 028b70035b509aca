"""Parameters, MACs, activations, interleaved timing and peak memory."""

import copy
import math
import multiprocessing
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], object]


def count_parameters(module: nn.Module) -> int:
    """Counts the learnable numbers, including frozen ones but no running statistics."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, height_px: int, width_px: int, channels: int = 3) -> int:
    """Counts the multiply-accumulates of convolutions and linear layers for one image.

    Runs a copy of `module` on the meta device. `FlopCounterMode` counts two operations per MAC.
    """
    shadow = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, channels, height_px, width_px, device="meta"))
    return counter.get_total_flops() // 2


def count_activations(module: nn.Module, height_px: int, width_px: int, channels: int = 3) -> int:
    """Counts the bytes that a training step keeps for the backward pass of one float32 image.

    Runs a copy of `module` on the meta device. Tensors that share memory count once, weights and
    running statistics not at all.
    """
    shadow = copy.deepcopy(module).to("meta").train()
    own = {tensor.untyped_storage()._cdata for tensor in shadow.state_dict().values()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shadow(torch.empty(1, channels, height_px, width_px, device="meta"))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def forward(net: nn.Module, images: Tensor, compile: bool = False) -> Call:
    """Returns a forward pass in eval mode on the device of the images, which waits for its end.

    Args:
        compile: use `torch.compile` with frozen weights. The first call is made here, because the
            option must be set while it compiles.
    """
    device = images.device
    net = net.eval().to(device)

    def call() -> object:
        with torch.inference_mode():
            outputs = net(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return outputs

    if compile:
        from torch._inductor import config  # takes a second

        net = torch.compile(net, dynamic=False)
        with config.patch(freezing=True):
            call()
    return call


def time_interleaved(
    calls: Mapping[Any, Call],
    rounds: int,
    *,
    round_s: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Times calls in interleaved rounds, so that a slow minute of the machine affects all of them.

    The order rotates from round to round. An untimed call comes first in each turn.

    Args:
        calls: each returns when its work is done, including a GPU's.
        round_s: a call is repeated for about so long in each round.

    Returns:
        Seconds of one call, one entry per round.
    """
    counts, times_s = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()  # the first call compiles and allocates
        start_s = clock()
        call()
        counts[name] = max(1, math.ceil(round_s / (clock() - start_s)))
    order = deque(calls)
    for _ in range(rounds):
        for name in order:
            calls[name]()
            start_s = clock()
            for _ in range(counts[name]):
                calls[name]()
            times_s[name].append((clock() - start_s) / counts[name])
        order.rotate(-1)
    return times_s


def peak_memory(prepare: Callable[..., Call], *args: Any, calls: int = 1) -> int:
    """Measures by how many bytes a call raises the resident memory of its process at its peak.

    The call runs in a new process, because freed memory often stays with a process and would hide
    what a second call needs. Linux, which this needs, counts the scratch memory of kernels, too.
    Allocators make the result vary by some per cent, so repeat it.

    Args:
        prepare: a function of a module; returns the call. What it allocates, such as a network's
            weights, is not counted.
        args: arguments of `prepare`; must be picklable.
        calls: how often the call is made until the peak is read.
    """
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once for all processes
    context.set_forkserver_preload(["torch"])  # nothing of ours: it does not know this sys.path
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_growth, torch.get_num_threads(), calls, prepare, args).result()


def _growth(threads: int, calls: int, prepare: Callable[..., Call], args: tuple) -> int:
    torch.set_num_threads(threads)
    call = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = _status_bytes("VmRSS")
    for _ in range(calls):
        call()
    return _status_bytes("VmHWM") - before


def _status_bytes(entry: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{entry}:\s+(\d+) kB", status)[1]) * 1024
