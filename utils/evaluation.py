"""Accuracy, predictions and confusions of trained classifiers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from utils import distributed, inputs
from utils.data import (
    Batch,
    CorruptImageError,
    Preprocess,
    readable,
    watched,
)
from utils.errors import DataError
from utils.recipe import Recipe


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The type to autocast to, or None for float32, also where bf16 would only be emulated."""
    if precision == "float32":
        return None
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`; does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[Batch],
    preprocess: Preprocess,
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of several models in one pass over the images of all processes.

    Returns:
        For each model `loss` (cross-entropy without smoothing), `top1_pct` and `top5_pct` (top-k
        with k the number of classes if those are fewer), and `images`, how many were counted.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64, device=preprocess.device) for name in models}
    for model in models.values():
        model.eval()
    for batch in batches:
        if not len(batch.labels):
            continue
        images, labels = preprocess(batch)
        for name, model in models.items():
            with autocast(preprocess.device, dtype):
                logits = model(images)
            sums[name] += _count(logits.float(), labels)
    return {name: _summarise(distributed.sum_over_processes(s)) for name, s in sums.items()}


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[sum of losses, right at the first guess, right in five guesses, images]."""
    guesses = logits.topk(min(5, logits.shape[1])).indices
    right = guesses == labels[:, None]
    loss = cross_entropy(logits, labels, reduction="sum")
    images = torch.full_like(loss, len(labels))
    return torch.stack((loss, right[:, 0].sum(), right.sum(), images))


def _summarise(sums: Tensor) -> dict[str, float]:
    loss, top1, top5, images = sums.tolist()
    if images == 0:
        raise CorruptImageError("no validation image is readable")
    return {
        "loss": loss / images,
        "top1_pct": 100 * top1 / images,
        "top5_pct": 100 * top5 / images,
        "images": int(images),
    }


def evaluate_checkpoint(
    model: nn.Module,
    checkpoint: dict[str, Any],
    data_dir: str | Path,
    *,
    size_px: int | None = None,
    workers: int = 0,
    device: torch.device | None = None,
    skip_corrupt: bool = False,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Accuracy of a run's raw and EMA weights on `data_dir/val`.

    Args:
        model: of the checkpoint's architecture; gets its raw weights.
        checkpoint: from `runs.load_checkpoint`.
        size_px: side of the centre crop; images are resized in proportion. None for the recipe's.

    Returns:
        `evaluate`'s results for "raw" and "EMA", and a message per image that was left out.

    Raises:
        DataError: weights or recipe are not what the checkpoint's config says, or the validation
            classes are others.
        ValueError: a bad size.
    """
    config = checkpoint["config"]
    try:
        recipe = Recipe(**config["recipe"])
    except (TypeError, ValueError) as error:
        raise DataError(f"the checkpoint's recipe is of another version ({error})") from error
    crop_px = recipe.eval_crop_px if size_px is None else size_px
    if crop_px < 1:
        raise ValueError(f"size={crop_px} must be at least 1 pixel")
    val = inputs.open_val_data(data_dir, config["classes"], recipe.tested_at(crop_px))
    device = device or distributed.pick_device()
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    try:
        model.load_state_dict(checkpoint["model"])
        average = AveragedModel(model, use_buffers=True)
        average.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise DataError("the checkpoint's weights are not those of its own config") from error
    model = model.to(device, memory_format=memory_format)
    average = average.to(device, memory_format=memory_format)
    batch_size = min(recipe.batch_size, 256)
    loader = inputs.eval_loader(val, batch_size, workers, device.type == "cuda")
    skipped: dict[str, None] = {}
    results = evaluate(
        {"raw": model, "EMA": average.module},
        readable(watched(loader), skip_corrupt, skipped),
        Preprocess(device, len(val.classes), recipe.channels_last),
        autocast_dtype(device, recipe.precision),
    )
    return results, list(skipped)


@torch.inference_mode()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    preprocess: Preprocess,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and class probabilities `[N, num_classes]` of all images, on the CPU."""
    model.eval()
    labels, probabilities = [], []
    for batch in batches:
        images, targets = preprocess(batch)
        with autocast(preprocess.device, dtype):
            logits = model(images)
        labels.append(targets.cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(labels), torch.cat(probabilities)


def confused_pairs(labels: Tensor, guesses: Tensor, names: list[str]) -> pd.DataFrame:
    """Pairs of classes by how often the first is taken for the second, most often first.

    Args:
        labels, guesses: true and predicted class of each image, `[N]`.

    Returns:
        Columns `true`, `predicted`, `images` and `share_pct`, the share of the true class.
    """
    table = pd.crosstab(pd.Series(labels.numpy()), pd.Series(guesses.numpy())).stack()
    rows = [
        (names[true], names[guess], count, 100 * count / int((labels == true).sum()))
        for (true, guess), count in table.items()
        if true != guess and count
    ]
    frame = pd.DataFrame(rows, columns=["true", "predicted", "images", "share_pct"])
    return frame.sort_values("images", ascending=False, kind="stable", ignore_index=True)
