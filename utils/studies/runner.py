"""Studies: one factor varied over seeds, one folder per run, one row per run and test size.

A study is declared in `utils.studies.definitions`. `run_study` trains the missing runs and writes
two tidy CSV files, results and learning curves, which `utils.studies.statistics` evaluates.

A run trains on all training images and reads the validation images once, after its last epoch. The
runs of a study that tunes do not read them at all: they train without a slice of the training
images, the same for every run, and are evaluated on it about ten times.
"""

import itertools
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from backbones import create_classifier
from utils.cli import progress_bar
from utils.data.folders import ImageFiles, Splits, hold_out, open_folders, split_share
from utils.distributed import pick_device
from utils.measure import count_macs, count_parameters
from utils.recipe import Recipe
from utils.records import command_line, provenance, write_table
from utils.training.evaluation import autocast_dtype, dtype_name
from utils.training.loop import Trainer, fit

HELD_OUT_SHARE = 0.1  # by default every tenth training image of a class, in the order of names
INTEGERS = ("epochs", "train_crop_px", "test_crop_px", "val_images", "parameters", "threads")
TEXT = {"commit": str, "value": str}  # columns that pandas could take for numbers
Row = dict[str, Any]
RunKey = tuple[str, int]  # value of the factor, seed
Job = tuple["Study", "Variant", int, str | Path, str | Path, str | Path | None]  # of `_run`
Result = tuple[RunKey, list[Row], list[Row]]  # a run, its rows and its learning curve


@dataclass(frozen=True)
class Variant:
    """One value of a study's factor."""

    value: str
    backbone: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of the backbone
    recipe: Mapping[str, Any] = field(default_factory=dict)  # changes in the study's recipe
    test_sizes_px: tuple[int, ...] = ()  # sides of test crops beside the recipe's; a row each
    pretrained: bool = False  # whether it starts from the weights that `run_study` is given
    train_share: float = 1.0  # of the training images of each class, spread over their names

    @property
    def slug(self) -> str:
        """The value as the name of a folder."""
        return re.sub(r"[^a-z0-9]+", "-", self.value.lower()).strip("-")

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
        tuning: evaluate on a slice held out of the training images, about ten times a run; the
            validation images are not read.
        held_out_share: the size of that slice.
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
    held_out_share: float = HELD_OUT_SHARE

    def __post_init__(self) -> None:
        values = [variant.value for variant in self.variants]
        if self.baseline not in values:
            raise ValueError(
                f"study {self.name}: baseline={self.baseline!r} is not one of {values}"
            )
        if len({variant.slug for variant in self.variants}) < len(values):
            raise ValueError(f"study {self.name}: two variants share a name or folder: {values}")

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

    def sizes_px(self, variant: Variant) -> list[int]:
        """Sides of a variant's test crops, the recipe's first: a row of results each."""
        return [self.recipe_of(variant).eval_crop_px, *variant.test_sizes_px]

    def facts(self, variant: Variant, seed: int) -> Row:
        """The columns that identify a run among those of all studies."""
        names = {"study": self.name, "factor": self.factor, "value": variant.value}
        return {**names, "seed": seed, "network": variant.network}


