"""Figures show every row that they are given; what they look like is for the eye."""

import itertools

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from utils import plotting


def test_costs_have_a_point_per_model_and_the_names_asked_for():
    rows = [("a", "X", 2e6, 0.5), ("b", "X", 4e6, 1.0), ("c", "Y", 8e6, 2.0)]
    columns = ["name", "family", "parameters", "gmacs"]
    table = pd.DataFrame(rows, columns=columns).set_index("name")
    (axes,) = plotting.plot_costs(table, {"left": ["a"], "above": ["c"]}).axes
    points = {tuple(point) for line in axes.lines for point in line.get_xydata()}
    assert points == {(0.5, 2.0), (1.0, 4.0), (2.0, 8.0)}
    assert [text.get_text() for text in axes.texts] == ["a", "c"]
    assert {family.get_label() for family in axes.containers} == {"X", "Y"}


def test_components_tell_features_apart_and_nothing_else():
    """Two features on noise a thousand times weaker: two colours, whatever the channels are."""
    torch.manual_seed(0)
    left = torch.arange(12).view(1, 12).expand(16, 12) < 5
    found = torch.where(left, *torch.rand(2, 8, 1, 1)) + 1e-3 * torch.randn(1, 8, 16, 12)
    figure = plotting.plot_components(Image.new("RGB", (24, 32)), [found], (2,))
    first = torch.as_tensor(figure.axes[1].images[0].get_array().data)[..., 0]
    assert abs(first[left].mean() - first[~left].mean()) > 0.9  # the largest component
    assert max(first[left].std(), first[~left].std()) < 0.05


def test_bands_go_from_min_to_max_through_the_mean():
    rows = [("a", 0, 1, 5.0), ("a", 1, 1, 7.0), ("a", 0, 2, 8.0), ("a", 1, 2, 9.0)]
    table = pd.DataFrame([*rows, ("b", 0, 1, 1.0)], columns=["value", "seed", "epoch", "top1"])
    (axes,) = plotting.plot_bands(table, "epoch", {"top1": "top-1 (%)"}, "epoch").axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert axes.lines[0].get_xydata().tolist() == [[1, 6.0], [2, 8.5]]
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    assert corners >= {(1, 5), (1, 7), (2, 8), (2, 9)}


def test_confusion_of_the_classes_with_the_most_errors():
    labels, guesses = torch.tensor([0, 2, 1, 2, 2, 3]), torch.tensor([0, 0, 1, 1, 1, 3])
    (axes,) = plotting.plot_confusion(labels, guesses, ["a", "b", "c", "d"], max_classes=3).axes
    texts = {(*text.get_position(), text.get_text()) for text in axes.texts}
    assert texts == {(0, 0, "1"), (1, 1, "1"), (0, 2, "1"), (1, 2, "2")}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_effects_whose_interval_holds_zero_are_hollow():
    columns = ["difference", "low", "high", "n"]
    rows = [(2.0, 1.0, 3.0, 5), (-1.0, -3.0, 1.0, 5)]
    found = pd.DataFrame(rows, columns=columns, index=["x", "y"])
    other = found[::-1].assign(difference=0.5)  # rows are found by name
    left, right = plotting.plot_effects({"here": found, "there": other}, "points").axes
    _, points = left.collections
    assert points.get_offsets()[:, 0].tolist() == [2.0, -1.0]
    assert [tuple(colour) == (1, 1, 1, 1) for colour in points.get_facecolor()] == [False, True]
    assert [label.get_text() for label in left.get_yticklabels()] == ["x", "y"]
    ends = [[x for x, _ in segment.tolist()] for segment in right.collections[0].get_segments()]
    assert ends == [[1.0, 3.0], [-3.0, 1.0]]


def test_trade_offs_have_a_point_per_row_and_cost():
    table = pd.DataFrame({"mean": [50.0, 60.0], "std": [1.0, 2.0], "cost": [3.0, 4.0]}, ["a", "b"])
    (axes,) = plotting.plot_trade_offs(table, {"cost": "cost (ms)"}, "top-1 (%)").axes
    assert [box.get_label() for box in axes.containers] == ["a", "b"]
    places = [box.lines[0].get_xydata()[0].tolist() for box in axes.containers]
    assert places == [[3, 50], [4, 60]]
    published = table.drop(columns="std")
    (plain,) = plotting.plot_trade_offs(published, {"cost": "cost"}, "y", scale="log").axes
    assert not plain.collections  # no bars where no spread is known
    many = pd.concat([table] * 6, ignore_index=True)
    with pytest.raises(ValueError, match="12 groups to draw; at most 10"):
        plotting.plot_trade_offs(many, {"cost": "cost"}, "y")


def test_titles_of_images_keep_to_their_columns():
    """In a row of eight: no title reaches into the next, and all begin at one height."""
    names = ["English springer 0.21", "black-and-tan coonhound", "ring"] * 3
    images = [Image.new("RGB", size) for size in [(40, 30), (30, 40), (40, 40)] * 3]
    figure = plotting.plot_images(images[:8], names[:8], columns=8)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    heights = [box.y0 for box in boxes]
    assert max(heights) - min(heights) < 2  # pixels
    assert not plotting.plot_images([], []).axes[0].images  # such as of no wrong guesses


def test_boxes_are_drawn_where_they_are_and_named_inside_the_picture():
    """At each corner: the text lies within its axes, and every box has its four sides."""
    corners = torch.tensor([[0, 0, 20, 20], [44, 0, 64, 20], [0, 44, 20, 64], [44, 44, 64, 64.0]])
    labels, scores = torch.tensor([1, 2, 1, 2]), torch.tensor([0.9, 0.8, 0.7, 0.6])
    found = {"boxes": corners, "labels": labels, "scores": scores}
    image, names = torch.zeros(3, 64, 64, dtype=torch.uint8), ["heart", "flower"]
    truth = {"boxes": corners, "labels": torch.tensor([1, 2, 1, 1])}
    (seen,) = plotting.plot_boxes([image], [truth], names, [found], columns=1).axes
    (named,) = plotting.plot_boxes([image], [found], names, columns=1).axes
    assert [len(axes.patches) for axes in (seen, named)] == [8, 4]
    assert [text.get_text() for text in seen.texts][:2] == ["heart 0.90", "flower 0.80"]
    colours = [to_hex(patch.get_edgecolor()).upper() for patch in seen.patches]
    assert colours == ["#FFFFFF"] * 4 + [plotting.TRAIN] * 3 + [plotting.EMA]  # one is wrong
    assert [text.get_text() for text in named.texts] == ["heart", "flower"] * 2
    assert seen.patches[-1].get_bbox().extents.tolist() == [43.5, 43.5, 63.5, 63.5]
    for axes in (seen, named):
        axes.figure.canvas.draw()
        for text in axes.texts:
            inside, box = axes.get_window_extent(), text.get_window_extent()
            assert inside.x0 - 1 <= box.x0 < box.x1 <= inside.x1 + 1
            assert inside.y0 - 1 <= box.y0 < box.y1 <= inside.y1 + 1
