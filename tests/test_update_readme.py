"""The generated tables of README.md and docs/."""

import pandas as pd
import pytest

from scripts.update_readme import replace_block, update


def test_tables_are_those_of_the_records(capsys):
    assert update(check=True) == 0, capsys.readouterr().out


def test_blocks_are_replaced_between_their_marks():
    table = pd.DataFrame({"name": [r"\1", "b"], "count": [1, 20], "text": ["1.50", "+1 [0, 2]"]})
    text = "a\n<!-- x -->\nold \\1\n<!-- end of x -->\nb\n"
    new = replace_block(text, "x", table)
    lines = [line.replace(" ", "") for line in new.splitlines()]
    rows = ["|name|count|text|", r"|\1|1|1.50|", "|b|20|+1[0,2]|"]
    assert [lines[k] for k in (2, 4, 5)] == rows
    assert lines[3].count("-:|") == 1  # numbers are right-aligned
    assert (lines[:2], lines[6:]) == (["a", "<!--x-->"], ["<!--endofx-->", "b"])
    assert replace_block(new, "x", table) == new
    for broken in (text.replace("end of", "end"), text + text, "", text[::-1]):
        with pytest.raises(ValueError, match=r"<!-- x -->.*once each"):
            replace_block(broken, "x", table)
