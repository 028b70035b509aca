"""Studies: one factor varied over seeds, each run in a folder of its own, one row per run.

A study is declared in a table (`utils.studies.definitions`). `run_study` trains what is missing and writes two
tidy CSV files, results and curves; `utils.studies.statistics` says what came out.

No run looks at the validation set while it trains: its curves are those of a slice cut from the
training images, the same slice for every run. The validation images are read once, at its end; by
a study that tunes, not at all.
"""

import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from utils.cli import progress_bar
from utils.data.folders import (
    EvalBatches,
    ImageFiles,
    hold_out,
    make_loader,
    open_folders,
    open_val,
    readable,
)
from utils.distributed import pick_device
from utils.measure import count_macs, count_parameters
from utils.recipe import Recipe
from utils.records import command_line, provenance, write_json, write_table
from utils.training import loop
from utils.training.checkpoint import validate_same_run
from utils.training.evaluation import evaluate

# From (name of a backbone, number of classes, **options of the backbone) to a classifier.
MakeModel = Callable[..., nn.Module]

HOLD_OUT_EVERY = 10  # each tenth training image of a class, in the order of names
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One value of a study's factor.

    Args:
        options: what it changes in the backbone.
        recipe: what it changes in the study's recipe.
        test_sizes_px: sides of the test crop besides the recipe's; each gives a row.
    """

    value: str
    backbone: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    test_sizes_px: tuple[int, ...] = ()

    @property
    def network(self) -> str:
        """The backbone with its options, such as "cspdarknet53 split=slice"."""
        return " ".join([self.backbone, *(f"{k}={v}" for k, v in self.options.items())])


@dataclass(frozen=True)
class Study:
    """A factor, its values and seeds, and the recipe that they share.

    Args:
        name: of its CSV and of its folder of runs.
        factor: what the variants differ in.
        baseline: the value that others are compared with.
        recipe: of every run, but for what an variant changes.
        weights: whose accuracy is compared, the averaged ones ("ema") or the last ("raw").
        extra_evaluations: comparisons of the baseline's runs with themselves, tested otherwise: a name to
            the weights and the side of the test crop in pixels.
        tuning: test on the held-out slice; the validation images are not read.
    """

    name: str
    factor: str
    baseline: str
    recipe: Recipe
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    weights: Literal["ema", "raw"] = "ema"
    extra_evaluations: Mapping[str, tuple[Literal["ema", "raw"], int]] = field(default_factory=dict)
    tuning: bool = False

    def __post_init__(self) -> None:
        values = [variant.value for variant in self.variants]
        if len(set(values)) < len(values):
            raise ValueError(f"study {self.name}: a value stands there twice: {values}")
        if len({_slug(value) for value in values}) < len(values):
            raise ValueError(
                f"study {self.name}: two values would share a folder of runs: {values}"
            )
        if self.baseline not in values:
            raise ValueError(f"study {self.name}: baseline={self.baseline!r} is none of {values}")
        for variant in self.variants:  # a wrong recipe shows before anything is trained
            replace(self.recipe, **variant.recipe)

    def runs(self) -> list[tuple[Variant, int]]:
        """Every value with every seed, seeds outermost: a study cut short is still balanced."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    @property
    def top1_column(self) -> str:
        """The column of results that the study compares."""
        return f"top1_{self.weights}_pct"

    def recipe_of(self, variant: Variant) -> Recipe:
        """What an variant's runs are trained with."""
        return replace(self.recipe, **variant.recipe)


def run_study(
    study: Study,
    make_model: MakeModel,
    data_dir: str | Path,
    runs_dir: str | Path,
    output: str | Path,
    *,
    processes: int = 1,
    devices: Sequence[str] = (),
) -> pd.DataFrame:
    """Trains what is missing of a study and writes its tables after every run.

    A finished run is a folder with a `result.json`; it is not trained again. An unfinished one goes
    on from its last whole epoch. A run that fails is a row that says so, and is tried again when
    the study is run again. Interrupted, it stops at once and leaves all of that to go on with.

    Args:
        make_model: makes an variant's classifier; with several processes a function of a module.
        data_dir: folder with train/ and val/.
        runs_dir: gets a folder per run, `<study>/<value>-seed<seed>`.
        output: the CSV, one row per run and test size; `curves_path(output)` gets a row per run
            and epoch.
        processes: runs at a time; they share the CPU's threads evenly.
        devices: such as ("cuda:0", "cuda:1"), dealt out to the processes in turn.

    Returns:
        The table of results.

    Raises:
        ValueError: wrong arguments; a folder of a run holds another one; `output` is no record, or
            holds finished runs that are not asked for, or whose folders are not in `runs_dir` (a
            run deleted there is made again, as long as any other is left).
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    for device in devices:
        pick_device(device)
    data = hold_out(open_folders(data_dir, study.recipe), study.recipe, HOLD_OUT_EVERY)
    facts = {"classes": data.classes, "train_images": len(data.train)}
    jobs = [
        _Job(study, variant, seed, make_model, data_dir, Path(runs_dir) / study.name)
        for variant, seed in study.runs()
    ]
    rows = {job.key: _read_result(job, facts) for job in jobs}
    keep_record(output, set(rows) if any(rows.values()) else set())
    missing = [job for job in jobs if not rows[job.key]]

    def write() -> list[Row]:
        """Both tables, in the order of the study's runs."""
        table = [row for job in jobs for row in rows[job.key]]
        write_table(output, table)
        done = [job for job in jobs if rows[job.key] and rows[job.key][0]["status"] == "done"]
        write_table(curves_path(output), [row for job in done for row in _read_curve(job)])
        return table

    done = len(jobs) - len(missing)
    ending = closing(_each(missing, processes, devices))  # its processes, whatever happens
    options = {"unit": " runs", "desc": study.name, "smoothing": 0}
    with ending as ended, progress_bar(total=len(jobs), initial=done, **options) as bar:
        for job, found in ended:
            rows[job.key] = found
            write()
            bar.update()
    return pd.DataFrame(write())


