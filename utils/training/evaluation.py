"""Accuracy, predictions and confusions of trained classifiers."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbones.classifier import Classifier
from backbones.deploy import optimize
from utils import distributed
from utils.data import open_val_data
from utils.data.folders import Batch, Preprocess, load_batch, readable
from utils.data.transforms import CorruptImageError, Transform, eval_transform, open_image
from utils.recipe import Recipe
from utils.training.checkpoint import Trained

MAX_BATCH_SIZE = 256  # of an evaluation, whatever the batch size of training


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The type for autocast, or None for float32, also where bf16 would only be emulated."""
    if precision == "float32":
        return None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_onednn = torch.backends.mkldnn.is_available()
        native = device.type != "cpu" or (
            has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
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
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of several models in one pass over the images of all processes.

    On a CPU classifiers run as `backbones.deploy.optimize` makes them: faster, equal to rounding.

    Args:
        dtype: for autocast, or None for float32.

    Returns:
        For each model `loss` (cross-entropy without smoothing), `top1_pct` and `top5_pct` (top-k
        with k the number of classes if there are fewer), and `images`, the number of images.

    Raises:
        CorruptImageError: no image is readable.
    """
    device = preprocess.device
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}
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
                logits = model(images)
            sums[name] += _count(logits.float(), labels)
    return {name: _summarize(distributed.sum_over_processes(s)) for name, s in sums.items()}


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[sum of losses, correct top-1, correct top-5, images]."""
    guesses = logits.topk(min(5, logits.shape[1])).indices
    correct = guesses == labels[:, None]
    loss = cross_entropy(logits, labels, reduction="sum")
    images = torch.full_like(loss, len(labels))
    return torch.stack((loss, correct[:, 0].sum(), correct.sum(), images))


def _summarize(sums: Tensor) -> dict[str, float]:
    loss, top1, top5, images = sums.tolist()
    if images == 0:
        raise CorruptImageError("no validation image is readable")
    return {
        "loss": loss / images,
        "top1_pct": 100 * top1 / images,
        "top5_pct": 100 * top5 / images,
        "images": int(images),
    }


def evaluate_trained(
    trained: Trained,
    data_dir: str | Path,
    *,
    size_px: int | None = None,
    workers: int = 0,
    skip_corrupt: bool = False,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Accuracy of a run's raw and EMA weights on `data_dir/val`.

    Args:
        size_px: side of the center crop; images are resized in proportion. Defaults to the
            recipe's.

    Returns:
        The results of `evaluate` for "raw" and "EMA", and a message per image that was skipped.

    Raises:
        DataError: the validation images are invalid, or have other classes.
        ValueError: a bad size.
    """
    recipe, device = trained.recipe, trained.device
    val = open_val_data(data_dir, trained.classes, _at_size(recipe, size_px))
    batch_size = min(recipe.batch_size, MAX_BATCH_SIZE)
    loader = val.eval_loader(batch_size, workers, device.type == "cuda")
    skipped: dict[str, None] = {}
    results = evaluate(
        {"raw": trained.raw, "EMA": trained.ema},
        readable(loader, skip_corrupt, skipped),
        Preprocess(device, len(val.classes), recipe.channels_last),
        autocast_dtype(device, recipe.precision),
    )
    return results, list(skipped)


def _at_size(recipe: Recipe, size_px: int | None) -> Recipe:
    return recipe if size_px is None else recipe.tested_at(size_px)


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


def predict_files(
    trained: Trained, paths: Sequence[str | Path], size_px: int | None = None
) -> Tensor:
    """Class probabilities `[N, num_classes]` of image files by a run's EMA weights, on the CPU.

    Files are read, resized and cropped as in `evaluate_trained`.

    Raises:
        FileNotFoundError: a file is missing; nothing is computed then.
        CorruptImageError: a file is not a readable image.
        ValueError: a bad size.
    """
    recipe = _at_size(trained.recipe, size_px)
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image file")
    _, probabilities = predict(
        trained.ema,
        _file_batches(paths, eval_transform(recipe)),
        Preprocess(trained.device, len(trained.classes), recipe.channels_last),
        autocast_dtype(trained.device, recipe.precision),
    )
    return probabilities


def _file_batches(paths: Sequence[str | Path], transform: Transform) -> Iterator[Batch]:
    """Batches of image files without known classes; their label is 0."""
    for first in range(0, len(paths), MAX_BATCH_SIZE):
        some = paths[first : first + MAX_BATCH_SIZE]
        batch = load_batch(lambda path: (transform(open_image(path)), 0), some)
        if batch.corrupt:
            raise batch.corrupt[0]
        yield batch


def over_chance(top1_pct: float, classes: int) -> float:
    """A top-1 accuracy rescaled so that chance is 0 and 100 % is 1."""
    chance_pct = 100 / classes
    return (top1_pct - chance_pct) / (100 - chance_pct)


def confused_pairs(labels: Tensor, guesses: Tensor, names: list[str]) -> pd.DataFrame:
    """Pairs of classes by how often the first is predicted as the second, in descending order.

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
