"""The parameters of notebooks: a wrong value ends in one line, and papermill sets right ones."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT, run_check
from IPython.core.interactiveshell import InteractiveShell

from utils import notebook
from utils.recipe import DetectorRecipe

# A call, its arguments, and words of the line.
WRONG = [
    (notebook.validate_choice, (["a", "b"],), {"x": "c"}, "x='c' must be one of a, b"),
    (notebook.validate_choices, (["a", "b"],), {"x": "a"}, "x='a' must be a list of some of a, b"),
    (notebook.validate_choices, (["a"],), {"x": ["a", "c"]}, "x[1]='c' must be one of a"),
    (notebook.validate_choices, (["a"],), {"x": ["a", "a"]}, "must be a list of different names"),
    (notebook.validate_int, (2, 9), {"x": 1}, "x=1 must be an integer from 2 to 9"),
    (notebook.validate_int, (0, 9), {"x": True}, "x=True must be an integer"),
    (notebook.make_recipe, ("quick", 0), {}, "epochs=0 must be an integer from 1"),
    (notebook.make_recipe, ("quick",), {"batch_size": "16"}, "batch_size='16' must be of type int"),
    (notebook.data_folder, (0,), {}, "data_dir=0 must be the path of a folder"),
    (notebook.boxes_folder, ("nowhere",), {}, "data_dir='nowhere': nowhere: no such folder"),
    (notebook.checkpoint_file, ("none.pt",), {}, "'none.pt': none.pt: no such checkpoint"),
]


@pytest.mark.parametrize(("validate", "args", "values", "line"), WRONG)
def test_a_wrong_value_ends_in_one_line(validate, args, values, line):
    with pytest.raises(notebook.ParameterError, match=re.escape(line)) as caught:
        validate(*args, **values)
    assert "\n" not in str(caught.value)


def test_jupyter_shows_the_line_alone(capsys):
    names = [f"vovnet{k}" for k in range(20)]
    code = f"from utils import notebook; notebook.validate_choice({names}, backbone='vovnet')"
    InteractiveShell.instance().run_cell(code)
    (shown,) = capsys.readouterr().out.strip().splitlines()
    assert shown == "ParameterError: backbone='vovnet' must be one of vovnet9, vovnet8, vovnet7"


@pytest.mark.parametrize(
    ("number", "values", "line"),
    [
        ("03", {"backbone": "vovnet3"}, "backbone='vovnet3' must be one of vovnet39"),
        ("03", {"backbone": "resnet18"}, "resnet18 takes no 'width'"),
        ("04", {"backbone": "vovnet39"}, "one of cspdarknet19, cspdarknet53: no other has a split"),
        ("05", {"backbone": "cspdarknet19"}, "must be one of vovnet19_slim, vovnet39, vovnet57"),
        ("06", {"tricks": ["CutMx"]}, "tricks[0]='CutMx' must be one of"),
        ("08", {"classifier_epochs": 0}, "classifier_epochs=0 must be an integer"),
    ],
)
def test_notebooks_validate_their_parameters(number, values, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        run_check(number, **values)


@pytest.mark.parametrize("number", ["03", "04", "05", "06"])
def test_right_values_pass(folders, number, monkeypatch):
    """Of every training notebook: its defaults and another recipe; nothing is written."""
    monkeypatch.setenv("HOME", str(folders.parent))
    names = run_check(number, data_dir=f"~/{folders.name}")
    assert names["data_dir"] == folders
    assert names["run_dir"].name.startswith(f"{number}-")
    assert not names["run_dir"].exists()
    values = {"data_dir": str(folders), "recipe": "imagenet", "batch_size": 8, "epochs": 2}
    chosen = run_check(number, **values)["chosen"]
    assert (chosen.batch_size, chosen.epochs) == (8, 2)
    assert chosen.warmup_epochs <= 1


def test_the_warm_up_of_a_short_run_is_half_of_it():
    assert notebook.make_recipe("imagenet", 3).warmup_epochs == 1.5
    assert notebook.make_recipe("imagenet").warmup_epochs == 5
    assert notebook.make_detector_recipe(1) == DetectorRecipe(epochs=1, warmup_epochs=0.5)


def test_a_folder_that_is_not_the_layout(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(notebook.ParameterError, match="val is missing"):
        notebook.data_folder(str(tmp_path))
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(notebook.ParameterError, match="holds one class, a; two are the least"):
        notebook.data_folder(str(tmp_path))
    with pytest.raises(notebook.ParameterError, match="a detector needs boxes in COCO's format"):
        notebook.boxes_folder(tmp_path)


def test_a_folder_of_other_files_is_no_output(tmp_path):
    assert notebook.run_folder(str(tmp_path), "03", "config.json") == tmp_path  # empty
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(notebook.ParameterError, match="holds other files and no run"):
        notebook.run_folder(tmp_path, "03", "config.json")
    (tmp_path / "config.json").touch()
    assert notebook.run_folder(str(tmp_path), "03", "config.json") == tmp_path


def test_papermill_trains_on_a_folder(folders, tmp_path):
    """Three classes of colour, a VoVNet: each cell runs, and the run is as asked."""
    values = {"data_dir": folders, "output_dir": tmp_path / "run", "backbone": "vovnet19_slim"}
    values |= {"epochs": 4, "batch_size": 8, "width": 0.125}
    given = [word for key, value in values.items() for word in ("-p", key, str(value))]
    path, output = ROOT / "notebooks" / "03_train_cspdarknet.ipynb", tmp_path / "out.ipynb"
    subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(output), "--no-progress-bar", *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    cells = nbformat.read(output, as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["backbone"], config["recipe"]["epochs"]) == ("vovnet19_slim", 4)
    assert len(config["classes"]) == 3
