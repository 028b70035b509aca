"""Figures show every row that they are given; what they look like is for the eye."""

import pandas as pd
import pytest
import torch
from PIL import Image

from utils import plotting


def test_costs_have_a_point_per_model_and_the_names_asked_for():
    rows = [("a", "X", 2e6, 0.5), ("b", "X", 4e6, 1.0), ("c", "Y", 8e6, 2.0)]
    columns = ["name", "family", "parameters", "gmacs_224"]
    table = pd.DataFrame(rows, columns=columns).set_index("name")
    (axes,) = plotting.plot_costs(table, {"left": ["a"], "above": ["c"]}).axes
    points = {tuple(point) for line in axes.lines for point in line.get_xydata()}
    assert points == {(0.5, 2.0), (1.0, 4.0), (2.0, 8.0)}
    assert [text.get_text() for text in axes.texts] == ["a", "c"]
    assert {line.get_label() for line in axes.lines} == {"X", "Y"}
    with pytest.raises(KeyError):
        plotting.plot_costs(table, {"left": ["d"]})


def test_maps_have_a_panel_per_channel():
    maps = [torch.rand(1, 8, 16, 12), torch.rand(1, 3, 8, 6)]
    figure = plotting.plot_maps(Image.new("RGB", (24, 32)), maps, (2, 4), columns=4)
    panels = [image for axes in figure.axes for image in axes.images]
    assert len(panels) == 1 + 4 + 3
    shown = torch.as_tensor(panels[2].get_array().data)
    assert torch.equal(shown, maps[0][0, 1])
    assert "8 ch." in figure.axes[1].get_ylabel()
