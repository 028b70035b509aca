"""Studies: one factor varied over seeds, one folder per run, one row per run and test size.

A study is declared in `utils.studies.definitions`. `run_study` trains the missing runs and writes
two tidy CSV files, results and learning curves, which `utils.studies.statistics` evaluates.

No run reads the validation set while it trains: its curves are measured on a slice cut from the
training images, the same slice for every run. The validation images are read once, after the last
epoch; a study that tunes does not read them at all.
"""

import json
import multiprocessing
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from backbones import create_classifier
from utils.cli import progress_bar
from utils.data.folders import EvalBatches, hold_out, make_loader, open_folders
from utils.distributed import pick_device
from utils.measure import count_macs, count_parameters
from utils.recipe import Recipe
from utils.records import command_line, provenance, write_table
from utils.training.checkpoint import validate_same_run
from utils.training.evaluation import autocast_dtype, dtype_name
from utils.training.loop import Trainer, fit

HOLD_OUT_EVERY = 10  # every tenth training image of a class, in the order of names
INTEGERS = ("epochs", "train_crop_px", "test_crop_px", "val_images", "parameters", "threads")
TEXT = {"commit": str, "value": str}  # columns that pandas could take for numbers
Row = dict[str, Any]
RunKey = tuple[str, int]  # value of the factor, seed


@dataclass(frozen=True)
class Variant:
    """One value of a study's factor."""

    value: str
    backbone: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of the backbone
    recipe: Mapping[str, Any] = field(default_factory=dict)  # changes in the study's recipe
    test_sizes_px: tuple[int, ...] = ()  # sides of test crops beside the recipe's; a row each

    @property
    def network(self) -> str:
        """The backbone with its options, such as "cspdarknet53 split=slice"."""
        return " ".join([self.backbone, *(f"{k}={v}" for k, v in self.options.items())])


@dataclass(frozen=True)
class Study:
    """A factor, its variants and seeds, and the recipe that they share.

    Args:
        name: names the study's CSV and its folder of runs.
        weights: the weights whose accuracy is compared, EMA ("ema") or last ("raw").
        extra_evaluations: other evaluations of the baseline's runs, compared with the baseline:
            a name to the weights and the side of the test crop in pixels.
        tuning: evaluate on the held-out slice; the validation images are not read.
    """

    name: str
    factor: str  # what the variants differ in
    baseline: str  # the value that the others are compared with
    recipe: Recipe
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    weights: Literal["ema", "raw"] = "ema"
    extra_evaluations: Mapping[str, tuple[Literal["ema", "raw"], int]] = field(default_factory=dict)
    tuning: bool = False

    def __post_init__(self) -> None:
        values = [variant.value for variant in self.variants]
        if self.baseline not in values:
            raise ValueError(
                f"study {self.name}: baseline={self.baseline!r} is not one of {values}"
            )
        if len(set(map(_slug, values))) < len(values):
            raise ValueError(f"study {self.name}: two values share a folder of runs: {values}")

    def runs(self) -> list[tuple[Variant, int]]:
        """Every variant with every seed, seeds outermost: an unfinished study is balanced."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]

    @property
    def top1_column(self) -> str:
        """The column of results that the study compares."""
        return f"top1_{self.weights}_pct"

    def recipe_of(self, variant: Variant) -> Recipe:
        """The recipe of a variant's runs."""
        return replace(self.recipe, **variant.recipe)


def run_study(
    study: Study,
    data_dir: str | Path,
    runs_dir: str | Path,
    output: str | Path,
    *,
    processes: int = 1,
    devices: Sequence[str] = (),
) -> pd.DataFrame:
    """Trains the missing runs of a study; returns its table of results.

    A run whose rows are in `output` is finished, even if its folder is gone; a trained run without
    rows is only evaluated. An unfinished run resumes from its last complete epoch. A failed run is
    a row that says so, and is tried again the next time.

    Args:
        data_dir: folder with train/ and val/.
        runs_dir: gets a folder per run, `<study>/<value>-seed<seed>`.
        output: the CSV, one row per run and test size; `curves_path(output)` gets one row per run
            and epoch. Both are written after every run. Other runs of the study in it are kept.
        processes: runs that train at the same time; they share the CPU's threads evenly.
        devices: such as ("cuda:0", "cuda:1"), assigned to the processes in turn.

    Raises:
        ValueError: wrong arguments; the folder of a run holds another run; `output` is not a record
            of this study, or its runs have other settings or another autocast type.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    targets = [pick_device(name) for name in devices or (None,)]
    jobs = list(_jobs(study, data_dir, Path(runs_dir)))
    rows, path = read_record(output, study.name), curves_path(output)
    curves = _by_run(pd.read_csv(path, dtype=TEXT)) if path.exists() else {}
    order = dict.fromkeys([*(job.key for job in jobs), *rows])
    missing = _missing(study, jobs, rows, output, targets[0])
    each = _in_processes(missing, processes, targets)
    if processes == 1:
        each = ((job, *_run(job, targets[0])) for job in missing)
    options = {"unit": " runs", "desc": study.name, "smoothing": 0, "disable": not missing}
    with closing(each):
        for job, found, curve in progress_bar(each, total=len(missing), **options):
            rows[job.key], curves[job.key] = found, curve
            write_table(output, [row for key in order for row in rows.get(key, [])])
            if any(curves.values()):
                write_table(path, [row for key in order for row in curves.get(key, [])])
    return pd.DataFrame([row for key in order for row in rows.get(key, [])])


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that did not fail, with the integers that failed rows turn to floats."""
    done = table[table.status == "done"]
    return done.astype(dict.fromkeys(done.columns.intersection(INTEGERS), int))


