"""The training loop: parameter groups, schedule, averaged weights, one epoch, `fit`.

Nothing here knows a backbone: `fit` takes any classifier `[N, 3, H, W]` -> `[N, num_classes]`.
"""

import copy
import dataclasses
import functools
import math
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import data as inputs
from utils import distributed
from utils.cli import Stopped, advising_on_memory, progress_bar
from utils.data.folders import (
    STEP_STREAM,
    Batch,
    CorruptImageError,
    Preprocess,
    Splits,
    readable,
    stream_seed,
)
from utils.data.workers import WorkerError, watched
from utils.recipe import Recipe
from utils.records import describe_machine, write_json
from utils.training.checkpoint import (
    DIVERGED,
    RunError,
    end_save,
    log_tensorboard,
    open_run,
    save_checkpoint,
)
from utils.training.evaluation import Optimize, autocast, autocast_dtype, dtype_name, evaluate
from utils.training.stopping import Requested, StopRequest

# By type, never by name: a layer called "bn_head" need not be one.
NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # all BatchNorm and InstanceNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
TOO_FEW = "more than 1 value per channel"  # what PyTorch's BatchNorm says
PROGRESS_STEPS = 20  # steps between two looks at the loss; a look waits for the device
SMALLER = "a smaller --batch-size, --train-crop-px or --width"  # needs less memory

# What a row of an epoch holds, for all who read it.
METRICS = (
    *("epoch", "step", "first_lr", "train_loss", "val_loss", "val_top1_pct", "val_top5_pct"),
    *("ema_val_loss", "ema_val_top1_pct", "ema_val_top5_pct"),
)
SPEED = ("epoch", "train_time_s", "eval_time_s", "train_images_per_s")


