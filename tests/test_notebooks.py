"""The rules of the notebooks, checked without running them."""

import ast
import re

import nbformat
import pytest
from helpers import ROOT
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
    assert [index for index, each in enumerate(tags) if "parameters" in each] == [1]


def test_cells_are_short_and_import_in_one_place(code):
    for index, cell in enumerate(code):
        written_out = re.search(r"^class |\.backward\(\)", cell.source, re.MULTILINE)
        max_lines = 25 if written_out else 15
        assert len(cell.source.splitlines()) <= max_lines or not index, cell.source
        for node in ast.walk(ast.parse(re.sub(r"(?m)^ *[%!].*$", "", cell.source))):
            assert not isinstance(node, ast.Import | ast.ImportFrom) or not index, cell.source


def test_the_first_screen_answers_the_question(path, cells, code):
    """Its question is README's; its numbers are printed or drawn as a table below."""
    (question,) = re.findall(r"\*\*(.+?\?)\*\*", cells[0].source)
    assert f"({path.relative_to(ROOT)}) | {question} |" in (ROOT / "README.md").read_text()
    assert re.search(r"!\[[^\]]{20,}\]\(\.\./docs/[\w/]+\.(svg|png)\)", cells[0].source)
    assert re.search(r"Last run: [1-9]\d* s on (one core|two cores)", cells[0].source)
    answers = re.findall(r"(?m)^- (?:.+\n)+?(?=- |\n)", cells[0].source)
    assert len(answers) >= 3
    outputs = str([output for cell in code for output in cell.outputs])
    for number in re.findall(r"(?<![\w.-])[+-]?\d[\d.,]*\d(?![\w-])", "".join(answers)):
        assert number in outputs, number


def test_text_has_its_parts_and_no_measured_numbers(path, cells):
    """Percentages and rates of a run are printed by cells."""
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert re.match(rf"# {path.name[:2]} \w", texts[0])
    titles = ["What we found", "What this does not show", "Exercises"]
    assert re.findall(r"(?m)^## (.+)$", texts[-1]) == titles
    assert texts[-1].count("<details><summary>Hint</summary>") == 2
    assert not re.search(r"\d+(\.\d+)? ?(%|images/s)", "\n".join(texts[1:]))
    links = re.findall(r"\]\((?!http)([^)#]+)\)", "\n".join(texts))
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
    first, end = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source, '"retina"\n\n'
    assert code[0].source.startswith(first[: first.index(end) + len(end)])
    assert not code[0].outputs
    assert re.search(rf"!git clone .*{URL}$", first, re.MULTILINE)
    (packages,) = re.findall(r"%pip install -q -e \.\. (.*)", first)
    lab = {Requirement(line).name for line in PROJECT["optional-dependencies"]["lab"]}
    assert set(packages.split()) <= lab


def test_outputs_read_well(path, code):
    """Of moderate size, no paths, object names or row numbers; pictures have their captions."""
    assert path.stat().st_size < 1_000_000
    for output in (output for cell in code for output in cell.outputs):
        data = output.get("data", {})
        pictures = {"image/png", "image/jpeg"} & set(data)
        assert set(data) <= {"text/plain", "text/html", *pictures}
        assert all(output.metadata[kind].alt for kind in pictures)  # by scripts/run_notebooks.py
        assert not re.search(r"/(home|root|Users|tmp|work)/", str(output))
        text = data.get("text/plain", "") if len(data) == 1 else output.get("text", "")
        assert not re.search(r"<Figure size|<[^>]* at 0x|^None$|^\[<", text), text
        assert not re.search(r"<tbody>\s*<tr>\s*<th>0</th>", data.get("text/html", ""))
        assert "...</td>" not in data.get("text/html", "")  # shortened by pandas
