"""Studies: one factor varied over seeds, each run in a folder of its own, one row per run.

A study is declared in a table (`utils.studies`). `run_study` trains what is missing and writes two
tidy CSV files, results and curves; `summarise` and `compare` say what came out, with an interval
around every difference.

No run looks at the validation set while it trains: its curves are those of a slice cut from the
training images, the same slice for every run. The validation images are read once, at its end.
"""

import json
import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from scipy import stats
from torch import nn

from utils import runs, training
from utils.data import EvalBatches, hold_out, make_loader, open_folders, open_val, readable
from utils.distributed import pick_device
from utils.evaluation import evaluate
from utils.measure import count_macs, count_parameters
from utils.progress import progress_bar
from utils.recipe import Recipe

# From (name of a backbone, number of classes, **options of the backbone) to a classifier.
MakeModel = Callable[..., nn.Module]

HELD_OUT = 10  # every tenth training image of a class, in the order of names, draws the curves


@dataclass(frozen=True)
class Arm:
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
        factor: what the arms differ in.
        baseline: the value that others are compared with.
        recipe: of every run, but for what an arm changes.
        weights: whose accuracy is compared, the averaged ones ("ema") or the last ("raw").
    """

    name: str
    factor: str
    baseline: str
    recipe: Recipe
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    weights: Literal["ema", "raw"] = "ema"

    def __post_init__(self) -> None:
        values = [arm.value for arm in self.arms]
        if len(set(values)) < len(values):
            raise ValueError(f"study {self.name}: a value stands there twice: {values}")
        if self.baseline not in values:
            raise ValueError(f"study {self.name}: baseline={self.baseline!r} is none of {values}")
        for arm in self.arms:  # a wrong recipe shows before anything is trained
            replace(self.recipe, **arm.recipe)

    def runs(self) -> list[tuple[Arm, int]]:
        """Every value with every seed, seeds outermost: a study cut short is still balanced."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def recipe_of(self, arm: Arm) -> Recipe:
        """What an arm's runs are trained with."""
        return replace(self.recipe, **arm.recipe)


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
    the study is run again.

    Args:
        make_model: makes an arm's classifier; with several processes a function of a module.
        data_dir: folder with train/ and val/.
        runs_dir: gets a folder per run, `<study>/<value>-seed<seed>`.
        output: the CSV, one row per run and test size; `curves_path(output)` gets a row per run
            and epoch.
        processes: runs at a time; they share the CPU's threads evenly.
        devices: such as ("cuda:0", "cuda:1"), taken in turn by the processes.

    Returns:
        The table of results.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    threads = max(1, torch.get_num_threads() // processes)
    jobs, rows, curves = [], {}, {}
    for k, (arm, seed) in enumerate(study.runs()):
        run_dir = Path(runs_dir) / study.name / f"{_slug(arm.value)}-seed{seed}"
        device = devices[k % len(devices)] if devices else None
        job = _Job(study, arm, seed, make_model, data_dir, run_dir, threads, device)
        rows[job.key], curves[job.key] = _read_result(job), _read_curve(job)
        if not rows[job.key]:
            jobs.append(job)

    def write() -> list[dict[str, Any]]:
        """Both tables, in the order of the study's runs."""
        table = [row for found in rows.values() for row in found]
        runs.write_table(output, table)
        lines = [row for key, found in curves.items() if rows[key] for row in found]
        if lines:  # none where every run failed
            runs.write_table(curves_path(output), lines)
        return table

    done = len(rows) - len(jobs)
    with progress_bar(total=len(rows), initial=done, unit=" runs", desc=study.name) as bar:
        for job, finished in _each(jobs, processes):
            rows[job.key], curves[job.key] = finished, _read_curve(job)
            write()
            bar.update()
    return pd.DataFrame(write())


def curves_path(output: str | Path) -> Path:
    """Where the learning curves of the study stand whose results are in `output`."""
    output = Path(output)
    return output.with_name(f"{output.stem}_curves{output.suffix}")


@dataclass(frozen=True)
class _Job:
    """One run of a study, with all that a process needs to train it."""

    study: Study
    arm: Arm
    seed: int
    make_model: MakeModel
    data_dir: str | Path
    run_dir: Path
    threads: int
    device: str | None

    @property
    def key(self) -> tuple[str, int]:
        return self.arm.value, self.seed

    @property
    def facts(self) -> dict[str, Any]:
        """The columns that tell the runs of all studies apart."""
        return {
            "study": self.study.name,
            "factor": self.study.factor,
            "value": self.arm.value,
            "seed": self.seed,
            "network": self.arm.network,
        }


def _each(jobs: list[_Job], processes: int) -> Iterator[tuple[_Job, list[dict[str, Any]]]]:
    """Each job with its rows as it ends; in this process if there is to be one alone."""
    if processes == 1:
        yield from ((job, _run(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked CUDA or OpenMP does not live
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(_run, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run(job: _Job) -> list[dict[str, Any]]:
    """Trains one run, or goes on with it, and returns its rows: a failure is a row as well."""
    torch.set_num_threads(job.threads)
    try:
        rows = list(_train(job))
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [{**job.facts, "status": f"failed: {reason}"}]
    runs.write_json(job.run_dir / "result.json", rows)
    return _read_result(job)


def _train(job: _Job) -> Iterator[dict[str, Any]]:
    """One row per test size of a run that is trained to its end."""
    arm, recipe = job.arm, job.study.recipe_of(job.arm)
    data = open_folders(job.data_dir, recipe, job.seed)
    torch.manual_seed(job.seed)
    options = {**arm.options, **recipe.backbone_options}
    model = job.make_model(arm.backbone, len(data.classes), **options)
    trainer = training.fit(
        model,
        hold_out(data, recipe, HELD_OUT),
        recipe,
        job.run_dir,
        config={
            "study": job.study.name,
            "value": arm.value,
            "backbone": arm.backbone,
            "options": options,
            "command": runs.command_line(),
            "data_dir": str(job.data_dir),
        },
        seed=job.seed,
        device=pick_device(job.device),
        quiet=True,
    )
    config = json.loads((job.run_dir / "config.json").read_text())
    speed = pd.DataFrame(trainer.speed)
    for crop_px in (recipe.eval_crop_px, *arm.test_sizes_px):
        val = open_val(job.data_dir, data.classes, recipe, crop_px)
        loader = make_loader(val, EvalBatches(len(val), 64), 0, trainer.device.type == "cuda")
        result = evaluate(
            {"raw": trainer.model, "ema": trainer.ema.module},
            readable(loader, False, {}),
            trainer.eval_preprocess,
            trainer.dtype,
        )
        yield {
            "status": "done",
            "epochs": recipe.epochs,
            "train_crop_px": recipe.train_crop_px,
            "test_crop_px": crop_px,
            "top1_raw_pct": round(result["raw"]["top1_pct"], 3),
            "top1_ema_pct": round(result["ema"]["top1_pct"], 3),
            "final_loss": round(trainer.metrics[-1]["train_loss"], 4),
            "val_images": result["raw"]["images"],
            "parameters": count_parameters(model),
            "gmacs": round(count_macs(model, crop_px, crop_px) / 1e9, 4),
            "images_per_s": round(speed.train_images_per_s.median(), 1),
            "time_s": round(speed.train_time_s.sum() + speed.eval_time_s.sum()),
            "autocast": config["autocast"],
            "threads": config["hardware"]["threads"],
            "hardware": config["hardware"]["gpu"] or config["hardware"]["cpu"],
            "torch": config["versions"]["torch"],
            "commit": config["commit"],
            "command": config["command"],
        }


def _slug(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")


def _read_result(job: _Job) -> list[dict[str, Any]]:
    """The rows of a finished run; none of any other."""
    try:
        rows = json.loads((job.run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return []
    return [{**job.facts, **row} for row in rows]


def _read_curve(job: _Job) -> list[dict[str, Any]]:
    """A row per epoch of a run; what it calls val is the slice cut from the training images."""
    try:
        table = pd.read_csv(job.run_dir / "metrics.csv").round(4)
    except (OSError, ValueError):
        return []
    table = table.drop(columns=["step", "first_lr"])
    table.columns = table.columns.str.replace("val_", "held_out_")
    return [{**job.facts, **row} for row in table.to_dict("records")]


# ---- what came out -------------------------------------------------------------------------------


def summarise(table: pd.DataFrame, column: str = "top1_ema_pct") -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of each value, with its costs.

    Args:
        table: of one study and one test size; runs that failed are left out.

    Returns:
        Indexed by value, in the order of the table: `mean`, `std`, `n`, `parameters`, `gmacs`, and
        the medians of `images_per_s` and `time_s`.
    """
    groups = table[table.status == "done"].groupby("value", sort=False)
    summary = groups[column].agg(["mean", "std", "count"]).rename(columns={"count": "n"})
    costs = groups[["parameters", "gmacs"]].first()
    return summary.join(costs).join(groups[["images_per_s", "time_s"]].median())


def compare(
    table: pd.DataFrame, baseline: str, column: str = "top1_ema_pct", confidence: float = 0.95
) -> pd.DataFrame:
    """Differences to the baseline, paired over seeds, with Student's t interval.

    Args:
        table: as in `summarise`.
        baseline: the value that others are compared with.

    Returns:
        Indexed by value: `difference`, `low` and `high` (of the interval), `n` (pairs), `verdict`:
        "higher", "lower", "no difference seen" where the interval holds zero, or "too few seeds".
    """
    done = table[table.status == "done"]
    by_seed = done.pivot(index="seed", columns="value", values=column)
    rows = {}
    for value in done.value.unique():
        if value == baseline:
            continue
        pairs = by_seed[[baseline, value]].dropna()
        difference = pairs[value] - pairs[baseline]
        row = {"difference": difference.mean(), "low": float("nan"), "high": float("nan")}
        verdict = "too few seeds"
        if len(pairs) > 1:
            spread = stats.sem(difference)
            half = stats.t.ppf((1 + confidence) / 2, len(pairs) - 1) * spread
            row |= {"low": row["difference"] - half, "high": row["difference"] + half}
            verdict = "higher" if row["low"] > 0 else "lower" if row["high"] < 0 else None
        rows[value] = {**row, "n": len(pairs), "verdict": verdict or "no difference seen"}
    return pd.DataFrame.from_dict(rows, orient="index")
