"""Figures from records: rows in, matplotlib figures out."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from utils.records import write_atomic

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
RAW, EMA, TRAIN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
COLOURS = (RAW, EMA, TRAIN, "#000000", "#CC79A7", "#56B4E9", "#E69F00", GREY, RAW, EMA)
DASHES = ((5, 1), (3, 1, 1, 1), (1, 1), (4, 2, 1, 2), (2, 2), (6, 1, 1, 1))
STYLES = ("-", "--", "-.", ":", *((0, dashes) for dashes in DASHES))
LINES = [
    {"color": colour, "marker": marker, "ls": style}
    for colour, marker, style in zip(COLOURS, "os^DvPX*<>", STYLES, strict=True)
]
LABEL_SIDES = {  # where the name of a point is: offset in points, alignment
    "left": ((-7, 0), {"ha": "right", "va": "center"}),
    "right": ((7, 0), {"ha": "left", "va": "center"}),
    "above": ((0, 6), {"ha": "center", "va": "bottom"}),
}


# ---- runs and studies ----------------------------------------------------------------------------


def plot_curves(rows: list[dict[str, float]] | pd.DataFrame) -> Figure:
    """Loss and top-1 accuracy over epochs, with raw and EMA weights.

    Args:
        rows: those of a run's metrics.csv.
    """
    table = pd.DataFrame(rows)
    figure, (loss, top1) = _panels(2, height=3.4)
    loss.plot(table.epoch, table.train_loss, ".-", color=TRAIN, label="training (augmented)")
    table = table.dropna()  # the epochs that were evaluated
    for prefix, colour, label in (("", RAW, "raw"), ("ema_", EMA, "EMA")):
        loss.plot(table.epoch, table[f"{prefix}val_loss"], ".-", color=colour, label=label)
        top1.plot(table.epoch, table[f"{prefix}val_top1_pct"], ".-", color=colour, label=label)
    loss.set(xlabel="epoch", ylabel="cross-entropy loss")
    top1.set(xlabel="epoch", ylabel="validation top-1 (%)")
    for axes in (loss, top1):
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def plot_bands(
    table: pd.DataFrame,
    x: str,
    panels: Mapping[str, str],
    x_label: str,
    by: str = "value",
    title: str = "mean, min to max over seeds",
) -> Figure:
    """A panel per quantity: a line through the means over seeds, and a band from min to max.

    Args:
        table: a row per `by`, seed and `x`.
        panels: column to the label of its axis.
        by: the column whose values are lines, at most ten, in the order of the table.
        title: of the legend.
    """
    figure, all_axes = _panels(len(panels), height=3.6)
    for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
        for (value, rows), style in _styled(table.groupby(by, sort=False)):
            over_seeds = rows.groupby(x)[column].agg(["min", "mean", "max"])
            axes.plot(over_seeds["mean"], label=value, markersize=4, **style)
            band = {"color": style["color"], "alpha": 0.15, "lw": 0}
            axes.fill_between(over_seeds.index, over_seeds["min"], over_seeds["max"], **band)
        axes.set(xlabel=x_label, ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _legend(figure, title)
    return figure


def plot_effects(found: Mapping[str, pd.DataFrame], x_label: str) -> Figure:
    """Differences with their intervals, a panel per table; intervals without zero are filled.

    Args:
        found: a title to a result of `utils.studies.statistics.compare`; panels share their rows.
    """
    names = list(next(iter(found.values())).index)
    height = 0.9 + 0.36 * len(names)
    figure, all_axes = _panels(len(found), height, grid="x", sharex=True, sharey=True)
    for axes, (title, table) in zip(all_axes, found.items(), strict=True):
        rows, y = table.loc[names], range(len(names))
        excludes_zero = [rows.low > 0, rows.high < 0]
        colours = np.select(excludes_zero, [RAW, EMA], GREY)
        axes.hlines(y, rows.low, rows.high, colors=colours, lw=2)
        fills = np.select(excludes_zero, [RAW, EMA], "white")
        axes.scatter(rows.difference, y, edgecolors=colours, color=fills, zorder=3)
        axes.set(title=title)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_xlabel(x_label)
        axes.set_yticks(y, names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # from the top
    return figure


def plot_confusion(
    labels: Tensor, guesses: Tensor, names: Sequence[str], max_classes: int = 20
) -> Figure:
    """Numbers of images by their class and the predicted one; of many classes the most confused.

    Args:
        labels, guesses: true and predicted class of each image, `[N]`.
        names: names of all classes.
    """
    count = len(names)
    images = torch.bincount(labels * count + guesses, minlength=count**2).view(count, count)
    errors = images.sum(0) + images.sum(1) - 2 * images.diagonal()
    shown = errors.argsort(descending=True, stable=True)[:max_classes].sort().values
    images, names = images[shown][:, shown], [names[k] for k in shown]
    figure = Figure(figsize=(1.5 + 0.45 * len(names), 1 + 0.38 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(images.numpy(), cmap="Blues", aspect="auto")
    for row, column in images.nonzero().tolist():
        number = images[row, column].item()
        colour = "white" if number > images.max() / 2 else "black"
        axes.text(column, row, number, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def plot_trade_offs(
    table: pd.DataFrame,
    panels: Mapping[str, str],
    y_label: str,
    by: str | None = None,
    scale: Literal["linear", "log"] = "linear",
) -> Figure:
    """Accuracy over costs, a panel per cost, a point per row.

    Args:
        table: columns `mean` of the accuracy, `std` if its standard deviation is known, and those
            of `panels`.
        panels: column of a cost to the label of its axis.
        by: column that groups points under one colour and name, at most ten; by default the index
            names each point.
        scale: scale of the costs; a linear one begins at zero.
    """
    figure, all_axes = _panels(len(panels), height=3.6, sharey=True)
    for axes, (column, label) in zip(all_axes, panels.items(), strict=True):
        for (name, points), style in _styled(table.groupby(by or table.index, sort=False)):
            look = {**style, "ls": "", "ms": 6, "capsize": 3 if "std" in points else 0}
            axes.errorbar(points[column], points["mean"], points.get("std"), label=name, **look)
        axes.set(xlabel=label, xscale=scale)
        if scale == "linear":
            axes.set_xlim(0, 1.1 * table[column].max())
            axes.xaxis.get_major_locator().set_params(nbins=5)
        else:
            axes.xaxis.set_major_formatter("{x:g}")
    all_axes[0].set_ylabel(y_label)
    _legend(figure, "± standard deviation" if "std" in table else None)
    return figure


def plot_costs(table: pd.DataFrame, labels: Mapping[str, Sequence[str]]) -> Figure:
    """Parameters over multiply-accumulates, a point per model, a colour and marker per family.

    Args:
        table: columns `family` (at most ten), `parameters` and `gmacs`; names are the index.
        labels: "left", "right" or "above" to the names that are written there.
    """
    points = table.assign(mean=table.parameters / 1e6)
    panels = {"gmacs": "multiply-accumulates (GMACs)"}
    figure = plot_trade_offs(points, panels, "parameters (millions)", by="family", scale="log")
    figure.set_figheight(5.6)
    (axes,) = figure.axes
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(0.08)
    for side, names in labels.items():
        shift, align = LABEL_SIDES[side]
        for name, x, y in points.loc[list(names), ["gmacs", "mean"]].itertuples():
            axes.annotate(name, (x, y), shift, textcoords="offset points", size=9, **align)
    return figure


def _panels(
    count: int, height: float, grid: str = "both", **share: bool
) -> tuple[Figure, Sequence[Axes]]:
    """A figure 9 inches wide, of that height in inches, with `count` panels beside each other."""
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, **share)[0]
    for axes in panels:
        axes.grid(alpha=0.3, axis=grid)
    return figure, panels


def _styled(groups: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each group with its own colour, marker and line style."""
    if len(groups) > len(LINES):
        raise ValueError(f"{len(groups)} groups to draw; at most {len(LINES)} can be told apart")
    return zip(groups, LINES, strict=False)


