"""Figures from records: rows in, matplotlib figures out."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from utils.data import MEAN_RGB, STD_RGB

# Okabe and Ito's palette, told apart by colour-blind readers too.
RAW, EMA, TRAIN = "#0072B2", "#D55E00", "#009E73"


def plot_curves(rows: list[dict[str, float]] | pd.DataFrame) -> Figure:
    """Loss and top-1 accuracy over epochs, of raw and averaged weights.

    Args:
        rows: those of a run's metrics.csv.
    """
    table = pd.DataFrame(rows)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    loss.plot(table.epoch, table.train_loss, "-", color=TRAIN, label="training (augmented)")
    for prefix, colour, label in (("", RAW, "raw"), ("ema_", EMA, "EMA")):
        loss.plot(table.epoch, table[f"{prefix}val_loss"], ".-", color=colour, label=label)
        top1.plot(table.epoch, table[f"{prefix}val_top1_pct"], ".-", color=colour, label=label)
    loss.set(xlabel="epoch", ylabel="cross-entropy loss")
    top1.set(xlabel="epoch", ylabel="validation top-1 (%)")
    for axes in (loss, top1):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_images(images: Sequence, titles: Sequence[str], columns: int = 6) -> Figure:
    """A grid of images, each under its title.

    Args:
        images: PIL images, or uint8 tensors `[3, H, W]`.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(9, 9 / columns * rows * 1.18), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        pixels = image.permute(1, 2, 0) if isinstance(image, Tensor) else image
        axes.imshow(pixels)
        axes.set_title(title, fontsize=8)
    return figure


def to_pixels(images: Tensor) -> Tensor:
    """Normalised images `[N, 3, H, W]`, as a network gets them, back to uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    return (images.cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as an image file."""
    figure.savefig(path, dpi=120)