def run_study(
    study: Study,
    data_dir: str | Path,
    runs_dir: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
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
        weights: of the backbone, a file or a published name, for variants with `pretrained`.
        processes: runs that train at the same time; they share the CPU's threads evenly.
        devices: such as ("cuda:0", "cuda:1"), assigned to the processes in turn.

    Raises:
        ValueError: wrong arguments; `output` is not a record of this study, or its runs have other
            settings or another autocast type.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    if weights is None and any(variant.pretrained for variant in study.variants):
        raise ValueError(f"the study {study.name} needs --weights, a file or a published name")
    targets = [pick_device(name) for name in devices or (None,)]
    val_images = len(_open(study, study.variants[0], study.recipe, data_dir).val)
    dtype = dtype_name(autocast_dtype(targets[0], study.recipe.precision))
    jobs, expected = {}, {}
    for variant, seed in study.runs():
        key, recipe = (variant.value, seed), study.recipe_of(variant)
        jobs[key] = study, variant, seed, data_dir, runs_dir, weights
        known = {"network": variant.network, "val_images": val_images, "autocast": dtype}
        fields = ("epochs", "train_crop_px", "lr_per_1024")
        known |= {name: getattr(recipe, name) for name in fields}
        expected[key] = [{**known, "test_crop_px": px} for px in study.sizes_px(variant)]

    def run_all(keys: list[RunKey]) -> Generator[Result, None, None]:
        if processes > 1:
            return _in_processes([jobs[key] for key in keys], processes, targets)
        return (_run(*jobs[key], targets[0]) for key in keys)

    return record_runs(output, study.name, expected, run_all)


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of runs that did not fail, with the integers that failed rows turn to floats."""
    done = table[table.status == "done"]
    return done.astype(dict.fromkeys(done.columns.intersection(INTEGERS), int))


def curves_path(output: str | Path) -> Path:
    """The path of the learning curves that belong to the results in `output`."""
    output = Path(output)
    return output.with_name(f"{output.stem}_curves{output.suffix}")


def record_runs(
    output: str | Path,
    study: str,
    expected: Mapping[RunKey, list[Row]],
    run_all: Callable[[list[RunKey]], Generator[Result, None, None]],
) -> pd.DataFrame:
    """Runs what a study's CSV lacks; writes it, and its learning curves, after every run.

    Args:
        output: the CSV. Other runs of the study in it are kept.
        expected: the columns of each run's rows that are known before it, in the order of the CSV.
        run_all: yields the result of each of these runs; it is closed at the end.

    Returns:
        The complete table.

    Raises:
        ValueError: `output` is not a record of this study, or its runs have other settings.
    """
    rows = {key: [] for key in expected} | _read_runs(output, study)
    missing = []
    for key, known in expected.items():
        tested, wanted = ([row.get("test_crop_px") for row in x] for x in (rows[key], known))
        if tested != wanted:
            missing.append(key)
    varies = {"test_crop_px"} if missing else {"test_crop_px", "autocast"}
    for key, (known, *_) in expected.items():  # runs that are added must have the same autocast
        for row in rows[key]:
            _validate(output, row, {k: v for k, v in known.items() if k not in varies})
    path, curves = curves_path(output), {key: [] for key in rows}
    if path.exists():
        curves |= _by_run(pd.read_csv(path, dtype=TEXT))
    options = {"unit": " runs", "smoothing": 0, "disable": not missing}
    with closing(run_all(missing)) as results:
        for key, found, curve in progress_bar(results, total=len(missing), **options):
            rows[key], curves[key] = found, curve
            write_table(output, [*itertools.chain(*rows.values())])
            if curve:
                write_table(path, [*itertools.chain(*curves.values())])
    return pd.DataFrame(itertools.chain(*rows.values()))


def _read_runs(output: str | Path, study: str) -> dict[RunKey, list[Row]]:
    """The rows of the finished runs in a study's CSV."""
    try:
        table = pd.read_csv(output, dtype=TEXT)
    except FileNotFoundError:
        return {}
    except ValueError:  # pandas' parser errors, and bytes that are not text
        table = pd.DataFrame()
    if not {"study", "status", "value", "seed"} <= set(table) or set(table.study) != {study}:
        raise ValueError(f"{output}: not a record of the study {study}; choose another output")
    return _by_run(finished(table))


def _validate(output: str | Path, row: Row, known: Row) -> None:
    """Raises ValueError if a recorded run has other settings, as far as it names them."""
    for name, value in known.items():
        found = row.get(name)
        if pd.notna(found) and found != value:
            raise ValueError(
                f"{output}: {row['value']!r} with seed {row['seed']} was recorded with "
                f"{name}={found!r}, not {value!r}; choose another output"
            )


def _by_run(table: pd.DataFrame) -> dict[RunKey, list[Row]]:
    runs = table.groupby(["value", "seed"], sort=False)
    return {key: rows.to_dict("records") for key, rows in runs}


def _in_processes(
    jobs: list[Job], processes: int, devices: Sequence[torch.device]
) -> Generator[Result, None, None]:
    """Runs each job in a process of its own; yields its result when it ends.

    A job whose process is killed, such as by the system when memory runs out, has failed. When the
    generator is closed it ends the processes; their runs resume from the last complete epoch.
    """
    # Neither CUDA nor OpenMP survives a fork of this process; a fork server has started neither.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    # Nothing of ours: the server does not know this sys.path, and could find another `utils`.
    context.set_forkserver_preload(["torch", "torchvision", "pandas"])
    threads = max(1, torch.get_num_threads() // processes)
    waiting, running = list(jobs), {}
    free = [devices[k % len(devices)] for k in range(processes)]
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                arguments = (job, device, threads, sender)
                process = context.Process(target=_run_and_send, args=arguments, daemon=True)
                process.start()
                sender.close()  # now the pipe ends when the process does
                running[receiver] = job, device, process
            receiver = wait(list(running))[0]
            job, device, process = running.pop(receiver)
            free.append(device)
            try:
                result = receiver.recv()
            except EOFError:
                result = None
            process.join()  # whose memory the next one needs
            if result is None:
                reason = f"its process was killed (exit code {process.exitcode})"
                result = _failed(*job[:3], f"{reason}, perhaps because memory ran out")
            yield result
    finally:
        for _, _, process in running.values():
            process.terminate()
            process.join()


def _run_and_send(job: Job, device: torch.device, threads: int, sender: Connection) -> None:
    """The work of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the study ends its processes
    torch.set_num_threads(threads)
    sender.send(_run(*job, device))


def _run(
    study: Study,
    variant: Variant,
    seed: int,
    data_dir: str | Path,
    runs_dir: str | Path,
    weights: str | Path | None,
    device: torch.device,
) -> Result:
    """Trains or resumes one run and evaluates it. A failure is a row as well."""
    recipe, facts = study.recipe_of(variant), study.facts(variant, seed)
    run_dir = Path(runs_dir) / study.name / f"{variant.slug}-seed{seed}"
    config = {
        "study": study.name,
        "value": variant.value,
        "backbone": variant.backbone,
        "options": {**variant.options, **recipe.backbone_options},
        "weights": str(weights) if variant.pretrained else None,
        "command": command_line(),
        "data_dir": str(data_dir),
    }
    try:
        data = _open(study, variant, recipe, data_dir, seed)
        every = max(1, recipe.epochs // 10) if study.tuning else 0
        trainer = train_classifier(data, recipe, run_dir, config, seed, device, every)
        rows = []
        for crop_px in study.sizes_px(variant):
            tested = recipe.tested_at(crop_px)
            images = _open(study, variant, tested, data_dir).val
            rows.append({**facts, "status": "done", **_evaluate(trainer, run_dir, images, tested)})
    except Exception as error:  # the other runs of the study continue
        expected = isinstance(error, (ValueError, OSError, ArithmeticError, RuntimeError))
        reason = str(error) if expected and str(error) else repr(error)
        return _failed(study, variant, seed, reason)
    curve = pd.DataFrame(trainer.metrics).round(4).drop(columns=["step", "first_lr"])
    curve["time_s"] = pd.DataFrame(trainer.speed).train_time_s.cumsum().round(1)  # no evaluation
    if not study.tuning:  # evaluated after the last epoch alone
        curve = curve[["epoch", "train_loss", "time_s"]]
    curve.columns = curve.columns.str.replace("val_", "held_out_")
    return (variant.value, seed), rows, [{**facts, **row} for row in curve.to_dict("records")]


def _open(
    study: Study, variant: Variant, recipe: Recipe, data_dir: str | Path, seed: int = 0
) -> Splits:
    """The images that a variant's runs train on and are evaluated on."""
    data = open_folders(data_dir, recipe, seed)
    if study.tuning:
        data = hold_out(data, recipe, study.held_out_share)
    if variant.train_share == 1:
        return data
    return replace(data, train=split_share(data.train, variant.train_share)[1])


def _failed(study: Study, variant: Variant, seed: int, reason: str) -> Result:
    status = f"failed: {reason.strip().splitlines()[0]}"
    return (variant.value, seed), [{**study.facts(variant, seed), "status": status}], []


def train_classifier(
    data: Splits,
    recipe: Recipe,
    run_dir: Path,
    config: Row,
    seed: int,
    device: torch.device | None = None,
    eval_every: int = 0,
) -> Trainer:
    """Trains a classifier of a study, or resumes it from its last complete epoch.

    Args:
        config: the config of the run folder; its `backbone`, `options` and `weights` make the
            network.
    """
    torch.manual_seed(seed)
    options = {"weights": config.get("weights"), **config["options"]}
    model = create_classifier(config["backbone"], len(data.classes), **options)
    if images := model.backbone.preprocessing:
        recipe = replace(recipe, mean=images.mean, std=images.std)
    options = {"config": config, "seed": seed, "device": device, "eval_every": eval_every}
    return fit(model, data, recipe, run_dir, **options, quiet=True, catch_signals=False)


def _evaluate(trainer: Trainer, run_dir: Path, images: ImageFiles, recipe: Recipe) -> Row:
    """Accuracy of a trained run at the recipe's test size, its costs, and how it was made."""
    last, speed = trainer.metrics[-1], pd.DataFrame(trainer.speed)
    raw_pct, ema_pct = last["val_top1_pct"], last["ema_val_top1_pct"]
    config, size_px = json.loads((run_dir / "config.json").read_text()), recipe.eval_crop_px
    if size_px != trainer.recipe.eval_crop_px:
        result = trainer.evaluate(images.eval_loader(64, 0, trainer.device.type == "cuda"))
        raw_pct, ema_pct = (result[prefix]["top1_pct"] for prefix in ("", "ema_"))
    return {
        "epochs": recipe.epochs,
        "train_crop_px": recipe.train_crop_px,
        "lr_per_1024": recipe.lr_per_1024,
        "test_crop_px": size_px,
        "top1_raw_pct": round(raw_pct, 3),
        "top1_ema_pct": round(ema_pct, 3),
        "final_loss": round(trainer.metrics[-1]["train_loss"], 4),
        "val_images": len(images),
        "parameters": count_parameters(trainer.model),
        "gmacs": round(count_macs(trainer.model, size_px, size_px) / 1e9, 4),
        "images_per_s": round(speed.train_images_per_s.median(), 1),
        "time_s": round(speed.train_time_s.sum() + speed.eval_time_s.sum()),
        "autocast": config["autocast"],
        **provenance(config),
    }
