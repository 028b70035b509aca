"""Records in, Markdown tables out: what the README shows of them."""

import re

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table of the frame's columns; those of numbers are right-aligned."""
    cells = table.astype(str).map(lambda cell: cell.replace("|", r"\|"))
    numbers = [cells[name].str.fullmatch(r"[\d.,]+").all() for name in cells]
    rows = [list(map(str, cells)), ["---:" if each else "---" for each in numbers], *cells.values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def model_table(facts: pd.DataFrame) -> str:
    """Every backbone with its default options, in the order of the record.

    Args:
        facts: tests/backbone_facts.csv.
    """
    facts = facts[facts.options == "{}"]
    return markdown(
        pd.DataFrame(
            {
                "name": "`" + facts.name + "`",
                "parameters (M)": [f"{count / 1e6:.1f}" for count in facts.parameters],
                "GMACs": [f"{gmacs:.2f}" for gmacs in facts.gmacs_224],
                "channels at strides 2, 4, 8, 16, 32": facts.channels.str.replace(" ", ", "),
            }
        )
    )


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the two comments do not stand there once each.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs {begin.strip()!r} and then {end!r}, once each")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}{content}\n{end}", text, flags=re.DOTALL)
