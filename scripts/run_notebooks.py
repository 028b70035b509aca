"""Executes notebooks from top to bottom and saves them with their outputs.

    python scripts/run_notebooks.py                  # all of notebooks/
    python scripts/run_notebooks.py notebooks/03*.ipynb

All committed outputs come from this script, never from cells that were run by hand.
"""

import io
import itertools
import os
import re
import sys
import time
from base64 import b64decode, b64encode
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import DataError, Parser, exit_code

# isort: split
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

from utils.records import write_atomic

ROOT = Path(__file__).resolve().parents[1]


def execute(path: Path) -> None:
    """Runs a notebook in its own folder and saves it; what it writes to stderr is an error."""
    if not path.is_file():
        raise ValueError(f"{path}: no such notebook")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # not JSON, or not a notebook of any version
        raise DataError(f"{path}: not a notebook ({type(error).__name__})") from error
    start_s = time.perf_counter()
    options = {"timeout": 1800, "record_timing": False, "coalesce_streams": True}
    options["resources"] = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, kernel_name="python3", **options).execute()
    except CellExecutionError as error:
        raise DataError(f"{path.name}: {error.ename}: {error.evalue}") from error
    elapsed = f"Last run: {time.perf_counter() - start_s:.0f} s"
    first = notebook.cells[0]
    first.source = re.sub(r"Last run: \d+ s", elapsed, first.source)
    for cell, below in itertools.pairwise(notebook.cells):
        _finish_pictures(cell.get("outputs", []), below.source)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}  # no versions
    write_atomic(path, lambda temporary: nbformat.write(notebook, temporary))
    print(f"{path.name}: {elapsed}")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    warnings = [output.text.strip() for output in outputs if output.get("name") == "stderr"]
    if warnings:
        raise DataError(f"{path.name}: {warnings[0]}")


def _finish_pictures(outputs: list[NotebookNode], text: str) -> None:
    """Makes photographs JPEG, and a caption that begins the text below the picture's alt text."""
    caption = re.match(r"\*([^*]+)\*", text)
    for output in outputs:
        content = output.get("data", {}).pop("image/png", None)
        if content is None:
            continue
        kind, look = "image/png", output.metadata.pop("image/png", {})
        png, jpeg = b64decode(content), io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(jpeg, "JPEG", quality=80, subsampling=0)
        if 2 * len(jpeg.getvalue()) < len(png):
            kind, content = "image/jpeg", b64encode(jpeg.getvalue()).decode()
        output.data[kind] = content
        output.metadata[kind] = {**look, **({"alt": caption[1]} if caption else {})}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    paths = parser.parse_args(argv).paths or sorted(ROOT.glob("notebooks/*.ipynb"))
    # As under pytest --nbval (conftest.py): one thread, and the checkout on the kernel's path.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)

    def execute_all() -> None:
        for path in paths:
            execute(path.resolve())

    return exit_code(execute_all)


if __name__ == "__main__":
    sys.exit(main())
