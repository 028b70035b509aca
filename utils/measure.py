"""Parameters, MACs, latency, throughput, memory: what a model or a trainer costs."""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Throughputs:
    """Images per second of two trainers, one entry per round."""

    ours_images_per_s: list[float]
    peer_images_per_s: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, within each round."""
        pairs = zip(self.ours_images_per_s, self.peer_images_per_s, strict=True)
        return [ours / peer for ours, peer in pairs]

    def summary(self) -> dict[str, float]:
        """Medians over the rounds, and the spread of the ratio."""
        return {
            "ours_images_per_s": statistics.median(self.ours_images_per_s),
            "peer_images_per_s": statistics.median(self.peer_images_per_s),
            "ratio_median": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
        }


def compare_throughput(
    ours: Callable[[int], object],
    peer: Callable[[int], object],
    batch_size: int,
    *,
    steps: int,
    rounds: int,
    settle_steps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughputs:
    """Times two trainers by turns on one machine, so that its slow minutes hit both.

    Who goes first alternates from round to round. Loaders prefetch while the other side is timed;
    the untimed steps at the start of a turn use those batches up, and let the other side's workers
    fill their queue and come to rest.

    Args:
        ours, peer: train so many steps and return when they are done.
        batch_size: images per step.
        steps: timed steps per turn.
        settle_steps: untimed steps before them; more than the batches a loader prefetches.

    Raises:
        ValueError: no steps or no rounds.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    sides, images_per_s = {"ours": ours, "peer": peer}, {"ours": [], "peer": []}
    for train in sides.values():  # starts workers and compiles kernels
        train(settle_steps)
    for k in range(rounds):
        for side in ("ours", "peer") if k % 2 == 0 else ("peer", "ours"):
            sides[side](settle_steps)
            start_s = clock()
            sides[side](steps)
            images_per_s[side].append(steps * batch_size / (clock() - start_s))
    return Throughputs(images_per_s["ours"], images_per_s["peer"])


def by_steps(
    train: Callable[[Iterable[Any]], object], loader: DataLoader
) -> Callable[[int], object]:
    """Makes a function of batches one of a number of steps, which goes on where it stopped.

    Args:
        train: trains on the batches it is given.
        loader: read again and again; its batch sampler is told the number of the epoch.
    """

    def endless() -> Iterator[Any]:
        for epoch in itertools.count():
            loader.batch_sampler.epoch = epoch  # read by TrainBatches, unused by PyTorch's own
            yield from loader

    batches = endless()
    return lambda steps: train(itertools.islice(batches, steps))
