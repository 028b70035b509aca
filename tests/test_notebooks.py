"""The rules that let `pytest --nbval` mean something, checked without running a notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
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
    assert {path.name[:2] for path in NOTEBOOKS} >= {"01", "02", "03", "04", "05", "06", "07"}


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
    assert [code.index(cell) for cell in parameters] == [2]  # after imports and versions
    assert "nbval-ignore-output" in tags(code[1])


def test_cells_are_short_and_define_little(code):
    for cell in code:
        assert len(cell.source.splitlines()) <= 15 or cell is code[0], cell.source
        tree = ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.ClassDef), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, cell.source


def test_only_the_first_cell_imports(code):
    for cell in code[1:]:
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


def test_size(path):
    assert path.stat().st_size < 500_000