def _legend(figure: Figure, title: str | None) -> None:
    """A legend of the first panel, outside of it, where it hides no data."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    look = {"loc": "outside right upper"}
    if max(map(len, labels)) > 20:  # at the side it would take the width of a panel
        look = {"loc": "outside lower center", "ncols": 3}
        figure.set_figheight(figure.get_figheight() + 1)
    figure.legend(handles, labels, frameon=False, title=title, **look)


# ---- images --------------------------------------------------------------------------------------


def plot_images(images: Sequence, titles: Sequence[str], columns: int = 6) -> Figure:
    """A grid of images, each under its title.

    Args:
        images: PIL images, or tensors `[3, H, W]`, uint8 or floats from 0 to 1.
    """
    rows, width = max(1, -(-len(images) // columns)), 9 / columns  # in inches
    wrapped = [
        "\n".join(textwrap.fill(line, 140 // columns) for line in title.splitlines())
        for title in titles
    ]
    text_height = 0.15 * max((len(title.splitlines()) for title in wrapped), default=0)
    figure = Figure(figsize=(9, rows * (width + text_height)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
        axes.set_anchor("N")  # aligns the titles of a row
    for axes, image, title in zip(figure.axes, images, wrapped, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image)
        axes.set_title(title, fontsize=8, pad=3)
    return figure


def plot_boxes(
    images: Sequence[Tensor],
    truth: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    found: Sequence[Mapping[str, Tensor]] | None = None,
    columns: int = 4,
) -> Figure:
    """A grid of images with the true boxes dashed; they are named if nothing is `found`.

    A detection is green if a true box of its class overlaps it by half (IoU), and orange if not.

    Args:
        images: uint8 `[3, H, W]`.
        truth: for each image `boxes` `[n, 4]` as x1, y1, x2, y2 in pixels, and `labels`.
        names: names of the classes; labels count them from 1.
        found: the detections in each image, with `scores`; None to name the true objects.
    """
    figure = plot_images(images, [""] * len(images), columns)
    for k, (axes, objects) in enumerate(zip(figure.axes, truth, strict=False)):
        for box, label in zip(objects["boxes"].tolist(), objects["labels"], strict=True):
            _draw_box(axes, box, "" if found else names[label - 1], color="white", ls="--")
        if found:
            boxes, labels, scores = (found[k][key] for key in ("boxes", "labels", "scores"))
            same = labels[:, None] == objects["labels"]
            right = (same & (box_iou(boxes, objects["boxes"]) >= 0.5)).any(1)
            for box, label, score, hit in zip(boxes.tolist(), labels, scores, right, strict=True):
                text = f"{names[label - 1]} {score:.2f}"
                _draw_box(axes, box, text, color=TRAIN if hit else EMA)
    return figure


def _draw_box(axes: Axes, box: list[float], text: str, **look: Any) -> None:
    """A box with text inside its top, on the side of the image's middle: it is not cut off."""
    x1, y1, x2, y2 = np.subtract(box, 0.5)  # the origin is the centre of pixel (0, 0)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=1.2, **look))
    x, shift, side = (x1, 1.5, "left")
    if x1 + x2 > sum(axes.get_xlim()):
        x, shift, side = (x2, -1.5, "right")
    colour = "black" if look["color"] == "white" else look["color"]
    background = {"color": colour, "pad": 0.6, "lw": 0}
    style = {"size": 6, "color": "white", "ha": side, "va": "top", "bbox": background}
    if text:
        axes.annotate(text, (x, y1), (shift, -1.5), textcoords="offset points", **style)


def plot_components(image: Image.Image, maps: Sequence[Tensor], strides: Sequence[int]) -> Figure:
    """An image and its feature maps in a row, each map in colours.

    A map's red, green and blue are its three principal components over the channels, each from its
    2nd to its 98th percentile: similar features have similar colours within a map.

    Args:
        maps: `[1, C, H, W]` each, at least three channels and pixels, fine to coarse.
        strides: strides of the maps.
    """
    shown, titles = [image], [f"image\n{image.height} x {image.width}"]
    for found, stride in zip(maps, strides, strict=True):
        _, channels, height, width = found.shape
        features = found[0].flatten(1).T
        features = features - features.mean(0)
        scores = features @ torch.linalg.svd(features, full_matrices=False).Vh[:3].T
        low, high = scores.quantile(torch.tensor([0.02, 0.98]), 0)
        shown.append(((scores - low) / (high - low)).clamp(0, 1).T.view(3, height, width))
        titles.append(f"stride {stride}\n{channels} x {height} x {width}")
    figure = plot_images(shown, titles, columns=len(shown))
    figure.set_size_inches(2 * len(shown), 2 * image.height / image.width + 0.35)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as an image file, atomically."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format=path.suffix[1:]))
