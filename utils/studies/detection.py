"""Detectors: training, what they find, mean average precision.

Nothing here knows a backbone: a detector is any of torchvision's, lists of images `[3, H, W]` and
targets in, losses or detections out.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import nms

from utils.cli import progress_bar
from utils.data.boxes import BoxedBatch, BoxedImages, Target
from utils.data.folders import STEP_STREAM, EvalBatches, TrainBatches, make_loader, seeded
from utils.recipe import DetectorRecipe
from utils.training.loop import PROGRESS_STEPS, DivergedError, lr_factor, param_groups


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
        A row per epoch: `epoch`, `train_loss`, the mean over its steps of the sum of all losses.

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
    count = total * recipe.batch_size
    with progress_bar(total=count, unit=" images", disable=quiet) as bar:
        for epoch in range(recipe.epochs):
            batches.begin(epoch)
            losses = []
            for batch in loader:
                with seeded(STEP_STREAM, seed, step):  # Faster R-CNN draws its regions
                    loss = sum(model(*_on_device(batch, device)).values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                step += 1
                bar.update(len(batch.images))
                if step % PROGRESS_STEPS == 0 or len(losses) == len(batches):
                    _check(losses, step)
            rows.append({"epoch": epoch + 1, "train_loss": torch.stack(losses).mean().item()})
            bar.set_postfix_str(f"loss {rows[-1]['train_loss']:.3f}", refresh=False)
    return rows


def _on_device(batch: BoxedBatch, device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Images as the detectors take them, 0 to 1, and targets."""
    images = [image.to(device).float() / 255 for image in batch.images]
    return images, [{key: value.to(device) for key, value in t.items()} for t in batch.targets]


def _check(losses: Sequence[Tensor], step: int) -> None:
    if not torch.stack(list(losses)).isfinite().all():
        raise DivergedError(f"the loss is not finite before step {step}; try a lower lr", step)


@torch.inference_mode()
def detect(model: nn.Module, images: BoxedImages, batch_size: int = 16) -> list[Target]:
    """What a detector sees in each image: `boxes`, `labels` and `scores`, best first, on the CPU.

    Raises:
        CorruptImageError: an image is unreadable.
    """
    device = next(model.parameters()).device
    model.eval()
    found = []
    for batch in make_loader(images, EvalBatches(len(images), batch_size), 0):
        of_batch = model(_on_device(batch, device)[0])
        found += [{key: value.cpu() for key, value in each.items()} for each in of_batch]
    return found


def clearest(found: Target, least_score: float) -> Target:
    """Of what a detector found in an image, what it is sure of: at each place the best class alone.

    Args:
        least_score: below it a detection is left out; of two boxes that overlap by half (IoU) so is
            the one with the lower score.
    """
    kept = nms(found["boxes"], found["scores"], 0.5)
    kept = kept[found["scores"][kept] >= least_score]
    return {key: value[kept] for key, value in found.items()}


def mean_average_precision(found: Iterable[Target], targets: Iterable[Target]) -> dict[str, float]:
    """COCO's mean average precision of boxes, by torchmetrics and faster-coco-eval.

    Returns:
        `map_pct`, the mean over overlaps (IoU) of 0.50 to 0.95, and `map50_pct`, at 0.50; means
        over the classes that the targets have, in percent.
    """
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    metric.warn_on_many_detections = False  # COCO counts the best hundred of an image
    metric.update(list(found), list(targets))
    result = metric.compute()
    return {"map_pct": 100 * result["map"].item(), "map50_pct": 100 * result["map_50"].item()}
