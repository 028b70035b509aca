"""Executes notebooks from top to bottom and saves them with their outputs.

    python scripts/run_notebooks.py                  # all of notebooks/
    python scripts/run_notebooks.py notebooks/03*.ipynb

All committed outputs come from this script, never from cells that were run by hand.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import DataError, Parser

# isort: split
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from utils.records import write_atomic

ROOT = Path(__file__).resolve().parents[1]


def execute(path: Path) -> list[str]:
    """Runs a notebook in its own folder, saves it and returns what it wrote to stderr."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # not JSON, or not a notebook of any version
        raise DataError(f"{path}: not a notebook ({type(error).__name__})") from error
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata = {
        # No versions, which would differ between machines.
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    write_atomic(path, lambda temporary: nbformat.write(notebook, temporary))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text.strip() for output in outputs if output.get("name") == "stderr"]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    paths = parser.parse_args(argv).paths or sorted(ROOT.glob("notebooks/*.ipynb"))
    for path in paths:
        if not path.is_file():
            print(f"error: {path}: no such notebook", file=sys.stderr)
            return 2
    # As under pytest --nbval (conftest.py): one thread, and the checkout on the kernel's path.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    status = 0
    for path in paths:
        start_s = time.perf_counter()
        try:
            warnings = execute(path.resolve())
        except CellExecutionError as error:
            warnings = [f"{error.ename}: {error.evalue}"]
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
            continue
        print(f"{path.name}: {time.perf_counter() - start_s:.0f} s")
        for warning in warnings:
            print(f"error: {path.name}: {warning}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
