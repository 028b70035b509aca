"""Figures from records: rows in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from utils.data import MEAN_RGB, STD_RGB

# Okabe and Ito's palette, told apart by colour-blind readers too.
RAW, EMA, TRAIN = "#0072B2", "#D55E00", "#009E73"
FAMILIES = {"#0072B2": "o", "#E69F00": "s", "#56B4E9": "^", "#CC79A7": "D", "#000000": "v"}
SIDES = {  # where a point's name stands: offset in points, alignment
    "left": ((-7, 0), {"ha": "right", "va": "center"}),
    "right": ((7, 0), {"ha": "left", "va": "center"}),
    "above": ((0, 6), {"ha": "center", "va": "bottom"}),
}


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


def plot_costs(table: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> Figure:
    """Parameters against multiply-accumulates, a point per model, a colour and marker per family.

    Args:
        table: columns `family` (at most five), `parameters` and `gmacs_224`; names are the index.
        labels: names to be written "left", "right" or "above" their points; others stay unnamed.
    """
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.margins(0.08)
    points = table.assign(millions=table.parameters / 1e6)
    families = zip(points.groupby("family"), FAMILIES.items(), strict=False)
    for (family, rows), (colour, marker) in families:
        axes.plot(rows.gmacs_224, rows.millions, marker, color=colour, label=family)
    for side, names in labels.items():
        shift, align = SIDES[side]
        for row in points.loc[list(names)].itertuples():
            point = row.gmacs_224, row.millions
            axes.annotate(row.Index, point, shift, textcoords="offset points", size=9, **align)
    axes.set(xlabel="multiply-accumulates at 224 px (GMACs)", ylabel="parameters (millions)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_maps(
    image: Image.Image, maps: Sequence[Tensor], strides: Sequence[int], columns: int = 6
) -> Figure:
    """An image and the first channels of its feature maps, a row per map.

    Each channel has its own scale, dark at its smallest value, bright from its 99th percentile on.

    Args:
        maps: `[1, C, H, W]` each, fine to coarse.
        strides: of the maps.
    """
    tall = image.height / image.width
    figure = Figure(figsize=(9, 1.02 * len(maps) * tall + 0.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))
    whole = left.subplots()
    whole.imshow(image)
    whole.set_title(f"image\n{image.height} x {image.width}", fontsize=8)
    rows = right.subplots(len(maps), columns, squeeze=False)
    for axes, found, stride in zip(rows, maps, strides, strict=True):
        _, channels, height, width = found.shape
        text = f"stride {stride}\n{channels} ch.\n{height} x {width}"
        axes[0].set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
        for panel, channel in zip(axes, found[0], strict=False):
            bright = channel.quantile(0.99).item()  # a single peak would darken all the rest
            panel.imshow(channel.numpy(), cmap="viridis", interpolation="nearest", vmax=bright)
    for axes in (whole, *rows.flat):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def to_pixels(images: Tensor) -> Tensor:
    """Normalised images `[N, 3, H, W]`, as a network gets them, back to uint8."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    return (images.cpu() * std + mean).round().clamp(0, 255).to(torch.uint8)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as an image file."""
    figure.savefig(path, dpi=120)
