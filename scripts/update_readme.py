"""Writes README.md's tables from the records that they stand for.

    python scripts/update_readme.py
    python scripts/update_readme.py --check

With --check nothing is written, and the exit status is 1 if a table is not its record's.
"""

import sys
from pathlib import Path

import pandas as pd

from utils import findings, speed, tables
from utils.errors import Parser
from utils.runs import write_whole
from utils.studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]


def updated(readme: str) -> str:
    """README.md's text with all tables made anew."""
    facts = pd.read_csv(ROOT / "tests" / "backbone_facts.csv")
    compared = pd.read_csv(ROOT / "results" / "feature_maps_compared.csv")
    full_size = findings.read_costs(224)
    blocks = {
        "models": tables.model_table(facts),
        "comparison": tables.markdown(compared.drop(columns="what was tried")),
        "recipe": tables.markdown(findings.recipe_table()),
        "fixres": tables.markdown(findings.fixres_table()),
        "length": tables.markdown(findings.length_table()),
        "speed": tables.markdown(speed.aims_table(speed.read_benchmark())),
    }
    for name in ("csp_split", "vovnet"):
        found = findings.study_table(STUDIES[name], findings.read_study(name), full_size)
        blocks[name] = tables.markdown(found)
    for name, content in blocks.items():
        readme = tables.replace_block(readme, name, content)
    return readme


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether tables are old")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    try:
        old = path.read_text()
        new = updated(old)
    except (OSError, ValueError) as error:
        print(f"error: {path.name}: {error}", file=sys.stderr)
        return 1
    if args.check:
        if new != old:
            print("README.md: tables are not those of the records; run scripts/update_readme.py")
        return int(new != old)
    write_whole(path, lambda aside: aside.write_text(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
