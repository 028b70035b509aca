"""The training loop: parameter groups, schedule, averaged weights, one epoch, `fit`.

Nothing here knows a backbone: `fit` takes any classifier `[N, 3, H, W]` -> `[N, num_classes]`.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import distributed, runs
from utils.data import (
    STEP_STREAM,
    Batch,
    CorruptImageError,
    EvalBatches,
    ImageNetFolders,
    Preprocess,
    TrainBatches,
    make_loader,
    readable,
    stream_seed,
)
from utils.evaluation import autocast, autocast_dtype, evaluate
from utils.progress import progress_bar
from utils.recipe import Recipe

# By type, never by name: a layer called "bn_head" need not be one.
NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # all BatchNorm and InstanceNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
PROGRESS_STEPS = 20  # steps between two looks at the loss; a look waits for the device


class DivergedError(ArithmeticError):
    """The loss is not finite; the message names the step."""


def param_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weights first, then normalisation layers and biases.

    A parameter that two modules share counts once, as a weight if either holds it as one. Frozen
    parameters are left out.
    """
    decayed, plain = {}, {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_plain = isinstance(module, NORM_LAYERS) or name == "bias"
                (plain if is_plain else decayed)[id(parameter)] = parameter
    plain = {key: parameter for key, parameter in plain.items() if key not in decayed}
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(plain.values()), "weight_decay": norm_weight_decay},
    ]


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of step 0, 1, ... as a share of the peak: linear up, then a cosine to 0.

    The warm-up reaches the peak at its last step; the cosine would reach 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay_at(updates: int, decay: float) -> float:
    """Decay of the averaged weights after so many updates: (1 + n) / (10 + n), at most `decay`.

    The rule of TensorFlow's ExponentialMovingAverage(num_updates): the average spans the last ninth
    of the run so far, so that a short run is not left near its initial weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


class Trainer:
    """What changes from step to step: model, averaged model, optimizer, schedule, step, rows.

    Args:
        model: on its device already; trained in place.
        steps_per_epoch: optimizer steps per pass over the training images.
        seed: of what is random in a step (mixing, dropout); the step number makes it new.
        skip_corrupt: leave unreadable images out instead of raising.
        compile: whether steps run the network under `torch.compile`.

    Attributes:
        metrics, speed: one row per epoch so far.
        skipped: one message per unreadable image that was left out, with its path.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        num_classes: int,
        seed: int = 0,
        skip_corrupt: bool = False,
        compile: bool = False,
    ) -> None:
        self.device = next(model.parameters()).device
        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=memory_format)
        self.recipe, self.steps_per_epoch, self.seed = recipe, steps_per_epoch, seed
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.net = distributed.data_parallel(self.model, self.device)
        if compile:  # the model itself, and so its checkpoints, stay as they are
            self.net = torch.compile(self.net)
        self.optimizer = torch.optim.SGD(
            param_groups(self.model, recipe.weight_decay, recipe.norm_weight_decay),
            lr=recipe.peak_lr,
            momentum=recipe.momentum,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over the weights
        )
        warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
        total_steps = recipe.epochs * steps_per_epoch
        self.schedule = LambdaLR(
            self.optimizer, lambda step: lr_factor(step, warmup_steps, total_steps)
        )
        self.dtype = autocast_dtype(self.device, recipe.precision)
        self.eval_preprocess = Preprocess(self.device, num_classes, recipe.channels_last)
        self.preprocess = Preprocess(
            self.device,
            num_classes,
            recipe.channels_last,
            cutmix_alpha=recipe.cutmix_alpha,
            mixup_alpha=recipe.mixup_alpha,
        )
        self.skip_corrupt = skip_corrupt
        self.step = 0
        self.metrics: list[dict[str, float]] = []
        self.speed: list[dict[str, float]] = []
        self.skipped: dict[str, None] = {}  # a set that keeps its order

    def train_step(self, batch: Batch) -> Tensor:
        """One update from one batch of this process; returns the loss, still on the device."""
        torch.manual_seed(stream_seed(STEP_STREAM, self.seed, self.step, distributed.rank()))
        images, targets = self.preprocess(batch)
        with autocast(self.device, self.dtype):
            logits = self.net(images)
        loss = cross_entropy(logits.float(), targets, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, or the next forward pass would carry them
        self.schedule.step()
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay_at(self.step, self.recipe.ema_decay))
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end in the same bits."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
            "speed": self.speed,
            "skipped": list(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s result."""
        for name in ("model", "ema", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.metrics, self.speed = state["step"], state["metrics"], state["speed"]
        self.skipped = dict.fromkeys(state["skipped"])


class LossMeter:
    """Mean loss, summed on the device and looked at rarely; keeps the first step gone wrong."""

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, device=device)
        self.count = 0

    def add(self, loss: Tensor, step: int) -> None:
        self.sum += loss
        self.count += 1
        is_first_bad = ~torch.isfinite(loss) & (self.bad_step < 0)
        self.bad_step.masked_fill_(is_first_bad, step)

    def mean(self) -> float:
        """Mean over this process's steps; waits for the device.

        Raises:
            DivergedError: a loss was NaN or infinite.
        """
        if self.bad_step >= 0:
            raise DivergedError(
                f"the loss is not finite at step {int(self.bad_step)}; try a lower --lr-per-1024 "
                "or --precision float32, in another --output-dir"
            )
        return self.sum.item() / self.count


def train_one_epoch(
    trainer: Trainer, batches: Iterable[Batch], progress: tqdm | None = None
) -> float:
    """One pass over `batches`; returns the mean loss over all processes' steps."""
    trainer.net.train()
    meter = LossMeter(trainer.device)
    for batch in readable(batches, trainer.skip_corrupt, trainer.skipped):
        if not len(batch.labels):
            raise CorruptImageError(f"{batch.corrupt[0]}; nor is any other of its batch")
        meter.add(trainer.train_step(batch), trainer.step - 1)
        if progress is not None:
            if meter.count % PROGRESS_STEPS == 0:
                progress.set_postfix_str(f"loss {meter.mean():.3f}", refresh=False)
            progress.update(trainer.recipe.batch_size)
    mean = torch.tensor(meter.mean(), device=trainer.device, dtype=torch.float64)
    return distributed.sum_over_processes(mean).item() / distributed.world_size()


def fit(
    model: nn.Module,
    data: ImageNetFolders,
    recipe: Recipe,
    run_dir: str | Path,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
    skip_corrupt: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    quiet: bool = False,
) -> Trainer:
    """Trains `model` by `recipe`, or goes on with the run in `run_dir`, to the last epoch.

    Args:
        config: entries for config.json beside the recipe and the machine: what built the model.
        workers: processes that decode images, 0 for none.
        skip_corrupt: leave unreadable images out and list them, instead of stopping.
        compile: train under `torch.compile`: a minute or more at the start, then faster steps.
        tensorboard: also log every row for TensorBoard.
        quiet: show neither a progress bar nor a line per epoch.

    Returns:
        The trainer, with the model, its average and the rows of every epoch.

    Raises:
        ValueError: a negative seed or number of workers, or a batch larger than the data.
        RunError: `run_dir` holds another run.
        CorruptImageError: an image is unreadable.
        DivergedError: the loss is not finite.
    """
    for name, value in (("seed", seed), ("workers", workers)):
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    run_dir = Path(run_dir)
    device = device or distributed.pick_device()
    train_loader, val_loader = make_loaders(data, recipe, seed, workers, device)
    steps = len(train_loader.batch_sampler)
    trainer = Trainer(
        model.to(device), recipe, steps, len(data.classes), seed, skip_corrupt, compile
    )
    config = {**(config or {}), **_describe(trainer, data, workers), "compile": compile}
    if distributed.rank() == 0:
        runs.write_config(run_dir, config)
    distributed.barrier()
    if (run_dir / "last.pt").exists():
        checkpoint = runs.load_checkpoint(run_dir / "last.pt")
        trainer.load_state_dict(checkpoint)
        if distributed.rank() == 0:  # a kill may have come between the checkpoint and its tables
            runs.save_tables(run_dir, checkpoint)
    with progress_bar(
        total=recipe.epochs * steps * recipe.batch_size,
        initial=trainer.step * recipe.batch_size,
        unit=" images",
        disable=quiet or distributed.rank() > 0,
    ) as progress:
        for epoch in range(trainer.step // steps, recipe.epochs):
            train_loader.batch_sampler.epoch = epoch
            _run_epoch(trainer, train_loader, val_loader, progress)
            if distributed.rank() == 0:
                if not quiet:
                    progress.write(describe_epoch(trainer))
                runs.save_checkpoint(run_dir, {"config": config, **trainer.state_dict()})
                if tensorboard:
                    runs.log_tensorboard(run_dir, trainer.metrics[-1], trainer.speed[-1])
    return trainer


def _run_epoch(
    trainer: Trainer, train_loader: DataLoader, val_loader: DataLoader, progress: tqdm
) -> None:
    """Trains one epoch, evaluates the raw and the averaged weights, and adds a row of each."""
    epoch = train_loader.batch_sampler.epoch + 1
    progress.set_description_str(f"epoch {epoch}/{trainer.recipe.epochs}")
    first_lr = trainer.schedule.get_last_lr()[0]
    start_s = time.perf_counter()
    train_loss = train_one_epoch(trainer, train_loader, progress)
    trained_s = time.perf_counter()
    # Each process has statistics of its own images; rank 0's are those that are saved.
    distributed.broadcast_buffers(trainer.model, trainer.ema)
    models = {"": trainer.model, "ema_": trainer.ema.module}
    batches = readable(val_loader, trainer.skip_corrupt, trainer.skipped)
    results = evaluate(models, batches, trainer.eval_preprocess, trainer.dtype)
    row = {"epoch": epoch, "step": trainer.step, "first_lr": first_lr, "train_loss": train_loss}
    for prefix, result in results.items():
        row |= {f"{prefix}val_{key}": result[key] for key in ("loss", "top1_pct", "top5_pct")}
    trainer.metrics.append(row)
    trainer.skipped = distributed.union(trainer.skipped)
    images = trainer.steps_per_epoch * trainer.recipe.batch_size
    trainer.speed.append(
        {
            "epoch": epoch,
            "train_time_s": trained_s - start_s,
            "eval_time_s": time.perf_counter() - trained_s,
            "train_images_per_s": images / (trained_s - start_s),
        }
    )


def describe_epoch(trainer: Trainer) -> str:
    """One line on the last epoch."""
    row, speed = trainer.metrics[-1], trainer.speed[-1]
    return (
        f"epoch {row['epoch']:3d}/{trainer.recipe.epochs}  train loss {row['train_loss']:.3f}  "
        f"val top-1 raw {row['val_top1_pct']:5.1f} %  EMA {row['ema_val_top1_pct']:5.1f} %  "
        f"({speed['train_images_per_s']:.0f} images/s)"
    )


def make_loaders(
    data: ImageNetFolders, recipe: Recipe, seed: int, workers: int, device: torch.device
) -> tuple[DataLoader, DataLoader]:
    """Loaders of this process's share of training and validation batches."""
    pin_memory = device.type == "cuda"
    train_batches = TrainBatches(len(data.train), recipe.batch_size, seed)
    val_batches = EvalBatches(len(data.val), recipe.batch_size // distributed.world_size())
    return (
        make_loader(data.train, train_batches, workers, pin_memory),
        make_loader(data.val, val_batches, workers, pin_memory),
    )


def _describe(trainer: Trainer, data: ImageNetFolders, workers: int) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(trainer.recipe),
        "seed": trainer.seed,
        "classes": data.classes,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "autocast": str(trainer.dtype or torch.float32).removeprefix("torch."),
        "processes": distributed.world_size(),
        "workers": workers,
        **runs.describe_machine(),
    }
