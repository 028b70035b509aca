"""A run before it is one: what would be trained, two of its steps, and how long it would take."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from utils import data as inputs
from utils import distributed
from utils.cli import advising_on_memory
from utils.data.folders import Batch, Splits
from utils.data.workers import watched
from utils.measure import count_macs, count_parameters
from utils.recipe import Recipe
from utils.training.evaluation import Optimize
from utils.training.loop import Trainer, make_loaders, memory_advice, train_one_epoch


def rehearse(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    *,
    name: str = "network",
    seed: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
    skip_corrupt: bool = False,
    compile: bool = False,
    sync_batchnorm: bool = False,
    optimize: Optimize | None = None,
    timeout_s: float = 600,
    tell: Callable[[str], Any] = print,
) -> float:
    """Tells what `utils.training.loop.fit` would do, trains two batches, evaluates three; no files.

    The first batch starts workers, takes memory and compiles; the last stands for all others.
    Workers have its images ready, so its time is not all: if they take longer to decode, by one
    process and shared among the workers, than to train on, that time counts. Checkpoints do not.

    Args:
        model: trained in place for two steps.
        name: what to call it.
        seed, workers, device, skip_corrupt, compile, sync_batchnorm, optimize, timeout_s: as of
            `fit`.
        tell: gets each line, in the process of rank 0.

    Returns:
        Seconds that the whole run would take, estimated.

    Raises:
        ValueError, CorruptImageError, DivergedError, WorkerError: as `fit`.
        OutOfMemory: a step needs more than there is.
    """
    device = device or distributed.pick_device()
    if distributed.rank() > 0:
        tell = _nobody
    loaders = make_loaders(data, recipe, seed, workers, device)
    tell(describe_model(name, model, recipe.train_crop_px))
    options = {"compile": compile, "sync_batchnorm": sync_batchnorm, "optimize": optimize}
    trainer = Trainer(
        model.to(device), recipe, len(loaders[0]), len(data.classes), seed, skip_corrupt, **options
    )
    tell(describe_data(trainer, data))
    tell(describe_schedule(trainer))
    tell(f"device: {device}, {processes()} with {workers} decoding processes each")
    first_s, train_s, eval_s, input_s, eval_input_s = _paces(trainer, data, loaders, timeout_s)
    ours = recipe.batch_size / distributed.world_size()  # images of a step
    tell(f"first step: {first_s:.3g} s, loss of two steps {trainer.meter.mean():.3f}")
    by_workers = f", decoding its images {ours * input_s:.3g} s by {workers} workers"
    tell(f"a step: {ours * train_s:.3g} s" + by_workers * bool(workers))
    epoch_s = trainer.steps_per_epoch * ours * max(train_s, input_s)
    evaluation_s = len(data.val) / distributed.world_size() * max(eval_s, eval_input_s)
    total_s = recipe.epochs * (epoch_s + evaluation_s)
    tell(
        f"estimate: {duration(total_s)} for {recipe.epochs} epochs, each {duration(epoch_s)} of "
        f"training and {duration(evaluation_s)} of evaluation, without checkpoints"
    )
    return total_s


def describe_model(name: str, model: nn.Module, crop_px: int) -> str:
    """One line on a classifier."""
    return (
        f"model: {name}, {count_parameters(model) / 1e6:.2f} M parameters with its head, "
        f"{count_macs(model, crop_px, crop_px) / 1e9:.3g} GMACs at {crop_px} x {crop_px} pixels"
    )


def describe_data(trainer: Trainer, data: Splits) -> str:
    """One line on the images, and on the steps that they make."""
    steps, batch_size = trainer.steps_per_epoch, trainer.recipe.batch_size
    return (
        f"data: {len(data.classes)} classes, {len(data.train)} training and {len(data.val)} "
        f"validation images, {steps} steps of {batch_size} images per epoch "
        f"({len(data.train) - steps * batch_size} images are left out of each)"
    )


def describe_schedule(trainer: Trainer) -> str:
    """One line on the epochs and the learning rate, at a few of its steps."""
    recipe, total = trainer.recipe, trainer.recipe.epochs * trainer.steps_per_epoch
    peak = max(0, trainer.lr_factor.keywords["warmup_steps"] - 1)
    rates = [f"{trainer.lr_at(step):.3g} at step {step}" for step in sorted({0, peak, total // 2})]
    return (
        f"schedule: {recipe.epochs} epochs, {total} steps, learning rate {', '.join(rates)}, "
        f"{trainer.lr_at(total - 1):.3g} at the last (peak {recipe.peak_lr:.3g}, warm-up "
        f"{recipe.warmup_epochs:g} epochs)"
    )


def processes() -> str:
    """How many train."""
    size = distributed.world_size()
    return "one process" if size == 1 else f"{size} processes"


def duration(time_s: float) -> str:
    """A time in the unit that suits it."""
    for unit_s, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if time_s >= 2 * unit_s:
            return f"{time_s / unit_s:.1f} {unit}"
    return f"{time_s:.1f} s"


def _nobody(line: str) -> None:
    """Hears nothing."""


def _paces(
    trainer: Trainer, data: Splits, loaders: tuple[DataLoader, ...], timeout_s: float
) -> list[float]:
    """Seconds of the slowest process, for which the others wait.

    Returns:
        Of the first step; of an image in a step; in evaluation; and of decoding it for each, shared
        among the workers, or 0 without any: then it is in the other times.

    Raises:
        OutOfMemory: a step needs more than there is.
    """
    workers = loaders[0].num_workers
    with advising_on_memory(memory_advice(trainer.recipe)):
        first_s, train_s = _pace(loaders[0], partial(train_one_epoch, trainer), timeout_s)
        # What is evaluated is made with the first batch, and puts its weights in order with the
        # second.
        _, eval_s = _pace(loaders[1], trainer.evaluate, timeout_s, batches=3)
    paces_s = [first_s, train_s, eval_s, 0.0, 0.0]
    if workers:
        alone = make_loaders(data, trainer.recipe, trainer.seed, 0, trainer.device)
        paces_s[3:] = [_pace(loader, list)[1] / workers for loader in alone]
    return distributed.gather(torch.tensor(paces_s, device=trainer.device)).amax(0).tolist()


def _pace(
    loader: DataLoader,
    work: Callable[[Iterable[Batch]], Any],
    timeout_s: float = 0,
    batches: int = 2,
) -> tuple[float, float]:
    """Seconds that `work` takes with the first batch, and with each image of the last.

    The time in which the batch is waited for is in both. A process without images has no pace.
    """
    asked_s, images = [], [0]

    def asked() -> Iterator[Batch]:
        with closing(_passes(loader, timeout_s)) as passes:
            for _ in range(batches):
                asked_s.append(time.perf_counter())
                for batch in islice(passes, 1):
                    images.append(len(batch.labels))
                    yield batch

    work(asked())
    asked_s.append(time.perf_counter())
    last_s = asked_s[-1] - asked_s[-2] if images[-1] else 0.0
    return asked_s[1] - asked_s[0], last_s / max(1, images[-1])


def _passes(loader: DataLoader, timeout_s: float) -> Iterator[Batch]:
    """Batches without end, if there is one; an epoch may be a single step."""
    for epoch in count() if len(loader) else ():
        if hasattr(loader.batch_sampler or loader.dataset, "begin"):  # training has an order
            inputs.begin(loader, epoch)
        yield from watched(loader, timeout_s)
