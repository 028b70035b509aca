"""Detectors: training, detection, mean average precision, and a study of pretrained backbones.

A detector is any of torchvision's: lists of images `[3, H, W]` and targets in, losses or detections
out. The study trains each seed's detector from random weights and from a trained classifier's; its
CSV has a row per run, as those of `utils.studies.runner`.
"""

import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import nms

import backbones
from backbones.detection import retinanet
from utils.cli import progress_bar
from utils.data.boxes import BoxedBatch, BoxedImages, Target, open_boxes
from utils.data.folders import (
    STEP_STREAM,
    TrainBatches,
    eval_batches,
    make_loader,
    open_folders,
    seeded,
)
from utils.distributed import pick_device
from utils.recipe import DetectorRecipe, Recipe
from utils.records import command_line, describe_machine, lock, provenance
from utils.studies.runner import Result, Row, RunKey, Variant, record_runs, train_classifier
from utils.training.loop import PROGRESS_STEPS, DivergedError
from utils.training.optimizer import lr_factor, param_groups

SCRATCH, PRETRAINED = "from scratch", "pretrained"


def train_detector(
    model: nn.Module,
    images: BoxedImages,
    recipe: DetectorRecipe,
    *,
    seed: int = 0,
    workers: int = 0,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Trains a detector on its device; on a CPU the same seed and threads give the same bits.

    Returns:
        A row per epoch: `epoch` and `train_loss`, the mean over its steps of the sum of all losses.

    Raises:
        ValueError: a batch larger than the data.
        CorruptImageError: an image is unreadable.
        DivergedError: the loss is not finite.
    """
    device = next(model.parameters()).device
    batches = TrainBatches(len(images), recipe.batch_size, seed)
    loader = make_loader(images, batches, workers)
    optimizer = torch.optim.AdamW(param_groups(model, recipe.weight_decay), lr=recipe.lr)
    warmup, total = round(recipe.warmup_epochs * len(batches)), recipe.epochs * len(batches)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
    model.train()
    rows, step = [], 0
    with progress_bar(total=total * recipe.batch_size, unit=" images", disable=quiet) as bar:
        for epoch in range(recipe.epochs):
            batches.begin(epoch)
            losses = []
            for batch in loader:
                with seeded(STEP_STREAM, seed, step):  # Faster R-CNN samples its proposals
                    loss = sum(model(*_to_device(batch, device)).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                step += 1
                bar.update(len(batch.images))
                is_due = step % PROGRESS_STEPS == 0 or len(losses) == len(batches)
                if is_due and not torch.stack(losses).isfinite().all():  # waits for the device
                    reason = f"the loss is not finite before step {step}; try a lower lr"
                    raise DivergedError(reason, step)
            rows.append({"epoch": epoch + 1, "train_loss": torch.stack(losses).mean().item()})
            bar.set_postfix_str(f"loss {rows[-1]['train_loss']:.3f}", refresh=False)
    return rows


def _to_device(batch: BoxedBatch, device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images as the detectors take them, 0 to 1, and targets."""
    images = [image.to(device).float() / 255 for image in batch.images]
    return images, [{key: value.to(device) for key, value in t.items()} for t in batch.targets]


@torch.inference_mode()
def detect(model: nn.Module, images: BoxedImages, batch_size: int = 16) -> list[Target]:
    """Detections in each image: `boxes`, `labels` and `scores`, best first, on the CPU.

    Raises:
        CorruptImageError: an image is unreadable.
    """
    device = next(model.parameters()).device
    model.eval()
    found = []
    for batch in make_loader(images, eval_batches(len(images), batch_size), 0):
        detections = model(_to_device(batch, device)[0])
        found += [{key: value.cpu() for key, value in each.items()} for each in detections]
    return found


def clearest(found: Target, min_score: float) -> Target:
    """The confident detections in an image, at each place the best class alone.

    Args:
        min_score: leaves out detections below it. Of two boxes that overlap by half (IoU) the one
            with the lower score is left out, too.
    """
    kept = nms(found["boxes"], found["scores"], 0.5)
    kept = kept[found["scores"][kept] >= min_score]
    return {key: value[kept] for key, value in found.items()}


def mean_average_precision(found: Iterable[Target], targets: Iterable[Target]) -> dict[str, float]:
    """COCO's mean average precision of boxes, by torchmetrics and faster-coco-eval.

    Returns:
        `map_pct`, the mean over overlaps (IoU) of 0.50 to 0.95, and `map50_pct`, at 0.50; means
        over the classes of the targets, in percent.
    """
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False  # COCO counts the best hundred of an image
    metric.update(list(found), list(targets))
    result = metric.compute()
    return {"map_pct": 100 * result["map"].item(), "map50_pct": 100 * result["map_50"].item()}


# ---- the study -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionStudy:
    """The settings that both variants share."""

    backbone: str
    options: dict[str, Any]
    recipe: DetectorRecipe
    data_dir: Path  # with boxes, see `utils.data.boxes.open_boxes`
    sample_dir: Path | None  # of classes, to train each seed's classifier
    classifier_recipe: Recipe
    checkpoint: Path | None = None  # a classifier for every seed, instead of training


def run_detection_study(
    study: DetectionStudy, seeds: int, runs_dir: str | Path, output: str | Path
) -> pd.DataFrame:
    """Trains the missing runs of seeds 0, 1, ... and writes the table after every run.

    A run whose row is in `output` is finished. An interrupted detector starts again, an interrupted
    classifier resumes from its last complete epoch. `runs_dir` gets the classifiers.

    Returns:
        The table: a row per seed and variant, in percent, seconds and counts.

    Raises:
        DataError: the data or a checkpoint is damaged, or the folder of a run holds another run.
        ValueError: `output` is not a record of this study, or its runs have other settings.
        DivergedError: a loss is not finite.
    """
    runs_dir, data = Path(runs_dir), open_boxes(study.data_dir)
    settings = {
        "network": Variant("", study.backbone, study.options).network,
        "epochs": study.recipe.epochs,
        "train_images": len(data.train),
        "val_images": len(data.val),
        "autocast": "float32",
        "classifier": str(study.checkpoint or "trained for each seed"),
    }
    expected = {(value, k): [settings] for k in range(seeds) for value in (SCRATCH, PRETRAINED)}
    runs_dir.mkdir(parents=True, exist_ok=True)

    def run_all(keys: list[RunKey]) -> Generator[Result, None, None]:
        for key in keys:
            yield key, [_run(study, *key, runs_dir) | settings], []

    with lock(runs_dir, wait=False):
        return record_runs(output, "detection", expected, run_all)


def _run(study: DetectionStudy, variant: str, seed: int, runs_dir: Path) -> Row:
    """Trains one detector, after its classifier if it needs one, and returns its row."""
    data, weights = open_boxes(study.data_dir, seed), None
    if variant == PRETRAINED:
        weights = study.checkpoint or runs_dir / f"classifier-seed{seed}" / "last.pt"
        if not study.checkpoint:
            recipe, config = study.classifier_recipe, {"backbone": study.backbone}
            pictures = open_folders(study.sample_dir, recipe, seed)
            config["options"] = study.options
            train_classifier(pictures, recipe, weights.parent, config, seed)
    torch.manual_seed(seed)
    net = backbones.create(study.backbone, out_indices=(2, 3, 4), weights=weights, **study.options)
    size_px = {"min_size": study.recipe.image_px, "max_size": study.recipe.image_px}
    model = retinanet(net, len(data.classes), out_channels=study.recipe.out_channels, **size_px)
    model.to(pick_device())
    start_s = time.perf_counter()
    losses = train_detector(model, data.train, study.recipe, seed=seed, quiet=True)
    precision = mean_average_precision(detect(model, data.val), data.val.targets)
    return {
        "study": "detection",
        "status": "done",
        "value": variant,
        "seed": seed,
        **{name: round(value, 3) for name, value in precision.items()},
        "final_loss": round(losses[-1]["train_loss"], 4),
        "time_s": round(time.perf_counter() - start_s),
        **provenance({**describe_machine(), "command": command_line()}),
    }