def curves_path(output: str | Path) -> Path:
    """The path of the learning curves that belong to the results in `output`."""
    output = Path(output)
    return output.with_name(f"{output.stem}_curves{output.suffix}")


def read_record(output: str | Path, study: str) -> dict[RunKey, list[Row]]:
    """The rows of every finished run in a study's CSV; none if there is no such file.

    Raises:
        ValueError: the file is not a record of this study.
    """
    try:
        table = pd.read_csv(output, dtype=TEXT)
    except FileNotFoundError:
        return {}
    except ValueError:  # pandas' parser errors, and bytes that are not text
        table = pd.DataFrame()
    if not {"study", "status", "value", "seed"} <= set(table) or set(table.study) != {study}:
        raise ValueError(f"{output}: not a record of the study {study}; choose another output")
    return _by_run(finished(table))


def validate_recorded(output: str | Path, row: Row, expected: Row) -> None:
    """Raises ValueError if a recorded run has other settings, as far as it names them."""
    for name, value in expected.items():
        if row.get(name, value) != value:
            raise ValueError(
                f"{output}: {row['value']!r} with seed {row['seed']} was recorded with "
                f"{name}={row[name]!r}, not {value!r}; choose another output"
            )


def _by_run(table: pd.DataFrame) -> dict[RunKey, list[Row]]:
    runs = table.groupby(["value", "seed"], sort=False)
    return {key: rows.to_dict("records") for key, rows in runs}


