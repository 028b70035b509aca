"""Accuracy and predictions of trained classifiers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler

from backbones.classifier import Classifier
from backbones.deploy import optimize
from utils import distributed
from utils.data import open_val_data
from utils.data.folders import Batch, Preprocess, load_batch, readable
from utils.data.transforms import CorruptImageError, eval_transform, open_image
from utils.training.checkpoint import Trained

MAX_BATCH_SIZE = 256  # of an evaluation, whatever the batch size of training


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The type for autocast; None is float32, also for fp16 on CPUs and where bf16 is emulated."""
    if precision == "float32":
        return None
    if precision == "fp16":
        return torch.float16 if device.type == "cuda" else None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_onednn = torch.backends.mkldnn.is_available()
        native = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else None


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a type, such as "bfloat16"; None is float32."""
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on `device`; does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@torch.inference_mode()
def evaluate(
    models: dict[str, nn.Module],
    batches: Iterable[Batch],
    preprocess: Preprocess,
    num_classes: int,
    dtype: torch.dtype | None = None,
    columns: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Accuracy of several models in one pass over the images of all processes.

    On a CPU classifiers run as `backbones.deploy.optimize` makes them: faster, equal to rounding.

    Args:
        num_classes: number of classes of the labels.
        dtype: for autocast, or None for float32.
        columns: the logit of each class, where the images are of some of the classes. Defaults to
            all logits.

    Returns:
        For each model `loss` (cross-entropy without smoothing), `top1_pct` and `top5_pct` (top-k
        with k the number of classes if there are fewer), `images`, the number of images, and
        `classes`, a list with these four of each class, NaN for a class without images.

    Raises:
        CorruptImageError: no image is readable.
    """
    device = preprocess.device
    zeros = torch.zeros(num_classes, 4, dtype=torch.float64, device=device)
    sums = {name: zeros.clone() for name in models}
    dtypes = dict.fromkeys(models, dtype)
    for name, model in models.items():
        if device.type == "cpu" and isinstance(model, Classifier):
            models = models | {name: optimize(model, dtype or torch.float32)}
            dtypes[name] = None  # its weights have that type already
        models[name].eval()
    for batch in batches:
        if not len(batch.labels):
            continue
        images, labels = preprocess(batch)
        for name, model in models.items():
            with autocast(device, dtypes[name]):
                logits = model(images).float()
            each = _count(logits if columns is None else logits[:, columns], labels)
            sums[name].index_add_(0, labels, each.double())
    found = {}
    for name, counts in sums.items():
        counts = distributed.sum_over_processes(counts)
        if not counts[:, 3].any():
            raise CorruptImageError("no validation image is readable")
        found[name] = {**_summarize(counts.sum(0)), "classes": list(map(_summarize, counts))}
    return found


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image its loss, whether it is correct in top-1 and in top-5, and 1: `[N, 4]`."""
    guesses = logits.topk(min(5, logits.shape[1])).indices
    correct = guesses == labels[:, None]
    loss = cross_entropy(logits, labels, reduction="none")
    return torch.stack((loss, correct[:, 0], correct.any(1), torch.ones_like(loss)), dim=1)


def _summarize(counts: Tensor) -> dict[str, float]:
    images = int(counts[3])
    loss, top1, top5 = (counts[:3] / images).tolist()
    return {"loss": loss, "top1_pct": 100 * top1, "top5_pct": 100 * top5, "images": images}


def evaluate_trained(
    trained: Trained,
    data_dir: str | Path,
    *,
    size_px: int | None = None,
    val_share: float = 0.0,
    workers: int = 0,
    skip_corrupt: bool = False,
    others: Mapping[str, nn.Module] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """Accuracy of a classifier on `data_dir/val`, which may hold some of its classes alone.

    Args:
        size_px: side of the center crop; images are resized in proportion. Defaults to the
            recipe's.
        val_share: the share of the training images that a run held out, without `val/`.
        others: names of other networks with the same logits, such as exported ones.

    Returns:
        The results of `evaluate` for "raw" and "EMA", or for "weights" alone if they are the same;
        the classes in `val/`, among which it chooses; and a message per image that was skipped.

    Raises:
        DataError: the validation images are invalid, or have other classes.
        ValueError: a bad size.
    """
    device, recipe = trained.device, trained.recipe
    recipe = recipe.tested_at(recipe.eval_crop_px if size_px is None else size_px)
    val = open_val_data(data_dir, trained.classes, recipe, val_share)
    if val_share:
        trained.warn_of_other_images(data_dir, val.digest())
    batch_size = min(recipe.batch_size, MAX_BATCH_SIZE)
    loader = val.eval_loader(batch_size, workers, device.type == "cuda")
    models = {"raw": trained.raw, "EMA": trained.ema}
    if trained.raw is trained.ema:
        models = {"weights": trained.ema}
    models |= others or {}
    skipped: dict[str, None] = {}
    results = evaluate(
        models,
        readable(loader, skip_corrupt, skipped),
        Preprocess(device, recipe),
        len(val.classes),
        autocast_dtype(device, recipe.precision),
        [trained.classes.index(name) for name in val.classes],
    )
    return results, val.classes, list(skipped)


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
        if not len(batch.labels):
            continue
        images, targets = preprocess(batch)
        with autocast(preprocess.device, dtype):
            logits = model(images)
        labels.append(targets.cpu())
        probabilities.append(logits.float().softmax(1).cpu())
    if not labels:
        raise CorruptImageError("no image is readable")
    return torch.cat(labels), torch.cat(probabilities)


def predict_files(
    trained: Trained,
    paths: Sequence[str | Path],
    size_px: int | None = None,
    skip_corrupt: bool = False,
) -> tuple[list[int], Tensor, list[str]]:
    """Class probabilities of image files by a classifier's EMA weights.

    Files are read, resized and cropped as in `evaluate_trained`.

    Returns:
        Indices of the `N` files that were read, their probabilities `[N, num_classes]` on the CPU,
        and a message per file that was skipped.

    Raises:
        FileNotFoundError: a file is missing; nothing is computed then.
        CorruptImageError: a file is not a readable image and may not be skipped, or none is.
        ValueError: a bad size.
    """
    recipe = trained.recipe
    recipe = recipe.tested_at(recipe.eval_crop_px if size_px is None else size_px)
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image file")
    transform, skipped = eval_transform(recipe), {}

    def load(index: int) -> tuple[Tensor, int]:
        return transform(open_image(paths[index])), index

    parts = BatchSampler(range(len(paths)), MAX_BATCH_SIZE, drop_last=False)
    batches = (load_batch(load, part) for part in parts)
    indices, probabilities = predict(
        trained.ema,
        readable(batches, skip_corrupt, skipped),
        Preprocess(trained.device, recipe),
        autocast_dtype(trained.device, recipe.precision),
    )
    return indices.tolist(), probabilities, list(skipped)


def over_chance(top1_pct: float, classes: int) -> float:
    """A top-1 accuracy rescaled so that chance is 0 and 100 % is 1."""
    chance_pct = 100 / classes
    return (top1_pct - chance_pct) / (100 - chance_pct)
