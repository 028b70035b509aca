"""Accuracy, predictions and confusions of trained classifiers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from utils import data as inputs
from utils import distributed
from utils.data.folders import Batch, Preprocess, collate, in_threads, readable
from utils.data.transforms import CorruptImageError, Transform, eval_transform, open_image
from utils.data.workers import watched
from utils.recipe import Recipe
from utils.training.trained import Trained

# Makes of a network and a type a faster copy for inference: `backbones.deploy.optimize`.
Optimize = Callable[[nn.Module, torch.dtype], nn.Module]
MOST_IMAGES = 256  # in a batch that is evaluated, whatever the recipe trains with


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """The type to autocast to, or None for float32, also where bf16 would only be emulated."""
    if precision == "float32":
        return None
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_onednn = torch.backends.mkldnn.is_available()
        fast = device.type != "cpu" or (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if fast else None


def dtype_name(dtype: torch.dtype | None) -> str:
    """Such as "bfloat16"; None is float32, as above."""
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
    optimize: Optimize | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of several models in one pass over the images of all processes.

    Args:
        dtype: to autocast to, or None for float32.
        optimize: makes a copy of each model in that type, which stands for it on a CPU and gives
            the same to rounding. On a GPU it is the images that are waited for.

    Returns:
        For each model `loss` (cross-entropy without smoothing), `top1_pct` and `top5_pct` (top-k
        with k the number of classes if those are fewer), and `images`, how many were counted.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64, device=preprocess.device) for name in models}
    if optimize and preprocess.device.type == "cpu":
        models = {name: optimize(model, dtype or torch.float32) for name, model in models.items()}
        dtype = None
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
    return {name: _summarize(distributed.sum_over_processes(s)) for name, s in sums.items()}


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[sum of losses, right at the first guess, right in five guesses, images]."""
    guesses = logits.topk(min(5, logits.shape[1])).indices
    right = guesses == labels[:, None]
    loss = cross_entropy(logits, labels, reduction="sum")
    images = torch.full_like(loss, len(labels))
    return torch.stack((loss, right[:, 0].sum(), right.sum(), images))


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
    optimize: Optimize | None = None,
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Accuracy of a run's raw and EMA weights on `data_dir/val`.

    Args:
        size_px: side of the centre crop; images are resized in proportion. None for the recipe's.
        optimize: as of `evaluate`.

    Returns:
        `evaluate`'s results for "raw" and "EMA", and a message per image that was left out.

    Raises:
        DataError: the validation images are not as they should be, or have other classes.
        ValueError: a bad size.
    """
    recipe, device = trained.recipe, trained.device
    val = inputs.open_val_data(data_dir, trained.classes, _tested_at(recipe, size_px))
    batch_size = min(recipe.batch_size, MOST_IMAGES)
    loader = inputs.eval_loader(val, batch_size, workers, device.type == "cuda")
    skipped: dict[str, None] = {}
    results = evaluate(
        {"raw": trained.raw, "EMA": trained.ema},
        readable(watched(loader), skip_corrupt, skipped),
        Preprocess(device, len(val.classes), recipe.channels_last),
        autocast_dtype(device, recipe.precision),
        optimize,
    )
    return results, list(skipped)


def _tested_at(recipe: Recipe, size_px: int | None) -> Recipe:
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

    The files are read, resized and cropped as in `evaluate_trained`.

    Args:
        size_px: side of the centre crop, as there.

    Raises:
        FileNotFoundError: there is no such file; nothing is computed then.
        CorruptImageError: one of them is no readable image.
        ValueError: a bad size.
    """
    recipe = _tested_at(trained.recipe, size_px)
    for path in map(Path, paths):
        if not path.is_file():  # a pipe could keep us waiting
            if path.exists():
                raise CorruptImageError(f"{path}: not a readable image (no file at all)")
            raise FileNotFoundError(f"{path}: no such image")
    _, probabilities = predict(
        trained.ema,
        _batches_of(paths, eval_transform(recipe.eval_resize_px, recipe.eval_crop_px)),
        Preprocess(trained.device, len(trained.classes), recipe.channels_last),
        autocast_dtype(trained.device, recipe.precision),
    )
    return probabilities


def _batches_of(paths: Sequence[str | Path], transform: Transform) -> Iterator[Batch]:
    """The images of files, whose classes nobody knows, labelled 0."""
    for first in range(0, len(paths), MOST_IMAGES):
        some = paths[first : first + MOST_IMAGES]
        yield collate(in_threads(lambda path: (transform(open_image(path)), 0), some))


def over_chance(top1_pct: float, classes: int) -> float:
    """How far a top-1 accuracy has come from chance, at 0, to no error, at 1."""
    chance_pct = 100 / classes
    return (top1_pct - chance_pct) / (100 - chance_pct)


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