def _slug(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")


@dataclass(frozen=True)
class _Job:
    """One run of a study, with everything that a process needs to train it."""

    key: RunKey
    seed: int
    recipe: Recipe
    sizes_px: list[int]  # sides of the test crop, the recipe's first: a row each
    tuning: bool
    data_dir: str | Path
    run_dir: Path
    facts: Row  # the columns that identify it among the runs of all studies
    config: Row  # what identifies it in its folder, beside the recipe and the seed


def _jobs(study: Study, data_dir: str | Path, runs_dir: Path) -> Iterator[_Job]:
    for variant, seed in study.runs():
        recipe, value = study.recipe_of(variant), variant.value
        options = {**variant.options, **recipe.backbone_options}
        names = {"study": study.name, "factor": study.factor, "value": value}
        yield _Job(
            (value, seed),
            seed,
            recipe,
            [recipe.eval_crop_px, *variant.test_sizes_px],
            study.tuning,
            data_dir,
            runs_dir / study.name / f"{_slug(value)}-seed{seed}",
            {**names, "seed": seed, "network": variant.network},
            {"study": study.name, "value": value, "backbone": variant.backbone, "options": options},
        )


def _missing(
    study: Study,
    jobs: list[_Job],
    rows: dict[RunKey, list[Row]],
    output: str | Path,
    device: torch.device,
) -> list[_Job]:
    """The jobs without a recorded row for each of their test sizes.

    Raises:
        ValueError: the folder of a run holds another run, or recorded rows have other settings.
    """
    data = open_folders(jobs[0].data_dir, study.recipe)
    held_out = hold_out(data, study.recipe, HOLD_OUT_EVERY)
    val_images = len((held_out if study.tuning else data).val)
    tested = {key: [row["test_crop_px"] for row in found] for key, found in rows.items()}
    missing = [job for job in jobs if tested.get(job.key) != job.sizes_px]
    for job in jobs:
        config = {**job.config, "recipe": asdict(job.recipe), "seed": job.seed}
        config |= {"classes": data.classes, "train_images": len(held_out.train)}
        path = job.run_dir / "config.json"
        there = json.loads(path.read_text()) if path.exists() else config
        validate_same_run(job.run_dir, {key: there.get(key) for key in config}, config)
        settings = {"network": job.facts["network"], "val_images": val_images}
        settings |= {name: getattr(job.recipe, name) for name in ("epochs", "train_crop_px")}
        if missing:  # one study has one type
            settings["autocast"] = dtype_name(autocast_dtype(device, job.recipe.precision))
        for row in rows.get(job.key, []):
            validate_recorded(output, row, settings)
    return missing


def _in_processes(
    jobs: list[_Job], processes: int, devices: Sequence[torch.device]
) -> Iterator[tuple[_Job, list[Row], list[Row]]]:
    """Runs each job in a process of its own; yields it with its rows and curve when it ends.

    A job whose process is killed, such as by the system when memory runs out, has failed. When the
    generator is closed it ends the processes; their runs resume from the last complete epoch.
    """
    # Neither CUDA nor OpenMP survives a fork of this process; a fork server has started neither.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    # Nothing of ours: the server does not know this sys.path, and could find another `utils`.
    context.set_forkserver_preload(["torch", "torchvision", "pandas"])
    threads = max(1, torch.get_num_threads() // processes)
    waiting, running = iter(jobs), {}

    def start_next(device: torch.device) -> None:
        if job := next(waiting, None):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (job, device, threads, sender)
            process = context.Process(target=_run_and_send, args=arguments, daemon=True)
            process.start()
            sender.close()  # now the pipe ends when the process does
            running[receiver] = job, device, process

    try:
        for k in range(processes):
            start_next(devices[k % len(devices)])
        while running:
            receiver = wait(list(running))[0]
            job, device, process = running.pop(receiver)
            try:
                rows, curve = receiver.recv()
            except EOFError:
                process.join()
                reason = f"its process was killed (exit code {process.exitcode})"
                rows, curve = _failed(job, f"{reason}, perhaps because memory ran out"), []
            start_next(device)
            yield job, rows, curve
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.join()


def _run_and_send(job: _Job, device: torch.device, threads: int, sender: Connection) -> None:
    """The work of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the study ends its processes
    torch.set_num_threads(threads)
    sender.send(_run(job, device))


def _run(job: _Job, device: torch.device) -> tuple[list[Row], list[Row]]:
    """Trains or resumes one run; returns its rows and its curve. A failure is a row as well."""
    try:
        trainer = _train(job, device)
        rows = [_evaluate(job, trainer, crop_px) for crop_px in job.sizes_px]
    except Exception as error:  # the other runs of the study continue
        expected = isinstance(error, (ValueError, OSError, ArithmeticError, RuntimeError))
        return _failed(job, str(error) if expected and str(error) else repr(error)), []
    curve = pd.DataFrame(trainer.metrics).round(4).drop(columns=["step", "first_lr"])
    curve.columns = curve.columns.str.replace("val_", "held_out_")
    return rows, [{**job.facts, **row} for row in curve.to_dict("records")]


def _failed(job: _Job, reason: str) -> list[Row]:
    return [{**job.facts, "status": f"failed: {reason.strip().splitlines()[0]}"}]


def _train(job: _Job, device: torch.device) -> Trainer:
    """Trains a run to its end, on all training images but the held-out slice."""
    data = hold_out(open_folders(job.data_dir, job.recipe, job.seed), job.recipe, HOLD_OUT_EVERY)
    torch.manual_seed(job.seed)
    return fit(
        create_classifier(job.config["backbone"], len(data.classes), **job.config["options"]),
        data,
        job.recipe,
        job.run_dir,
        config={**job.config, "command": command_line(), "data_dir": str(job.data_dir)},
        seed=job.seed,
        device=device,
        quiet=True,
        catch_signals=False,  # the study ends its processes, and runs resume from complete epochs
    )


def _evaluate(job: _Job, trainer: Trainer, crop_px: int) -> Row:
    """Accuracy of a trained run at one test size, its costs, and how it was made."""
    data = open_folders(job.data_dir, job.recipe.tested_at(crop_px))
    images = (hold_out(data, job.recipe, HOLD_OUT_EVERY) if job.tuning else data).val
    loader = make_loader(images, EvalBatches(len(images), 64), 0, trainer.device.type == "cuda")
    result, speed = trainer.evaluate(loader), pd.DataFrame(trainer.speed)
    config = json.loads((job.run_dir / "config.json").read_text())
    return {
        **job.facts,
        "status": "done",
        "epochs": job.recipe.epochs,
        "train_crop_px": job.recipe.train_crop_px,
        "test_crop_px": crop_px,
        "top1_raw_pct": round(result[""]["top1_pct"], 3),
        "top1_ema_pct": round(result["ema_"]["top1_pct"], 3),
        "final_loss": round(trainer.metrics[-1]["train_loss"], 4),
        "val_images": result[""]["images"],
        "parameters": count_parameters(trainer.model),
        "gmacs": round(count_macs(trainer.model, crop_px, crop_px) / 1e9, 4),
        "images_per_s": round(speed.train_images_per_s.median(), 1),
        "time_s": round(speed.train_time_s.sum() + speed.eval_time_s.sum()),
        "autocast": config["autocast"],
        **provenance(config),
    }
