"""Does a detector gain from a backbone that was trained to classify? Both variants, seed by seed.

Each run has a folder with a `result.json`, is trained once, and gives one row of a CSV like that of
`utils.studies.runner`, so that `utils.studies.statistics` compares its values.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from utils.cli import DataError, progress_bar
from utils.data import boxes
from utils.data.folders import open_folders
from utils.recipe import DetectorRecipe, Recipe
from utils.records import command_line, describe_machine, lock, provenance, write_json, write_table
from utils.studies import detection
from utils.studies.runner import keep_record
from utils.training import loop
from utils.training.checkpoint import validate_same_run

SCRATCH, PRETRAINED = "from scratch", "pretrained"


@dataclass(frozen=True)
class DetectionStudy:
    """What both variants share.

    Args:
        make_classifier: of (backbone, number of classes, **options), as `create_classifier`.
        make_detector: of (backbone, number of classes, recipe, **options), whose option `weights`
            is None or a checkpoint that `backbones.create` takes.
        data_dir: folder with boxes, see `utils.data.boxes.open_boxes`.
        sample_dir: folder with classes, on which each seed's classifier is trained.
        classifier_recipe: with which it is; also gives the backbone's options.
        checkpoint: of a trained classifier, in place of one for each seed.
    """

    backbone: str
    options: dict[str, Any]
    make_classifier: Callable[..., nn.Module]
    make_detector: Callable[..., nn.Module]
    recipe: DetectorRecipe
    data_dir: Path
    sample_dir: Path | None
    classifier_recipe: Recipe
    checkpoint: Path | None = None


def run_detection_study(
    study: DetectionStudy, seeds: int, runs_dir: str | Path, output: str | Path
) -> pd.DataFrame:
    """Trains what is missing of seeds 0, 1, ... and writes the table after every run.

    Interrupted, it goes on with the run under way from its beginning, and with a classifier from
    its last whole epoch.

    Returns:
        The table: a row per seed and variant, in percent, seconds and counts.

    Raises:
        DataError: the data, a checkpoint or a finished run is not as it should be, or the folder of
            a run holds another one.
        ValueError: `output` is no such record, or holds runs that would be lost.
        DivergedError: a loss is not finite.
    """
    runs_dir = Path(runs_dir)
    data = boxes.open_boxes(study.data_dir)
    jobs = [(variant, seed) for seed in range(seeds) for variant in (SCRATCH, PRETRAINED)]
    asked = {job: _config(study, data, *job) for job in jobs}
    runs_dir.mkdir(parents=True, exist_ok=True)
    with lock(runs_dir, wait=False):
        rows = {job: _read_result(_folder(runs_dir, *job), asked[job]) for job in jobs}
        keep_record(output, set(jobs) if any(rows.values()) else set())
        done = sum(map(bool, rows.values()))
        with progress_bar(total=len(jobs), initial=done, unit=" runs", smoothing=0) as bar:
            for job in [job for job in jobs if not rows[job]]:
                folder = _folder(runs_dir, *job)
                rows[job] = _run(study, *job, runs_dir)
                folder.mkdir(exist_ok=True)
                result = {"config": asked[job], "row": rows[job]}
                write_json(folder / "result.json", result)
                write_table(output, [row for row in rows.values() if row])
                bar.update()
    write_table(output, list(rows.values()))
    return pd.DataFrame(rows.values())


def _folder(runs_dir: Path, variant: str, seed: int) -> Path:
    return runs_dir / f"{variant.replace(' ', '-')}-seed{seed}"


def _config(
    study: DetectionStudy, data: boxes.BoxedSplits, variant: str, seed: int
) -> dict[str, Any]:
    """What makes one run another; equal to itself after a visit to JSON."""
    config = {
        "recipe": asdict(study.recipe),
        "value": variant,
        "seed": seed,
        "backbone": study.backbone,
        "options": study.options,
        "classes": data.classes,
        "images": [len(data.train), len(data.val)],
    }
    if variant == PRETRAINED:
        own = None if study.checkpoint is None else str(study.checkpoint)
        config |= {"checkpoint": own, "classifier": asdict(study.classifier_recipe)}
    return json.loads(json.dumps(config))


def _read_result(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a finished run, None where there is none."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_bytes())
        config, row = result["config"], result["row"]
        good = isinstance(config, dict) and isinstance(row, dict) and row["status"] == "done"
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise DataError(f"{path}: damaged; remove it, and its run is made again")
    validate_same_run(folder, config, asked)
    return row


def _run(study: DetectionStudy, variant: str, seed: int, runs_dir: Path) -> dict[str, Any]:
    """Trains one detector, and first its classifier; returns its row."""
    data = boxes.open_boxes(study.data_dir, seed)
    weights = None
    if variant == PRETRAINED:
        weights = study.checkpoint or _train_classifier(study, seed, runs_dir)
    torch.manual_seed(seed)
    model = study.make_detector(
        study.backbone, len(data.classes), study.recipe, weights=weights, **study.options
    )
    start_s = time.perf_counter()
    losses = detection.train_detector(model, data.train, study.recipe, seed=seed, quiet=True)
    found = detection.detect(model, data.val)
    return {
        "study": "detection",
        "status": "done",
        "value": variant,
        "seed": seed,
        "network": " ".join([study.backbone, *(f"{k}={v}" for k, v in study.options.items())]),
        **{
            name: round(value, 3)
            for name, value in detection.mean_average_precision(found, data.val.targets).items()
        },
        "final_loss": round(losses[-1]["train_loss"], 4),
        "epochs": study.recipe.epochs,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "time_s": round(time.perf_counter() - start_s),
        "autocast": "float32",
        **provenance({**describe_machine(), "command": command_line()}),
    }


def _train_classifier(study: DetectionStudy, seed: int, runs_dir: Path) -> Path:
    """The checkpoint of a seed's classifier, as notebook 03 trains it."""
    folder, recipe = runs_dir / f"classifier-seed{seed}", study.classifier_recipe
    data = open_folders(study.sample_dir, recipe, seed)
    torch.manual_seed(seed)
    loop.fit(
        study.make_classifier(study.backbone, len(data.classes), **study.options),
        data,
        recipe,
        folder,
        config={"backbone": study.backbone, "options": study.options},
        seed=seed,
        quiet=True,
        catch_signals=False,  # it goes on from its last whole epoch
    )
    return folder / "last.pt"