def keep_record(output: str | Path, kept: set[tuple[str, int]]) -> None:
    """ValueError if `output` holds finished runs besides those that are kept or made again."""
    try:
        table = pd.read_csv(output, dtype={"commit": str})  # some are all digits
    except FileNotFoundError:
        return
    except ValueError:  # of pandas' parser and of bytes that are no text
        table = pd.DataFrame()
    if not {"status", "value", "seed"} <= set(table):
        raise ValueError(f"{output}: is no record of a study; give another output")
    there = table[table.status == "done"]
    lost = sorted(set(zip(there.value, there.seed, strict=True)) - kept)
    if lost:
        value, seed = lost[0]
        raise ValueError(
            f"{output}: holds {len(lost)} finished runs that would be lost, such as {value!r} with "
            f"seed {seed}: not asked for, or without a folder; give another output or remove it"
        )


def curves_path(output: str | Path) -> Path:
    """Where the learning curves of the study stand whose results are in `output`."""
    output = Path(output)
    return output.with_name(f"{output.stem}_curves{output.suffix}")


@dataclass(frozen=True)
class _Job:
    """One run of a study, with all that a process needs to train it."""

    study: Study
    variant: Variant
    seed: int
    make_model: MakeModel
    data_dir: str | Path
    parent: Path

    @property
    def run_dir(self) -> Path:
        return self.parent / f"{_slug(self.variant.value)}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        return self.study.recipe_of(self.variant)

    @property
    def options(self) -> dict[str, Any]:
        """Of the backbone."""
        return {**self.variant.options, **self.recipe.backbone_options}

    @property
    def sizes_px(self) -> list[int]:
        """Sides of the test crop, the recipe's first: a row each."""
        return [self.recipe.eval_crop_px, *self.variant.test_sizes_px]

    @property
    def key(self) -> tuple[str, int]:
        return self.variant.value, self.seed

    @property
    def facts(self) -> Row:
        """The columns that tell the runs of all studies apart."""
        return {
            "study": self.study.name,
            "factor": self.study.factor,
            "value": self.variant.value,
            "seed": self.seed,
            "network": self.variant.network,
        }


def _each(
    jobs: list[_Job], processes: int, devices: Sequence[str]
) -> Iterator[tuple[_Job, list[Row]]]:
    """Each job with its rows as it ends; in this process if there is to be one alone.

    Where a process is killed, all that its pool had not finished is begun again in a new one, until
    nothing is finished any more.
    """
    if processes == 1:
        _ready(torch.get_num_threads(), _device_of(0, devices))
        yield from ((job, _run(job)) for job in jobs)
        return
    while jobs:
        unfinished = yield from _each_of_pool(jobs, processes, devices)
        if len(unfinished) == len(jobs):
            reason = "a process was killed, perhaps for want of memory; not finished"
            yield from ((job, _failed(job, reason)) for job in jobs)
            return
        jobs = unfinished


