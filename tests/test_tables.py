"""README's tables, and what counts a model's cost for them."""

import pandas as pd
import pytest
import torch
from torch import nn

from utils.measure import count_macs, count_parameters
from utils.tables import markdown, model_table, replace_block


def test_markdown_aligns_numbers_and_escapes_bars():
    table = pd.DataFrame({"name": ["a|b", "c"], "count": [1, 20], "note": ["x", "3"]})
    assert markdown(table).splitlines() == [
        "| name | count | note |",
        "| --- | ---: | --- |",
        r"| a\|b | 1 | x |",
        "| c | 20 | 3 |",
    ]


def test_model_table_shows_the_defaults_alone():
    rows = [("net", "{}", 1_250_000, 0.3, "8 16"), ("net", '{"act": "mish"}', 9, 9.0, "8 16")]
    columns = ["name", "options", "parameters", "gmacs_224", "channels"]
    lines = model_table(pd.DataFrame(rows, columns=columns)).splitlines()
    assert lines[2:] == ["| `net` | 1.2 | 0.30 | 8, 16 |"]


def test_blocks_are_replaced_between_their_marks():
    text = "a\n<!-- x -->\nold \\1\n<!-- end of x -->\nb\n"
    new = replace_block(text, "x", r"new \1")
    assert new == "a\n<!-- x -->\nnew \\1\n<!-- end of x -->\nb\n"
    assert replace_block(new, "x", r"new \1") == new
    for broken in (text.replace("end of", "end"), text + text, "", text[::-1]):
        with pytest.raises(ValueError, match=r"<!-- x -->.*once each"):
            replace_block(broken, "x", "new")


def test_macs_and_parameters_by_hand():
    """A strided, grouped convolution and a linear layer; nothing is run or changed."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(6, 5))
    before = [value.clone() for value in model.state_dict().values()]
    assert count_parameters(model) == 6 * 2 * 9 + 2 * 6 + 6 * 5 + 5
    assert count_macs(model, 9, 12, channels=4) == 5 * 6 * (6 * 2 * 9) + 6 * 5
    assert model.training
    for old, new in zip(before, model.state_dict().values(), strict=True):
        assert torch.equal(old, new)
