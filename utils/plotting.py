"""Figures from records: rows in, matplotlib figures out."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

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


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as an image file."""
    figure.savefig(path, dpi=120)