class DivergedError(ArithmeticError):
    """The loss is not finite; the message names the step.

    Attributes:
        step: the first such step, from 0, if known.
        indices: the dataset's indices of its images, where its loss was not finite.
    """

    def __init__(self, text: str, step: int | None = None, indices: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.step, self.indices = step, indices


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
        sync_batchnorm: whether BatchNorm's statistics are those of all processes' images.
        optimize: makes what is evaluated, as of `utils.training.evaluation.evaluate`.

    Raises:
        ValueError: a step's images make no such parts, or parts too small for BatchNorm.

    Attributes:
        metrics, speed: one row per epoch so far.
        meter: the losses of the epoch under way.
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
        sync_batchnorm: bool = False,
        optimize: Optimize | None = None,
    ) -> None:
        refuse_tiny_parts(model, recipe, sync_batchnorm)
        self.device = next(model.parameters()).device
        memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(memory_format=memory_format)
        self.recipe, self.steps_per_epoch, self.seed = recipe, steps_per_epoch, seed
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.net = distributed.data_parallel(self.model, self.device, sync_batchnorm)
        if compile:  # the model itself, and so its checkpoints, stay as they are
            self.net = torch.compile(self.net)
        self.optimizer = torch.optim.SGD(
            param_groups(self.model, recipe.weight_decay, recipe.norm_weight_decay),
            lr=recipe.peak_lr,
            momentum=recipe.momentum,
            fused=self.device.type in ("cpu", "cuda"),  # one pass over the weights
        )
        self.lr_factor = functools.partial(
            lr_factor,
            warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
            total_steps=recipe.epochs * steps_per_epoch,
        )
        self.schedule = LambdaLR(self.optimizer, self.lr_factor)
        self.dtype = autocast_dtype(self.device, recipe.precision)
        self.eval_preprocess = Preprocess(self.device, num_classes, recipe.channels_last)
        self.preprocess = Preprocess(
            self.device,
            num_classes,
            recipe.channels_last,
            cutmix_alpha=recipe.cutmix_alpha,
            mixup_alpha=recipe.mixup_alpha,
        )
        self.skip_corrupt, self.optimize = skip_corrupt, optimize
        self.step = 0
        self.meter = LossMeter(self.device)
        # Of the training of the epoch under way: since when, if it runs, and for how long before.
        self.start_s: float | None = None
        self.earlier_s = 0.0
        self.metrics: list[dict[str, float]] = []
        self.speed: list[dict[str, float]] = []
        self.skipped: dict[str, None] = {}  # a set that keeps its order

    def train_step(self, batch: Batch) -> Tensor:
        """One update from one batch of this process; returns the loss, still on the device."""
        torch.manual_seed(stream_seed(STEP_STREAM, self.seed, self.step, distributed.rank()))
        images, targets = self.preprocess(batch)
        loss = self._backward(images, targets)
        self.optimizer.step()
        self.optimizer.zero_grad()  # now, or the next forward pass would carry them
        self.schedule.step()
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay_at(self.step, self.recipe.ema_decay))
        self.ema.update_parameters(self.model)
        self.meter.add(loss, self.step, batch.indices)
        self.step += 1
        return loss

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adds the gradients of the mean loss, part by part as `Recipe.accumulate` has it."""
        parts = list(
            zip(*(x.chunk(self.recipe.accumulate) for x in (images, targets)), strict=True)
        )
        total = torch.zeros((), device=self.device)
        for k, (some_images, some_targets) in enumerate(parts, start=1):
            # Sent to the other processes once, with the last part.
            with distributed.no_sync(self.net) if k < len(parts) else nullcontext():
                with autocast(self.device, self.dtype):
                    logits = self.net(some_images)
                loss = cross_entropy(
                    logits.float(), some_targets, label_smoothing=self.recipe.label_smoothing
                )
                loss = loss * (len(some_images) / len(images))
                loss.backward()
            total += loss.detach()
        return total

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
        """Accuracy of the last weights, under the name "", and of the averaged ones, "ema_"."""
        models = {"": self.model, "ema_": self.ema.module}
        batches = readable(batches, self.skip_corrupt, self.skipped)
        return evaluate(models, batches, self.eval_preprocess, self.dtype, self.optimize)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end in the same bits, as `settle` left it."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
            "speed": self.speed,
            "skipped": list(self.skipped),
            "under_way": {"train_time_s": self.train_time_s, **self.meter.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s result, in which `odd_entry` finds nothing odd."""
        for name in ("model", "ema"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.metrics, self.speed = state["step"], state["metrics"], state["speed"]
        # All else in them follows from the recipe and the step.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": buffers(state)})
        rates = [rate * self.lr_factor(self.step) for rate in self.schedule.base_lrs]
        at_step = {"last_epoch": self.step, "_step_count": self.step + 1, "_last_lr": rates}
        self.schedule.load_state_dict(self.schedule.state_dict() | at_step)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.skipped = dict.fromkeys(state["skipped"])
        self.earlier_s = state["under_way"]["train_time_s"]
        self.meter.load_state_dict(state["under_way"])

    def end_epoch(self, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Adds the rows of the epoch under way, which ends it."""
        self.metrics.append(metrics)
        self.speed.append(speed)
        self.meter, self.start_s, self.earlier_s = LossMeter(self.device), None, 0.0

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.recipe.peak_lr * self.lr_factor(step)

    @property
    def train_time_s(self) -> float:
        """Time that the epoch under way has been trained, also before the run was resumed."""
        running_s = 0.0 if self.start_s is None else time.perf_counter() - self.start_s
        return self.earlier_s + running_s

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0: trained and evaluated are those before it."""
        return len(self.metrics)

    @property
    def step_in_epoch(self) -> int:
        """Steps of the epoch under way that are done."""
        return self.step - self.epoch * self.steps_per_epoch

    def synchronize(self) -> None:
        """Waits for the device and the other processes, so that `state_dict` is of all of them.

        Raises:
            DivergedError: a loss of the epoch under way is not finite, or a weight is not; in all
                processes, if in one.
        """
        self.skipped = distributed.union(self.skipped)
        with torch.no_grad():
            norms = torch.stack(torch._foreach_norm(list(self.model.parameters())))
        self.meter.check(bad_weights=~torch.isfinite(norms).all())


def refuse_tiny_parts(model: nn.Module, recipe: Recipe, sync_batchnorm: bool = False) -> None:
    """ValueError for more parts than images, or parts that leave BatchNorm one value per channel.

    That is so for a single image where maps are 1 x 1; a pass without numbers shows it.
    """
    images = recipe.batch_size // distributed.world_size()
    if recipe.accumulate > images:
        raise ValueError(
            f"accumulate={recipe.accumulate} must be at most the {images} images that a process "
            "has in a step"
        )
    least = len(torch.empty(images).chunk(recipe.accumulate)[-1])
    if least > 1 or sync_batchnorm:
        return
    shadow = copy.deepcopy(model).to("meta").train()
    one = torch.empty(1, 3, recipe.train_crop_px, recipe.train_crop_px, device="meta")
    try:
        with suppress(RuntimeError):  # what knows no such device is seen at the first step
            shadow(one)
    except ValueError as error:
        if TOO_FEW not in str(error):
            raise
        raise ValueError(
            f"batch_size={recipe.batch_size} leaves single images to BatchNorm, whose maps are 1 x "
            f"1 at train_crop_px={recipe.train_crop_px}; take a larger --batch-size or "
            "--train-crop-px, or a smaller --accumulate"
        ) from error


def odd_entry(trainer: Trainer, state: dict[str, Any]) -> str | None:
    """The first entry of a checkpoint, but for weights, that no run like `trainer`'s has.

    Args:
        state: with entries of the types of `utils.training.checkpoint.CHECKPOINTED`.
    """
    steps, epochs, done = trainer.steps_per_epoch, trainer.recipe.epochs, len(state["metrics"])
    in_epoch, under_way = state["step"] - done * steps, state["under_way"]
    sums = under_way.get("loss_sums")
    ends = [(epoch, epoch * steps) for epoch in range(1, done + 1)]
    good = {
        "step": done <= epochs and 0 <= in_epoch <= (steps if done < epochs else 0),
        "metrics": all(_is_row(row, METRICS) for row in state["metrics"])
        and [(row["epoch"], row["step"]) for row in state["metrics"]] == ends,
        "speed": all(_is_row(row, SPEED) for row in state["speed"]) and len(state["speed"]) == done,
        "skipped": all(isinstance(line, str) for line in state["skipped"]),
        "under_way": _alike(sums, trainer.meter.sums)
        and _is_row(under_way, ("train_time_s", "loss_count"), but=("loss_sums",))
        and under_way["loss_count"] == in_epoch,
        "optimizer": _fit(buffers(state), trainer.optimizer),
    }
    return next((name for name in good if not good[name]), None)


def _is_row(row: Any, names: Sequence[str], but: Sequence[str] = ()) -> bool:
    """Whether it is a dict of finite numbers, these among them."""
    return (
        isinstance(row, dict)
        and row.keys() >= set(names)
        and all(
            isinstance(name, str) and type(row[name]) in (int, float) and math.isfinite(row[name])
            for name in row.keys() - set(but)
        )
    )


def buffers(state: dict[str, Any]) -> Any:
    """A checkpoint's momentum: by the parameter's number, a dict with its "momentum_buffer"."""
    return state["optimizer"].get("state")


def _fit(momenta: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether each is of a parameter of the optimizer's, and of its shape."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return isinstance(momenta, dict) and all(
        type(number) is int
        and 0 <= number < len(parameters)
        and isinstance(each, dict)
        and each.keys() == {"momentum_buffer"}
        and _alike(each["momentum_buffer"], parameters[number])
        for number, each in momenta.items()
    )


def _alike(found: Any, wanted: Tensor) -> bool:
    """Whether it could be copied from the one to the other, as it lies in a checkpoint."""
    names = ("shape", "dtype", "layout")
    return isinstance(found, Tensor) and all(
        getattr(found, name) == getattr(wanted, name) for name in names
    )


class LossMeter:
    """Mean loss, summed on the device and looked at rarely; keeps the first step gone wrong."""

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.zeros((), device=device)
        self.sums = torch.zeros(distributed.world_size(), device=device)  # at the last `check`
        self.bad_step = torch.full((), -1, device=device)
        self.count = 0
        # The images of the steps since the last look.
        self.recent: deque[tuple[int, Sequence[int]]] = deque(maxlen=2 * PROGRESS_STEPS)

    def add(self, loss: Tensor, step: int, indices: Sequence[int] = ()) -> None:
        self.sum += loss
        self.count += 1
        self.recent.append((step, indices))
        is_first_bad = ~torch.isfinite(loss) & (self.bad_step < 0)
        self.bad_step.masked_fill_(is_first_bad, step)

    def check(self, bad_weights: Tensor | bool = False) -> None:
        """Looks at all processes' losses, and notes them for `state_dict`; waits for the device.

        Raises:
            DivergedError: a loss was NaN or infinite, or there are `bad_weights`.
        """
        self.sums = distributed.gather(self.sum)
        bad = ((self.bad_step >= 0) | bad_weights).float()
        if not distributed.sum_over_processes(bad):
            return
        advice = "try a lower --lr-per-1024 or --precision float32, in another --output-dir"
        step = int(self.bad_step)
        found = distributed.gather_objects((step, list(dict(self.recent).get(step, ()))))
        step = min((step for step, _ in found if step >= 0), default=None)
        if step is None:
            raise DivergedError(f"a weight is not finite; {advice}")
        indices = [i for at, some in found if at == step for i in some]
        raise DivergedError(f"the loss is not finite at step {step}; {advice}", step, indices)

    def mean(self) -> float:
        """Mean over this process's steps; waits for the device."""
        return self.sum.item() / self.count

    def state_dict(self) -> dict[str, Any]:
        """Every process's sum at the last `check`, and the count, as they are after it."""
        return {"loss_sums": self.sums, "loss_count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["loss_sums"].to(self.sum.device)
        self.sum, self.count = self.sums[distributed.rank()].clone(), state["loss_count"]


def train_one_epoch(
    trainer: Trainer,
    batches: Iterable[Batch],
    progress: tqdm | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """One pass over `batches`; returns the mean loss over the epoch's steps and all processes.

    Args:
        after_step: called when a step is over, and may stop the pass by an exception.

    Raises:
        DivergedError: the loss is not finite.
    """
    trainer.net.train()
    for batch in readable(batches, trainer.skip_corrupt, trainer.skipped):
        if not len(batch.labels):
            raise CorruptImageError(f"{batch.corrupt[0]}; nor is any other of its batch")
        try:
            trainer.train_step(batch)
        except ValueError as error:
            if not batch.corrupt or TOO_FEW not in str(error):
                raise
            few = f"{batch.corrupt[0]}; too few others of its batch are for BatchNorm"
            raise CorruptImageError(few) from error
        if trainer.step % PROGRESS_STEPS == 0:
            trainer.meter.check()
            if progress is not None:
                progress.set_postfix_str(f"loss {trainer.meter.mean():.3f}", refresh=False)
        if progress is not None:
            progress.update(trainer.recipe.batch_size)
        after_step()
    trainer.synchronize()
    mean = torch.tensor(trainer.meter.mean(), device=trainer.device, dtype=torch.float64)
    return distributed.sum_over_processes(mean).item() / distributed.world_size()


def fit(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    run_dir: str | Path,
    *,
    config: dict[str, Any] | None = None,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
    skip_corrupt: bool = False,
    compile: bool = False,
    sync_batchnorm: bool = False,
    optimize: Optimize | None = None,
    checkpoint_steps: int = 0,
    keep_every: int = 0,
    timeout_s: float = 600,
    tensorboard: bool = False,
    quiet: bool = False,
    catch_signals: bool = True,
) -> Trainer:
    """Trains `model` by `recipe`, or goes on with the run in `run_dir`, to the last epoch.

    Args:
        config: entries for config.json beside the recipe and the machine: what built the model.
        workers: processes that decode images, 0 for none.
        skip_corrupt: leave unreadable images out and list them, instead of stopping.
        compile: train under `torch.compile`: a minute or more at the start, then faster steps.
        sync_batchnorm: BatchNorm over all processes' images; on GPUs only.
        optimize: makes what is evaluated on a CPU: `backbones.deploy.optimize`.
        checkpoint_steps: save after every so many steps, too; 0 for the ends of epochs alone.
        keep_every: keep the checkpoint of every so many epochs; 0 for last and best alone.
        timeout_s: how long to wait for a worker's batch, 0 for ever.
        tensorboard: also log every row for TensorBoard.
        quiet: show neither a progress bar nor a line per epoch.
        catch_signals: whether SIGINT and SIGTERM save first and stop then.

    Returns:
        The trainer, with the model, its average and the rows of every epoch.

    Raises:
        ValueError: a negative seed or number of workers, or a batch larger than the data.
        RunError: `run_dir` holds another run.
        CorruptImageError: an image is unreadable.
        DivergedError: the loss is not finite; the last checkpoint is from before.
        WorkerError: a decoding process died, or gave nothing for `timeout_s`.
        Stopped: a signal came, and the run is saved.
    """
    counts = {"seed": seed, "workers": workers, "checkpoint_steps": checkpoint_steps}
    for name, value in (counts | {"keep_every": keep_every}).items():
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    run_dir = Path(run_dir)
    device = device or distributed.pick_device()
    loaders = make_loaders(data, recipe, seed, workers, device)
    options = {"compile": compile, "sync_batchnorm": sync_batchnorm}
    sizes = len(loaders[0]), len(data.classes)
    trainer = Trainer(
        model.to(device), recipe, *sizes, seed, skip_corrupt, optimize=optimize, **options
    )
    config = {**(config or {}), **_describe(trainer, data, workers), **options}
    with ExitStack() as stack:
        opened = open_run(run_dir, config)
        # Of many machines, one alone needs to see the run's folder.
        checkpoint = distributed.of_rank_0(lambda: stack.enter_context(opened))
        if checkpoint:
            _resume(trainer, checkpoint, run_dir)
            if distributed.rank() == 0:  # a kill may have come between last.pt and the rest
                end_save(run_dir, checkpoint, keep_every)
        bar = progress_bar(
            total=recipe.epochs * trainer.steps_per_epoch * recipe.batch_size,
            initial=trainer.step * recipe.batch_size,
            unit=" images",
            disable=quiet or distributed.rank() > 0,
        )
        stack.enter_context(_saying_how_to_go_on(run_dir))
        stack.enter_context(advising_on_memory(memory_advice(recipe)))
        stack.enter_context(_naming_images(trainer, data, run_dir))
        _Run(
            trainer,
            *loaders,
            run_dir,
            config,
            progress=stack.enter_context(bar),
            stop=stack.enter_context(StopRequest(catch_signals, timeout_s + distributed.MARGIN_S)),
            checkpoint_steps=checkpoint_steps,
            keep_every=keep_every,
            timeout_s=timeout_s,
            tensorboard=tensorboard,
            quiet=quiet,
        ).train()
    return trainer


def _resume(trainer: Trainer, checkpoint: dict[str, Any], run_dir: Path) -> None:
    path = run_dir / "last.pt"
    advice = "its own config; put best.pt in its place, or start again in another folder"
    if name := odd_entry(trainer, checkpoint):
        raise RunError(f"{path}: its {name!r} is not that of {advice}")
    try:
        trainer.load_state_dict(checkpoint)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: its weights are not those of {advice}") from error


@dataclasses.dataclass
class _Run:
    """A trainer on its way through the epochs: what is saved and told, when, and how it stops."""

    trainer: Trainer
    train_loader: DataLoader
    val_loader: DataLoader
    run_dir: Path
    config: dict[str, Any]
    progress: tqdm
    stop: StopRequest
    checkpoint_steps: int
    keep_every: int
    timeout_s: float
    tensorboard: bool
    quiet: bool

    def train(self) -> None:
        """Trains to the last epoch, or until a signal comes."""
        trainer = self.trainer
        try:
            while trainer.epoch < trainer.recipe.epochs:
                train_loss = self._train_epoch()
                self._evaluate_epoch(train_loss)
                self._save()
                self._tell()
        except (Requested, WorkerError) as error:
            if isinstance(error, WorkerError):
                if not self.stop.signal or distributed.world_size() > 1:
                    raise
                trainer.synchronize()  # no step is under way, and who waits for a disk may stop, too
            self._save()
            raise Stopped(
                f"{self.stop.signal or 'a signal to another process'}, all is saved at step "
                f"{trainer.step}; {_same_command(self.run_dir)} goes on"
            ) from None

    def _train_epoch(self) -> float:
        """Trains the epoch under way to its end; returns its mean loss."""
        trainer = self.trainer
        self.progress.set_description_str(f"epoch {trainer.epoch + 1}/{trainer.recipe.epochs}")
        inputs.begin(self.train_loader, trainer.epoch, trainer.step_in_epoch)
        trainer.start_s = time.perf_counter()
        batches = watched(self.train_loader, self.timeout_s)
        train_loss = train_one_epoch(trainer, batches, self.progress, self._after_step)
        trainer.earlier_s, trainer.start_s = trainer.train_time_s, None
        return train_loss

    def _after_step(self) -> None:
        trainer, stopping = self.trainer, self.stop.agreed()
        due = self.checkpoint_steps and trainer.step % self.checkpoint_steps == 0
        # The last step of an epoch is saved with its evaluation.
        if stopping or (due and trainer.step_in_epoch < trainer.steps_per_epoch):
            trainer.synchronize()
            if stopping:
                raise Requested
            self._save()

    def _evaluate_epoch(self, train_loss: float) -> None:
        """Evaluates the raw and the averaged weights, and ends the epoch with a row of each."""
        trainer, start_s = self.trainer, time.perf_counter()
        # Each process has statistics of its own images; rank 0's are those that are saved.
        distributed.broadcast_buffers(trainer.model, trainer.ema)
        batches = self.stop.watch(watched(self.val_loader, self.timeout_s))
        results = trainer.evaluate(batches)
        row = {
            "epoch": trainer.epoch + 1,
            "step": trainer.step,
            "first_lr": trainer.lr_at(trainer.epoch * trainer.steps_per_epoch),
            "train_loss": train_loss,
        }
        for prefix, result in results.items():
            row |= {f"{prefix}val_{key}": result[key] for key in ("loss", "top1_pct", "top5_pct")}
        if not all(math.isfinite(value) for value in row.values()):
            raise DivergedError(
                f"the loss is not finite on the validation images, after step {trainer.step - 1}"
            )
        trainer.skipped = distributed.union(trainer.skipped)
        images = trainer.steps_per_epoch * trainer.recipe.batch_size
        speed = {
            "epoch": trainer.epoch + 1,
            "train_time_s": trainer.train_time_s,
            "eval_time_s": time.perf_counter() - start_s,
            "train_images_per_s": images / trainer.train_time_s,
        }
        trainer.end_epoch(row, speed)

    def _save(self) -> None:
        if distributed.rank() == 0:
            checkpoint = {"config": self.config, **self.trainer.state_dict()}
            save_checkpoint(self.run_dir, checkpoint, self.keep_every)

    def _tell(self) -> None:
        if distributed.rank() > 0:
            return
        if not self.quiet:
            self.progress.write(describe_epoch(self.trainer))
        if self.tensorboard:
            rows = self.trainer.metrics[-1], self.trainer.speed[-1]
            log_tensorboard(self.run_dir, *rows)


def memory_advice(recipe: Recipe) -> str:
    """What helps where training runs out of memory, the least harmful first."""
    parts = 2 * recipe.accumulate
    fits = parts <= recipe.batch_size // distributed.world_size()
    return f"--accumulate {parts}, or " * fits + SMALLER


@contextmanager
def _saying_how_to_go_on(run_dir: Path) -> Iterator[None]:
    """At an interrupt, after which nothing is saved."""
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"{_same_command(run_dir)} goes on from what was saved before"
        ) from error


def _same_command(run_dir: Path) -> str:
    return f"the same command with --output-dir {shlex.quote(str(run_dir))}"


@contextmanager
def _naming_images(trainer: Trainer, data: Splits, run_dir: Path) -> Iterator[None]:
    """Names the images of a step gone wrong."""
    try:
        yield
    except DivergedError as error:
        if error.step is None:
            raise
        images = [str(data.train.path(i)) for i in error.indices]
        learning_rate = trainer.lr_at(error.step)
        if distributed.rank() == 0:
            with suppress(OSError):
                record = {"step": error.step, "learning_rate": learning_rate, "images": images}
                write_json(run_dir / DIVERGED, record)
        few = ", ".join(images[:3] + ["..."] * (len(images) > 3))
        raise DivergedError(
            f"{error}; learning rate {learning_rate:.4g}, images {few} "
            f"(all in {run_dir / DIVERGED})"
        ) from error


def describe_epoch(trainer: Trainer) -> str:
    """One line on the last epoch."""
    row, speed = trainer.metrics[-1], trainer.speed[-1]
    return (
        f"epoch {row['epoch']:3d}/{trainer.recipe.epochs}  train loss {row['train_loss']:.3f}  "
        f"val top-1 raw {row['val_top1_pct']:5.1f} %  EMA {row['ema_val_top1_pct']:5.1f} %  "
        f"({speed['train_images_per_s']:.0f} images/s)"
    )


def make_loaders(
    data: Splits,
    recipe: Recipe,
    seed: int,
    workers: int,
    device: torch.device,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of this process's share of training and validation batches."""
    options = (workers, device.type == "cuda")
    return (
        inputs.train_loader(data.train, recipe.batch_size, seed, *options),
        inputs.eval_loader(data.val, recipe.batch_size, *options),
    )


def _describe(trainer: Trainer, data: Splits, workers: int) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(trainer.recipe),
        "seed": trainer.seed,
        "classes": data.classes,
        "shards": inputs.describe(data.train, workers),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "autocast": dtype_name(trainer.dtype),
        "processes": distributed.world_size(),
        "workers": workers,
        **describe_machine(),
    }
