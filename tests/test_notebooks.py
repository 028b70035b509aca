"""The rules of the notebooks, checked without running them."""

import ast
import re
from base64 import b64decode

import nbformat
import pytest
from helpers import ROOT
from nbconvert import HTMLExporter
from packaging.requirements import Requirement
from test_project import PROJECT

URL = PROJECT["urls"]["Repository"]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


@pytest.fixture
def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def test_cells_were_executed_in_order_without_errors(code):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_outputs_are_compared_and_no_cell_is_skipped(code):
    tags = [cell.metadata.get("tags", []) for cell in code]
    assert sum("nbval-ignore-output" in each for each in tags) <= len(code) / 5
    assert {tag for each in tags for tag in each} <= {"nbval-ignore-output", "parameters"}
    assert not re.search(r"NBVAL_|nbval", "\n".join(cell.source for cell in code))
    # After Colab's cell, the imports and the versions, which differ between machines.
    assert [index for index, each in enumerate(tags) if "parameters" in each] == [3]
    assert "nbval-ignore-output" in tags[2]


def test_cells_are_short_and_import_in_one_place(code):
    for index, cell in enumerate(code):
        assert len(cell.source.splitlines()) <= 15 or index == 1, cell.source
        for node in ast.walk(ast.parse(re.sub(r"(?m)^ *[%!].*$", "", cell.source))):
            assert not isinstance(node, ast.ClassDef), cell.source
            assert not isinstance(node, ast.Import | ast.ImportFrom) or index < 2, cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 5, cell.source


def test_text_has_its_parts_and_no_measured_numbers(path, cells):
    """Percentages and rates of a run are printed by cells."""
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.match(rf"# {path.name[:2]} \w", text)
    assert "## What this does not show" in text
    assert not re.search(r"\d+(\.\d+)? ?(%|images/s)", text)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links
    assert all((path.parent / link).exists() for link in links)


def test_the_colab_badge(path, cells):
    target = URL.replace("github.com", "colab.research.google.com/github")
    target += f"/blob/main/notebooks/{path.name}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"\n\n[![Open in Colab]({image})]({target})\n\n" in cells[0].source
    assert f"]({target})" in (ROOT / "README.md").read_text()


def test_the_first_cell_sets_up_colab(code):
    """The same in every notebook: clones this repository, installs what Colab lacks of `lab`."""
    first = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert (code[0].source, code[0].outputs) == (first, [])
    assert re.search(rf"!git clone .*{URL}$", first, re.MULTILINE)
    (packages,) = re.findall(r"%pip install -q -e \.\. (.*)", first)
    lab = {Requirement(line).name for line in PROJECT["optional-dependencies"]["lab"]}
    assert set(packages.split()) <= lab


def test_outputs_read_well(path, code):
    """No paths, object names or row numbers; of moderate size; nbconvert shows every picture."""
    assert path.stat().st_size < 1_000_000
    pictures = 0
    for output in (output for cell in code for output in cell.outputs):
        data = output.get("data", {})
        assert set(data) <= {"text/plain", "text/html", "image/png"}
        assert not re.search(r"/(home|root|Users|tmp|work)/", str(output))
        text = data.get("text/plain", "") if len(data) == 1 else output.get("text", "")
        assert not re.search(r"<Figure size|<[^>]* at 0x|^None$|^\[<", text), text
        assert not re.search(r"<tbody>\s*<tr>\s*<th>0</th>", data.get("text/html", ""))
        assert len(b64decode(data.get("image/png", ""))) < 400_000
        pictures += "image/png" in data
    page, _ = HTMLExporter().from_filename(path)
    assert len(re.findall(r"<img[^>]*data:image/png", page)) == pictures
    assert re.search(rf"<h1[^>]*>{path.name[:2]} ", page)
