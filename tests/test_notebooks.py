"""The rules that let `pytest --nbval` mean something, checked without running a notebook."""

import ast
import re
import sys
import tomllib
from base64 import b64decode
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert import HTMLExporter
from packaging.requirements import Requirement

FOLDER = Path(__file__).parents[1] / "notebooks"
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
URL = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


@pytest.fixture
def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_notebooks():
    assert {path.name[:2] for path in NOTEBOOKS} >= {"01", "02", "03", "04", "05", "06", "07", "08"}


def test_cells_were_executed_in_order(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_no_errors_warnings_or_widgets_in_outputs(code):
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "image/png"}


def test_few_outputs_are_ignored_and_no_cell_is_skipped(code):
    ignored = [cell for cell in code if "nbval-ignore-output" in tags(cell)]
    assert len(ignored) <= len(code) / 5
    text = "\n".join(cell.source for cell in code)
    assert not re.search(r"NBVAL_|nbval", text)
    assert not {tag for cell in code for tag in tags(cell)} - {"nbval-ignore-output", "parameters"}


def test_one_parameter_cell(code):
    parameters = [cell for cell in code if "parameters" in tags(cell)]
    assert [code.index(cell) for cell in parameters] == [3]  # after Colab, imports and versions
    assert "nbval-ignore-output" in tags(code[2])


def test_cells_are_short_and_define_little(code):
    for cell in code:
        assert len(cell.source.splitlines()) <= 15 or cell is code[1], cell.source
        tree = ast.parse(re.sub(r"(?m)^ *[%!].*$", "", cell.source))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, cell.source


def test_only_one_cell_imports(code):
    assert code[0].source.startswith("import sys\n\n")  # Colab's, below
    for cell in code[2:]:
        assert not re.search(r"(?m)^\s*(import|from) ", cell.source), cell.source


def test_outputs_hold_no_path_of_a_machine(code):
    for cell in code:
        assert not re.search(r"/(home|root|Users|tmp|work)/", str(cell.outputs)), cell.source


def test_text_has_its_parts(path, cells):
    text = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert re.match(rf"# {path.name[:2]} \w", text[0])
    assert any("## What this does not show" in cell for cell in text)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", "\n".join(text))
    assert links
    assert all((FOLDER / link).exists() for link in links)


def test_no_measured_number_is_typed_into_prose(cells):
    """Percentages, times and counts of a run are printed by cells or read from records."""
    for cell in cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"\d+(\.\d+)? ?(%|images/s)", cell.source), cell.source


# ---- Colab --------------------------------------------------------------------------------------


def test_the_badge_leads_to_the_notebook(path, cells):
    """In the repository that pyproject names, by Colab's own addresses."""
    repository = URL.removeprefix("https://github.com/")
    target = (
        f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    )
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"\n\n[![Open in Colab]({image})]({target})\n\n" in cells[0].source
    assert f"]({target})" in (FOLDER.parent / "README.md").read_text()


def test_every_notebook_has_the_same_first_cell(code):
    assert code[0].source == nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert not code[0].outputs


def run_first_cell(code):
    """What it asks of the system and of IPython, each as one string."""
    asked = []
    shell = SimpleNamespace(
        system=asked.append, run_line_magic=lambda *words: asked.append(" ".join(words))
    )
    exec(TransformerManager().transform_cell(code[0].source), {"get_ipython": lambda: shell})
    return asked


def test_the_first_cell_does_nothing_elsewhere(code, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = sys.path.copy()
    assert run_first_cell(code) == []
    assert sys.path == before


def test_the_first_cell_sets_itself_up_on_colab(code, monkeypatch):
    """It clones what pyproject names and installs what Colab lacks of the lab."""
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    home, clone, folder, install = run_first_cell(code)
    assert home == "cd -q /content"
    assert clone.split()[-1] == URL
    assert folder == f"cd -q {Path(URL).name}/notebooks"
    assert install.startswith("pip install -q -e .. ")
    lab = {Requirement(line).name for line in PROJECT["optional-dependencies"]["lab"]}
    assert set(install.split()[5:]) <= lab
    assert sys.path[0] == f"/content/{Path(URL).name}"


# ---- as a page ----------------------------------------------------------------------------------


def test_sizes(path, code):
    assert path.stat().st_size < 500_000
    for output in (output for cell in code for output in cell.outputs):
        assert len(b64decode(output.get("data", {}).get("image/png", ""))) < 150_000


def test_no_output_is_the_name_of_an_object(code):
    """A figure, an address in memory, None, a list of what was drawn, where there is only text."""
    for cell in code:
        for output in cell.outputs:
            data = output.get("data", {})
            text = data.get("text/plain", "") if len(data) == 1 else output.get("text", "")
            assert not re.search(r"<Figure size|<[^>]* at 0x|^None$|^\[<", text), cell.source


def test_tables_have_no_row_numbers(code):
    """0, 1, 2 down the side of a table say nothing."""
    for cell in code:
        for output in cell.outputs:
            table = output.get("data", {}).get("text/html", "")
            assert not re.search(r"<tbody>\s*<tr>\s*<th>0</th>", table), cell.source


def test_it_becomes_a_page(path, code):
    """By nbconvert, as JupyterLab exports it: with its title and a picture for each of its own."""
    page, _ = HTMLExporter().from_filename(path)
    (title,) = re.findall(r"<h1[^>]*>(.*?)<", page)
    assert title.startswith(path.name[:2])
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(re.findall(r"<img[^>]*data:image/png", page)) == len(pictures)
