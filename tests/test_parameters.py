"""The parameters of notebooks: wrong values end in one line, and papermill sets right ones."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT, run_check

from utils import notebook
from utils.data import sample
from utils.data.imagenet import check_layout

TRAINING = ("03", "04", "05", "06")
STUDIES = ("04", "05", "06")

# name of the parameter, its value, what the line must say; for every training notebook
WRONG = [
    ("recipe", "imagnet", "recipe='imagnet' must be one of imagenet, small, large, quick"),
    ("recipe", None, "recipe=None must be one of"),
    ("recipe", ["quick"], "recipe=['quick'] must be one of"),
    ("epochs", 0, "epochs=0 must be a whole number"),
    ("epochs", 2.5, "epochs=2.5 must be a whole number"),
    ("epochs", "3", "epochs='3' must be a whole number"),
    ("epochs", True, "epochs=True must be a whole number"),
    ("epochs", 10**9, "epochs=1000000000 must be a whole number"),
    ("batch_size", 0, "batch_size=0 must be at least 1"),
    ("batch_size", "16", "batch_size='16' must be of type int"),
    ("data_dir", 0, "data_dir=0 must be the path of a folder"),
    ("data_dir", None, "data_dir=None must be the path of a folder"),
    ("data_dir", "nowhere", "data_dir='nowhere': nowhere is not a folder"),
    ("data_dir", "a\0b", "is not a folder"),
    ("output_dir", None, "output_dir=None must be the path"),
    ("output_dir", 3, "output_dir=3 must be the path"),
]
WRONG_IN = {
    "03": [
        ("backbone", "vovnet3", "backbone='vovnet3' must be one of vovnet39"),
        ("backbone", 39, "backbone=39 must be one of"),
        ("backbone", "resnet18", "resnet18 takes no 'width'"),
        ("width", 0, "width=0 must be above 0"),
        ("width", float("nan"), "width=nan must be a finite number"),
        ("seed", -1, "seed=-1 must be a whole number, 0 to 9223372036854775807"),
        ("seed", 2**63, "seed=9223372036854775808 must be a whole number"),
        ("seed", 1.0, "seed=1.0 must be a whole number"),
        ("seed", True, "seed=True must be a whole number"),
        ("workers", -1, "workers=-1 must be a whole number"),
        ("workers", "2", "workers='2' must be a whole number"),
    ],
    "04": [
        ("backbone", "vovnet39", "must be one of cspdarknet19, cspdarknet53: no other has a split"),
        ("width", "1", "width='1' must be a finite number"),
    ],
    "05": [
        ("backbone", "cspdarknet19", "must be one of vovnet19_slim, vovnet39, vovnet57, vovnet99"),
        ("width", True, "width=True must be a finite number"),
    ],
    "06": [
        ("backbone", "resnet50", "resnet50 takes no 'width'"),
        ("tricks", ["CutMx"], "tricks[0]='CutMx' must be one of"),
        ("tricks", "CutMix", "tricks='CutMix' must be a list"),
        ("tricks", [["CutMix"]], "tricks[0]=['CutMix'] must be one of"),
        ("tricks", ["CutMix", "CutMix"], "has 'CutMix' twice"),
        ("tricks", [], "tricks=[] must be a list"),
        ("tricks", None, "tricks=None must be a list"),
        ("epochs", 1, "epochs=1 must be a whole number, 2 to"),
    ],
}
OF_STUDIES = [
    ("seeds", 1, "seeds=1 must be a whole number, 2 to"),
    ("seeds", 2.0, "seeds=2.0 must be a whole number"),
    ("processes", 0, "processes=0 must be a whole number"),
    ("processes", "2", "processes='2' must be a whole number"),
    ("processes", 10**6, "processes=1000000 must be a whole number"),
]
CASES = [
    (notebook, *case)
    for notebook in TRAINING
    for case in WRONG + WRONG_IN[notebook] + OF_STUDIES * (notebook in STUDIES)
]


@pytest.mark.parametrize(("notebook", "name", "value", "line"), CASES)
def test_a_wrong_value_ends_in_one_line(folders, tmp_path, notebook, name, value, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        run_check(notebook, **{"data_dir": str(folders), name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("notebook", TRAINING)
def test_the_defaults_pass(folders, notebook):
    """With a folder instead of the sample; nothing is written."""
    names = run_check(notebook, data_dir=str(folders))
    assert names["data_dir"] == folders
    assert names["run_dir"].name.startswith(f"{notebook}-")
    assert not names["run_dir"].exists()


@pytest.mark.parametrize("notebook", TRAINING)
@pytest.mark.parametrize("recipe", ["imagenet", "small", "large"])
def test_every_recipe_passes(folders, notebook, recipe):
    values = {"recipe": recipe, "batch_size": 8, "epochs": 2}
    chosen = run_check(notebook, data_dir=str(folders), **values)["chosen"]
    assert (chosen.batch_size, chosen.epochs) == (8, 2)
    assert chosen.warmup_epochs <= 1


def test_the_backbones_of_the_command_line(folders):
    for number in ("03", "05", "06"):
        values = {"recipe": "imagenet", "backbone": "vovnet39"}
        names = run_check(number, data_dir=str(folders), **values)
        assert names["chosen"].batch_size == 1024
    run_check("03", data_dir=str(folders), backbone="resnet18", width=1.0)


def test_a_folder_that_is_not_the_layout(folders, tmp_path):
    for make, line in (
        (lambda root: (root / "train").mkdir(parents=True), "val is missing"),
        (lambda root: (root / "val" / "a").mkdir(parents=True), "classes in val/ and not in train"),
        (lambda root: (root / "train" / "a").mkdir(), "holds one class, a; two at least"),
    ):
        make(tmp_path)
        with pytest.raises(notebook.ParameterError, match=line):
            run_check("03", data_dir=str(tmp_path))


@pytest.mark.parametrize(("notebook", "ours"), [("03", "config.json"), ("05", "vovnet")])
def test_a_folder_of_other_files_is_no_output(folders, tmp_path, notebook, ours):
    values = {"data_dir": str(folders), "output_dir": str(tmp_path)}
    assert run_check(notebook, **values)["run_dir"] == tmp_path  # empty
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(notebook.ParameterError, match="holds other files and no run of this"):
        run_check(notebook, **values)
    with pytest.raises(notebook.ParameterError, match="is not a folder"):
        run_check(notebook, **{**values, "output_dir": str(tmp_path / "thesis.txt")})
    (tmp_path / ours).touch()
    assert run_check(notebook, **values)["run_dir"] == tmp_path


def test_a_path_in_the_home_folder(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders.parent))
    assert notebook.data_folder(f"~/{folders.name}") == folders


def test_two_at_once_share_one_sample(tmp_path):
    """Both find it whole and sorted, drawn once."""
    code = (
        "import functools, sys; from pathlib import Path; from utils import parameters, sample;"
        "sample.draw = functools.partial(sample.draw, train_per_class=8, val_per_class=4);"
        "parameters.SAMPLE = Path(sys.argv[1]); print(notebook.data_folder(''))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sample")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, **options) for _ in range(3)]
    ends = [(process.communicate(), process.returncode) for process in started]
    assert [code for _, code in ends] == [0, 0, 0], ends
    folder = tmp_path / "sample" / "ILSVRC" / "Data" / "CLS-LOC"
    assert len(check_layout(folder)) == len(sample.CLASSES)
    assert len(list(folder.glob("*/*/*.JPEG"))) == 12 * len(sample.CLASSES)


def papermill(notebook, output, **values):
    """A notebook run as from a shell in the repository; its code cells."""
    given = [word for key, value in values.items() for word in ("-p", key, str(value))]
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(path), str(output), "--no-progress-bar", *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    cells = nbformat.read(output, as_version=4).cells
    return done, [cell for cell in cells if cell.cell_type == "code"]


def test_papermill_trains_on_a_folder(folders, tmp_path):
    """Three classes of colour, one epoch of a VoVNet: each cell runs, and the run is as asked."""
    values = {"backbone": "vovnet19_slim", "epochs": 1, "batch_size": 8, "width": 0.125}
    done, cells = papermill(
        "03", tmp_path / "out.ipynb", data_dir=folders, output_dir=tmp_path / "run", **values
    )
    assert done.returncode == 0, done.stderr
    assert all(cell.execution_count for cell in cells)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["backbone"], config["recipe"]["epochs"]) == ("vovnet19_slim", 1)
    assert len(config["classes"]) == 3


def test_papermill_shows_the_line_of_a_wrong_value(tmp_path):
    done, cells = papermill("04", tmp_path / "out.ipynb", backbone="vovnet39")
    assert done.returncode != 0
    (error,) = (out for cell in cells for out in cell.outputs if out.output_type == "error")
    assert error.traceback == [
        "ParameterError: backbone='vovnet39' must be one of cspdarknet19, cspdarknet53: "
        "no other has a split"
    ]