def _each_of_pool(
    jobs: list[_Job], processes: int, devices: Sequence[str]
) -> Generator[tuple[_Job, list[Row]], None, list[_Job]]:
    """As `_each`, in processes of their own; returns what was not finished when one was killed."""
    context = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP does not live
    shared = context.SimpleQueue()
    for k in range(processes):
        shared.put(_device_of(k, devices))
    ready = (max(1, torch.get_num_threads() // processes), shared)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _ready_worker, ready)
    broken = set()
    try:
        futures = {pool.submit(_run, job): job for job in jobs}
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                broken.add(future)
            else:
                yield futures[future], future.result()
        pool.shutdown()
    except BaseException:  # Ctrl-C above all
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # its run goes on from its last whole epoch next time
        raise
    return [job for future, job in futures.items() if future in broken]


_DEVICE: str | None = None  # of the runs of this process


def _device_of(process: int, devices: Sequence[str]) -> str | None:
    return devices[process % len(devices)] if devices else None


def _ready(threads: int, device: str | None) -> None:
    global _DEVICE
    torch.set_num_threads(threads)
    _DEVICE = device


def _ready_worker(threads: int, shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study, which ends its workers
    _ready(threads, shared.get())


def _run(job: _Job) -> list[Row]:
    """Trains one run, or goes on with it, and returns its rows: a failure is a row as well."""
    try:
        rows = list(_train(job))
    except Exception as error:  # whatever it is, the other runs of the study go on
        clear = isinstance(error, (ValueError, OSError, ArithmeticError, RuntimeError))
        return _failed(job, (clear and str(error).strip()) or repr(error))
    write_json(job.run_dir / "result.json", rows)
    return [{**job.facts, **row} for row in rows]


def _failed(job: _Job, reason: str) -> list[Row]:
    return [{**job.facts, "status": f"failed: {reason.splitlines()[0]}"}]


def _train(job: _Job) -> Iterator[Row]:
    """One row per test size of a run that is trained to its end."""
    recipe = job.recipe
    data = open_folders(job.data_dir, recipe, job.seed)
    held_out = hold_out(data, recipe, HOLD_OUT_EVERY)
    torch.manual_seed(job.seed)
    model = job.make_model(job.variant.backbone, len(data.classes), **job.options)
    trainer = loop.fit(
        model,
        held_out,
        recipe,
        job.run_dir,
        config={
            "study": job.study.name,
            "value": job.variant.value,
            "backbone": job.variant.backbone,
            "options": job.options,
            "command": command_line(),
            "data_dir": str(job.data_dir),
        },
        seed=job.seed,
        device=pick_device(_DEVICE),
        quiet=True,
        catch_signals=False,  # the study ends its processes, and runs go on from whole epochs
    )
    config = json.loads((job.run_dir / "config.json").read_text())
    for crop_px in job.sizes_px:
        images = held_out.val
        if not job.study.tuning:
            images = open_val(job.data_dir, data.classes, recipe.tested_at(crop_px))
        yield _row(trainer, images, crop_px, config)


def _row(trainer: loop.Trainer, images: ImageFiles, crop_px: int, config: Row) -> Row:
    """What a trained run is worth at one test size, what it costs, and how it was made."""
    recipe, speed = trainer.recipe, pd.DataFrame(trainer.speed)
    loader = make_loader(images, EvalBatches(len(images), 64), 0, trainer.device.type == "cuda")
    result = evaluate(
        {"raw": trainer.model, "ema": trainer.ema.module},
        readable(loader, False, {}),
        trainer.eval_preprocess,
        trainer.dtype,
    )
    return {
        "status": "done",
        "epochs": recipe.epochs,
        "train_crop_px": recipe.train_crop_px,
        "test_crop_px": crop_px,
        "top1_raw_pct": round(result["raw"]["top1_pct"], 3),
        "top1_ema_pct": round(result["ema"]["top1_pct"], 3),
        "final_loss": round(trainer.metrics[-1]["train_loss"], 4),
        "val_images": result["raw"]["images"],
        "parameters": count_parameters(trainer.model),
        "gmacs": round(count_macs(trainer.model, crop_px, crop_px) / 1e9, 4),
        "images_per_s": round(speed.train_images_per_s.median(), 1),
        "time_s": round(speed.train_time_s.sum() + speed.eval_time_s.sum()),
        "autocast": config["autocast"],
        **provenance(config),
    }


def _slug(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")


def _read_result(job: _Job, facts: Mapping[str, Any]) -> list[Row]:
    """The rows of a finished run; none of any other.

    Args:
        facts: further entries that the run's config.json must hold.

    Raises:
        RunError: the folder holds another run.
    """
    try:
        rows = json.loads((job.run_dir / "result.json").read_text())
        config = json.loads((job.run_dir / "config.json").read_text())
    except (OSError, ValueError):
        return []
    asked = {"backbone": job.variant.backbone, "options": job.options, "seed": job.seed, **facts}
    asked["recipe"] = asdict(job.recipe)
    validate_same_run(job.run_dir, {key: config.get(key) for key in asked}, asked)
    on_slice = rows[0]["val_images"] == config["val_images"]
    if [row["test_crop_px"] for row in rows] != job.sizes_px or on_slice != job.study.tuning:
        return []  # its checkpoint is tested anew
    return [{**job.facts, **row} for row in rows]


def _read_curve(job: _Job) -> list[Row]:
    """A row per epoch of a run; what it calls val is the slice cut from the training images."""
    table = pd.read_csv(job.run_dir / "metrics.csv").round(4).drop(columns=["step", "first_lr"])
    table.columns = table.columns.str.replace("val_", "held_out_")
    return [{**job.facts, **row} for row in table.to_dict("records")]
