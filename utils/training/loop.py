"""The training loop: the state of a run, one epoch, `fit` and the dry run.

`fit` takes any classifier from images `[N, 3, H, W]` to logits `[N, num_classes]`.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import math
import shlex
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbones.classifier import Classifier
from backbones.weights import Report
from utils import distributed
from utils.cli import DataError, Stopped, first_line, progress_bar, summarize, warn
from utils.data.folders import STEP_STREAM, Batch, Preprocess, Splits, begin, readable, stream_seed
from utils.data.transforms import CorruptImageError
from utils.measure import count_macs, count_parameters
from utils.recipe import Recipe
from utils.records import describe_machine, write_json
from utils.training.checkpoint import DIVERGED, finish_save, open_run, save_checkpoint
from utils.training.evaluation import autocast, autocast_dtype, dtype_name, evaluate
from utils.training.optimizer import ema_decay_at, lr_factor, make_optimizer

MIN_SCALE = 1e-4  # of float16's loss; halved by each step whose gradients are not finite
PROGRESS_STEPS = 20  # steps between two reads of the loss, which wait for the device
SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2  # job managers and torchrun may both send one SIGTERM, within this time


class DivergedError(ArithmeticError):
    """The loss is not finite; the message names the step.

    Attributes:
        step: the first such step, from 0, if known.
        indices: the dataset's indices of the images of that step.
    """

    def __init__(self, text: str, step: int | None = None, indices: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.step, self.indices = step, indices


def weights_of_classes(class_images: Tensor | None) -> Tensor:
    """One over the images of each class, `[num_classes]`, with a mean of 1 over the images."""
    if class_images is None:
        raise ValueError("class_weights=True needs class folders: shards are not counted")
    return (class_images.sum() / (len(class_images) * class_images)).float()


class Trainer:
    """The state of a training run: model, EMA model, optimizer, schedule, step and rows.

    Args:
        model: on its device already; trained in place.
        steps_per_epoch: optimizer steps per pass over the training images.
        seed: seeds the random numbers of each step (mixing, dropout), together with its number.
        class_images: training images of each class, `[num_classes]`, for `recipe.class_weights`.
        skip_corrupt: skip unreadable images instead of raising.
        compile: run the network under `torch.compile`.
        sync_batchnorm: compute BatchNorm statistics over the images of all processes.

    Raises:
        ValueError: more gradient accumulation steps than images, or more stages to freeze than the
            network has, or a recipe for a `Classifier` and another model.

    Attributes:
        metrics, speed: one row per epoch so far.
        skipped: one message per unreadable image that was skipped, with its path.
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
        class_images: Tensor | None = None,
    ) -> None:
        images = recipe.batch_size // distributed.world_size()
        if recipe.accumulate > images:
            raise ValueError(
                f"accumulate={recipe.accumulate} must be at most {images}, the images per step of "
                "a process"
            )
        if recipe.freeze >= 0 or recipe.backbone_lr_factor != 1:
            if not isinstance(model, Classifier):
                raise ValueError("freeze and backbone_lr_factor are for a backbones.Classifier")
            if recipe.freeze >= 0:
                model.backbone.freeze(recipe.freeze)
        self.device = next(model.parameters()).device
        self.class_weights = None
        if recipe.class_weights:
            self.class_weights = weights_of_classes(class_images).to(self.device)
        self.preprocess = Preprocess(self.device, recipe, mix_classes=num_classes)
        self.eval_preprocess = Preprocess(self.device, recipe)
        self.model = model.to(memory_format=self.preprocess.memory_format)
        self.recipe, self.steps_per_epoch, self.seed = recipe, steps_per_epoch, seed
        self.num_classes = num_classes
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.net = distributed.data_parallel(self.model, self.device, sync_batchnorm)
        if compile:  # self.model, and so the checkpoints, stay as they are
            self.net = torch.compile(self.net)
        self.dtype = autocast_dtype(self.device, recipe.precision)
        self.optimizer = make_optimizer(self.model, recipe, self.dtype)
        # Skips the steps whose float16 gradients overflow; does nothing for other types.
        self.scaler = GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.lr_factor = functools.partial(
            lr_factor,
            warmup_steps=round(recipe.warmup_epochs * steps_per_epoch),
            total_steps=recipe.epochs * steps_per_epoch,
            flat_share=recipe.flat_share,
        )
        self.schedule = LambdaLR(self.optimizer, self.lr_factor)
        self.skip_corrupt = skip_corrupt
        self.step = 0
        self.loss_sum = torch.zeros((), device=self.device)  # of the current epoch
        self.loss_sums = distributed.gather(self.loss_sum)  # of all processes, if synchronized
        # Step, loss and images of the steps since the last synchronization.
        self.recent: list[tuple[int, Tensor, Sequence[int]]] = []
        self.train_time_s = 0.0  # of the current epoch
        self.metrics: list[dict[str, float]] = []
        self.speed: list[dict[str, float]] = []
        self.skipped: dict[str, None] = {}  # an ordered set

    def train_step(self, batch: Batch) -> Tensor:
        """One update from one batch of this process; returns the loss, still on the device."""
        torch.manual_seed(stream_seed(STEP_STREAM, self.seed, self.step, distributed.rank()))
        images, targets = self.preprocess(batch)
        loss = self._backward(images, targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # now, so that the next forward pass has their memory
        self.schedule.step()
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(ema_decay_at(self.step, self.recipe.ema_decay))
        self.ema.update_parameters(self.model)
        self.loss_sum += loss
        self.recent.append((self.step, loss, batch.indices))
        self.step += 1
        return loss

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adds the gradients of the mean loss, in gradient accumulation steps."""
        total, parts = torch.zeros((), device=self.device), self.recipe.accumulate
        options = {"weight": self.class_weights, "label_smoothing": self.recipe.label_smoothing}
        pairs = list(zip(images.chunk(parts), targets.chunk(parts), strict=True))
        for k, (part_images, part_targets) in enumerate(pairs, start=1):
            # Processes exchange gradients once, with the last part.
            with distributed.sync_gradients(self.net, k == len(pairs)):
                with autocast(self.device, self.dtype):
                    logits = self.net(part_images)
                losses = cross_entropy(logits.float(), part_targets, reduction="sum", **options)
                loss = losses / len(images)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
        """Accuracy of the raw weights, under the name "", and of the EMA weights, "ema_"."""
        models = {"": self.model, "ema_": self.ema.module}
        batches = readable(batches, self.skip_corrupt, self.skipped)
        return evaluate(models, batches, self.eval_preprocess, self.num_classes, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end in the same bits; see `synchronize`."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
            "speed": self.speed,
            "skipped": list(self.skipped),
            "under_way": {"train_time_s": self.train_time_s, "loss_sums": self.loss_sums},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        for name in ("model", "ema", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.metrics, self.speed = state["step"], state["metrics"], state["speed"]
        self.skipped = dict.fromkeys(state["skipped"])
        self.train_time_s = state["under_way"]["train_time_s"]
        self.loss_sums = state["under_way"]["loss_sums"].to(self.device)
        self.loss_sum = self.loss_sums[distributed.rank()].clone()

    def end_epoch(self, train_loss: float, batches: Iterable[Batch] | None) -> None:
        """Ends the current epoch with its rows.

        Args:
            batches: those to evaluate the raw and the EMA weights on; None skips the evaluation.

        Raises:
            DivergedError: a validation loss is not finite.
        """
        start_s = time.perf_counter()
        # Each process has BatchNorm statistics of its own images; those of rank 0 are saved.
        distributed.broadcast_buffers(self.model, self.ema)
        row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "first_lr": self.lr_at(self.epoch * self.steps_per_epoch),
            "train_loss": train_loss,
        }
        results = {} if batches is None else self.evaluate(batches)
        for prefix, result in results.items():
            row |= {f"{prefix}val_{key}": result[key] for key in ("loss", "top1_pct", "top5_pct")}
        if not all(math.isfinite(value) for value in row.values()):
            raise DivergedError(
                f"the loss is not finite on the validation images, after step {self.step - 1}"
            )
        speed = {
            "epoch": self.epoch + 1,
            "train_time_s": self.train_time_s,
            "eval_time_s": time.perf_counter() - start_s,
            "train_images_per_s": self.steps_per_epoch * self.recipe.batch_size / self.train_time_s,
        }
        self.metrics.append(row)
        self.speed.append(speed)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.train_time_s = 0.0

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        return self.recipe.peak_lr * self.lr_factor(step)

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; the epochs before it are trained and evaluated."""
        return len(self.metrics)

    @property
    def step_in_epoch(self) -> int:
        """Completed steps of the current epoch."""
        return self.step - self.epoch * self.steps_per_epoch

    def mean_loss(self) -> float:
        """Mean loss of the current epoch over all processes, if synchronized."""
        return statistics.fmean(self.loss_sums.tolist()) / self.step_in_epoch

    def synchronize(self) -> None:
        """Waits for the device and the other processes, so that `state_dict` covers all of them.

        Raises:
            DivergedError: a loss of the current epoch, or a weight, is not finite; raised in all
                processes.
        """
        self.skipped.update(distributed.union(self.skipped))  # `readable` holds the same dict
        self.loss_sums = distributed.gather(self.loss_sum)
        with torch.no_grad():
            norms = torch._foreach_norm(list(self.model.parameters()))
        bad = ~torch.isfinite(torch.stack([self.loss_sum, *norms])).all()
        bad |= self.scaler.get_scale() < MIN_SCALE
        if distributed.sum_over_processes(bad.float()):
            self._raise_diverged()
        self.recent.clear()

    def _raise_diverged(self) -> NoReturn:
        """DivergedError with the first bad step of all processes and its images."""
        advice = "try a lower --lr-per-1024 or --precision float32, in another --output-dir"
        own = [(step, indices) for step, loss, indices in self.recent if not loss.isfinite()]
        found = [each[0] for each in distributed.gather_objects(own) if each]
        if not found:
            raise DivergedError(f"a weight or a gradient is not finite; {advice}")
        step = min(step for step, _ in found)
        indices = [i for each, some in found if each == step for i in some]
        raise DivergedError(f"the loss is not finite at step {step}; {advice}", step, indices)


def train_one_epoch(
    trainer: Trainer,
    batches: Iterable[Batch],
    progress: tqdm | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """One pass over `batches`; returns the mean loss over the steps and all processes.

    Args:
        after_step: called after each step; may end the pass by an exception.

    Raises:
        CorruptImageError: an image is unreadable and may not be skipped, or all of a batch are.
        DivergedError: the loss is not finite.
    """
    trainer.net.train()
    start_s = time.perf_counter() - trainer.train_time_s  # which is above 0 after a resume
    for batch in readable(batches, trainer.skip_corrupt, trainer.skipped):
        if not len(batch.labels):
            raise CorruptImageError(f"{batch.corrupt[0]}; so are all other images of its batch")
        trainer.train_step(batch)
        if trainer.step % PROGRESS_STEPS == 0:
            trainer.synchronize()
            if progress is not None:
                progress.set_postfix_str(f"loss {trainer.mean_loss():.3f}", refresh=False)
        if progress is not None:
            progress.update(trainer.recipe.batch_size)
        trainer.train_time_s = time.perf_counter() - start_s
        after_step()
    trainer.synchronize()
    trainer.train_time_s = time.perf_counter() - start_s
    return trainer.mean_loss()


class StopRequest:
    """Catches SIGINT and SIGTERM inside its `with` block; the same signal again interrupts.

    Of two SIGTERMs within `REPEAT_S` the second is ignored. An ignored signal stays ignored.
    Outside the main thread nothing is caught.

    Args:
        save: saves the run before it is stopped.
        catch: whether to catch signals at all.
        timeout_s: how long the processes wait for each other.
    """

    def __init__(self, save: Callable[[], None], catch: bool, timeout_s: float) -> None:
        self.signal: str | None = None  # name of the first one that this process received
        self._save = save
        self._catches = catch and threading.current_thread() is threading.main_thread()
        self._first_s: dict[int, float] = {}
        self._handlers: dict[signal.Signals, Any] = {}
        self._group = None
        if dist.is_initialized():
            timeout = datetime.timedelta(seconds=timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS if self._catches else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that C has set

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number not in self._first_s:
            self._first_s[number] = time.monotonic()
            self.signal = self.signal or signal.Signals(number).name
        elif number == signal.SIGINT or time.monotonic() - self._first_s[number] > REPEAT_S:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Saves and raises `Stopped` in all processes if one has a signal.

        All of them call it at the same point. The flags are summed on the CPUs, so that nothing
        waits for a GPU.
        """
        stop = torch.tensor(float(self.signal is not None))
        if self._group is not None:
            dist.all_reduce(stop, group=self._group)
        if stop:
            self._save()
            raise Stopped(self.signal or "a signal to another process")

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields `batches`, in a process that has a signal not to their end, and calls `check`."""
        for batch in batches:
            if self.signal:
                break
            yield batch
        self.check()


def make_loaders(
    data: Splits, recipe: Recipe, workers: int, device: torch.device, timeout_s: float = 0
) -> tuple[DataLoader, DataLoader]:
    """Loaders of this process's share of the training and validation batches."""
    options = recipe.batch_size, workers, device.type == "cuda", timeout_s
    return data.train.train_loader(*options), data.val.eval_loader(*options)


def _weights_report(model: nn.Module) -> Report | None:
    """What weights a classifier was started from, if any."""
    return model.backbone.weights_report if isinstance(model, Classifier) else None


def has_folded_norms(model: nn.Module) -> bool:
    """Whether all BatchNorm statistics are a mean of 0 and a variance of 1, as before training.

    Weights with them were converted from a network whose BatchNorm was folded into convolutions.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return bool(norms) and all(
        norm.running_mean.abs().max() < 1e-6 and (norm.running_var - 1).abs().max() < 1e-3
        for norm in norms
    )


@torch.no_grad()
def estimate_norms(model: nn.Module, data: Splits, recipe: Recipe, batches: int = 8) -> int:
    """Sets the BatchNorm statistics to those of training images; the outputs stay the same.

    Training normalizes by the statistics of a batch, and folded weights have a mean of 0 and a
    variance of 1 instead: the first step would change the function of the network.

    Returns:
        The number of images.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    sums = {norm: torch.zeros(2, *norm.running_mean.shape).to(norm.weight) for norm in norms}

    def add(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        sums[norm] += torch.stack(torch.var_mean(inputs[0], (0, 2, 3), correction=0))

    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    preprocess = Preprocess(next(model.parameters()).device, recipe)
    loader = data.train.train_loader(recipe.batch_size, 0)
    begin(loader, 0)
    model.eval()
    taken = [batch for batch in itertools.islice(loader, batches) if len(batch.labels)]
    for batch in taken:
        model(preprocess(batch)[0])
    for hook in hooks:
        hook.remove()
    images = sum(len(batch.labels) for batch in taken)
    counts = distributed.sum_over_processes(torch.tensor([len(taken), images]).to(norms[0].weight))
    for norm, total in sums.items():
        var, mean = distributed.sum_over_processes(total) / counts[0]
        old_std, std = (norm.running_var + norm.eps).sqrt(), (var + norm.eps).sqrt()
        norm.bias += norm.weight * (mean - norm.running_mean) / old_std
        norm.weight *= std / old_std
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return int(counts[1])


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
    eval_every: int = 1,
    checkpoint_steps: int = 0,
    keep_every: int = 0,
    timeout_s: float = 600,
    tensorboard: bool = False,
    quiet: bool = False,
    catch_signals: bool = True,
) -> Trainer:
    """Trains `model` by `recipe` to the last epoch, resuming the run in `run_dir` if there is one.

    Args:
        config: entries for config.json beside the recipe and the machine: what made the model.
        workers: processes that decode images; 0 decodes in threads of this process.
        skip_corrupt: skip and list unreadable images instead of stopping.
        compile: train under `torch.compile`: a minute or more at the start, then faster steps.
        sync_batchnorm: BatchNorm over the images of all processes; on GPUs only.
        eval_every: evaluate after every so many epochs and the last; 0: after the last alone.
        checkpoint_steps: also save after every so many steps; 0 saves at the ends of epochs.
        keep_every: keep the checkpoint of every so many epochs; 0 keeps the last and the best.
        timeout_s: how long to wait for a batch of a worker process, 0 forever; processes wait
            `utils.distributed.MARGIN_S` longer for each other.
        tensorboard: also log every row for TensorBoard.
        quiet: show neither a progress bar nor a line per epoch.
        catch_signals: whether SIGINT and SIGTERM save before they stop the run.

    Returns:
        The trainer, with the model, the EMA model and the rows of every epoch.

    Raises:
        ValueError: a batch larger than the data.
        DataError: `run_dir` holds another run.
        CorruptImageError: an image is unreadable.
        DivergedError: the loss is not finite; the last checkpoint is from before.
        RuntimeError: a worker process died or timed out; PyTorch's message says which.
        Stopped: a signal came, and the run is saved.
    """
    run_dir, device = Path(run_dir), device or distributed.pick_device()
    loaders = make_loaders(data, recipe, workers, device, timeout_s)
    recorded = {"seed": seed, "compile": compile, "sync_batchnorm": sync_batchnorm}
    options = {**recorded, "skip_corrupt": skip_corrupt}
    trainer = _make_trainer(model.to(device), data, recipe, len(loaders[0]), **options)
    described = distributed.of_rank_0(lambda: _describe(trainer, data, workers))
    config = {**(config or {}), **described, **recorded}
    with contextlib.ExitStack() as stack:
        opened = open_run(run_dir, config)
        # On several machines, only that of rank 0 needs the run's folder.
        checkpoint = distributed.of_rank_0(lambda: stack.enter_context(opened))
        if checkpoint:
            try:
                trainer.load_state_dict(checkpoint)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = f"does not fit its own config ({first_line(error)})"
                raise DataError(f"{run_dir / 'last.pt'}: {reason}") from error
            if distributed.rank() == 0:  # a kill may have come between last.pt and the rest
                finish_save(run_dir, checkpoint, keep_every)
        elif _weights_report(model) and has_folded_norms(model):
            count = estimate_norms(trainer.model, data, recipe)
            trainer.ema.module.load_state_dict(trainer.model.state_dict())
            warn(f"BatchNorm of the weights is folded: statistics estimated on {count} images")
        bar = progress_bar(
            total=recipe.epochs * trainer.steps_per_epoch * recipe.batch_size,
            initial=trainer.step * recipe.batch_size,
            unit=" images",
            disable=quiet or distributed.rank() > 0,
        )
        stack.enter_context(bar)
        save = functools.partial(_save, trainer, run_dir, config, keep_every)
        stop = StopRequest(save, catch_signals, timeout_s + distributed.MARGIN_S)
        stack.enter_context(stop)
        stack.enter_context(_complete_messages(trainer, data, run_dir))
        after_step = functools.partial(_after_step, trainer, stop, save, checkpoint_steps)
        while trainer.epoch < recipe.epochs:
            bar.set_description_str(f"epoch {trainer.epoch + 1}/{recipe.epochs}")
            begin(loaders[0], trainer.epoch, trainer.step_in_epoch)
            train_loss = train_one_epoch(trainer, loaders[0], bar, after_step)
            due = (trainer.epoch + 1) in evaluated_epochs(recipe.epochs, eval_every)
            trainer.end_epoch(train_loss, stop.watch(loaders[1]) if due else None)
            save()
            if distributed.rank() == 0:
                _report(trainer, bar, run_dir if tensorboard else None)
    return trainer


def _make_trainer(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    steps_per_epoch: int,
    **options: Any,
) -> Trainer:
    classes, counts = len(data.classes), None
    if data.train.packed is None:  # class folders
        counts = torch.bincount(torch.from_numpy(data.train.labels), minlength=classes)
    return Trainer(model, recipe, steps_per_epoch, classes, class_images=counts, **options)


def evaluated_epochs(epochs: int, eval_every: int) -> set[int]:
    """The epochs, from 1, after which a run evaluates: every `eval_every`-th, and the last."""
    return {epochs, *range(eval_every, epochs, eval_every)} if eval_every else {epochs}


def _save(trainer: Trainer, run_dir: Path, config: dict[str, Any], keep_every: int) -> None:
    trainer.synchronize()
    if distributed.rank() == 0:
        save_checkpoint(run_dir, {"config": config, **trainer.state_dict()}, keep_every)


def _after_step(
    trainer: Trainer, stop: StopRequest, save: Callable[[], None], checkpoint_steps: int
) -> None:
    """Stops the run after this step, or saves it, if it is time."""
    stop.check()
    # The last step of an epoch is saved together with its evaluation.
    is_last = trainer.step_in_epoch == trainer.steps_per_epoch
    if checkpoint_steps and trainer.step % checkpoint_steps == 0 and not is_last:
        save()


@contextlib.contextmanager
def _complete_messages(trainer: Trainer, data: Splits, run_dir: Path) -> Iterator[None]:
    """Completes the message of what ends a run: how to resume it, or which images to look at."""
    resume = f"run the same command with --output-dir {shlex.quote(str(run_dir))} to resume"
    try:
        yield
    except Stopped as error:
        raise Stopped(f"{error}, saved at step {trainer.step}; {resume}") from None
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{resume} from the last checkpoint") from error
    except DivergedError as error:
        if error.step is None:
            raise
        images = [str(data.train.path(i)) for i in error.indices]
        learning_rate, path = trainer.lr_at(error.step), run_dir / DIVERGED
        record = {"step": error.step, "learning_rate": learning_rate, "images": images}
        if distributed.rank() == 0:
            write_json(path, record)
        raise DivergedError(
            f"{error}; learning rate {learning_rate:.4g}, images {summarize(images)}, all listed "
            f"in {path}"
        ) from error


def _report(trainer: Trainer, bar: tqdm, log_dir: Path | None) -> None:
    """Prints the last epoch above the bar, and logs it for TensorBoard."""
    row, speed = trainer.metrics[-1], trainer.speed[-1]
    text = f"epoch {row['epoch']:3d}/{trainer.recipe.epochs}  train loss {row['train_loss']:.3f}"
    if "val_top1_pct" in row:
        text += "  val top-1 raw {val_top1_pct:5.1f} %  EMA {ema_val_top1_pct:5.1f} %".format(**row)
    if not bar.disable:
        bar.write(f"{text}  ({speed['train_images_per_s']:.0f} images/s)")
    if log_dir is not None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

        with SummaryWriter(log_dir) as writer:
            for name, value in {**row, **speed}.items():
                writer.add_scalar(name, value, row["epoch"])


def _describe(trainer: Trainer, data: Splits, workers: int) -> dict[str, Any]:
    weights = {}
    if report := _weights_report(trainer.model):  # published ones bring options
        weights = {"options": trainer.model.backbone.options, "weights_sha256": report.sha256}
    return {
        **weights,
        "recipe": dataclasses.asdict(trainer.recipe),
        "classes": data.classes,
        "shards": data.train.packed,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "train_files": data.train.digest(),
        "val_files": data.val.digest(),
        "autocast": dtype_name(trainer.dtype),
        "processes": distributed.world_size(),
        "workers": workers,
        **describe_machine(),
    }


def dry_run(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    *,
    name: str = "network",
    workers: int = 0,
    device: torch.device | None = None,
    eval_every: int = 1,
    timeout_s: float = 600,
    **options: Any,
) -> float:
    """Prints what `fit` would do, takes a few steps of its loop, and estimates the time of a run.

    Writes no files. The first steps start workers and compile kernels, and use the batches that
    the workers decoded in the meantime; the steps after them are timed.

    Args:
        model: trained in place for these steps.
        name: the network's name, to print.
        workers, device, eval_every, timeout_s: as of `fit`.
        options: as of `Trainer`.

    Returns:
        Estimated seconds of the complete run, without checkpoints.

    Raises:
        ValueError, CorruptImageError, DivergedError, RuntimeError: as `fit`.
    """
    device = device or distributed.pick_device()
    loaders = make_loaders(data, recipe, workers, device, timeout_s)
    steps, crop_px = len(loaders[0]), recipe.train_crop_px
    trainer = _make_trainer(model.to(device), data, recipe, steps, **options)
    total = recipe.epochs * steps
    peak = max(0, trainer.lr_factor.keywords["warmup_steps"] - 1)
    marks = sorted({0, peak, total // 2, total - 1})
    rates = ", ".join(f"{trainer.lr_at(step):.3g} at step {step}" for step in marks)
    lines = [
        f"model: {name}, {count_parameters(model) / 1e6:.2f} M parameters with its head, "
        f"{count_macs(model, crop_px, crop_px) / 1e9:.3g} GMACs at {crop_px} x {crop_px} pixels",
        data.describe(recipe.batch_size),
        f"schedule: {recipe.epochs} epochs, {total} steps, learning rate {rates}",
        f"device: {device}, processes: {distributed.world_size()}, workers of each: {workers}",
    ]
    marks_s = [time.perf_counter()]

    def after_step() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks_s.append(time.perf_counter())

    begin(loaders[0], 0)
    batches = itertools.islice(loaders[0], 4 + 2 * workers)  # two of each worker are ready early
    train_one_epoch(trainer, batches, after_step=after_step)
    times_s = [end_s - start_s for start_s, end_s in itertools.pairwise(marks_s)]
    start_s, eval_steps = time.perf_counter(), max(1, min(4, len(loaders[1])))
    trainer.evaluate(itertools.islice(loaders[1], eval_steps))
    eval_step_s = (time.perf_counter() - start_s) / eval_steps
    # The slowest process sets the pace.
    paces_s = torch.tensor([times_s[0], min(times_s[-3:]), eval_step_s], device=device)
    first_s, step_s, eval_step_s = distributed.gather(paces_s).amax(0).tolist()
    epoch_s, eval_s = steps * step_s, len(loaders[1]) * eval_step_s
    evaluations = len(evaluated_epochs(recipe.epochs, eval_every))
    total_s = recipe.epochs * epoch_s + evaluations * eval_s
    lines += [
        f"first step: {first_s:.3g} s, later steps: {step_s:.3g} s",
        f"estimate: {datetime.timedelta(seconds=round(total_s))} (h:mm:ss) for {recipe.epochs} "
        f"epochs of {epoch_s:.3g} s and {evaluations} evaluations of {eval_s:.3g} s",
    ]
    if distributed.rank() == 0:
        print("\n".join(lines))
    return total_s
