"""Every script's `main` on a small tree, as a user would call it, and the mistakes users make."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from helpers import ROOT, SMALL, run, small_disk
from safetensors import safe_open
from safetensors.torch import load_file

from backbones import create_classifier
from backbones.deploy import NamedOutputs
from backbones.weights import load_weights
from utils.cli import EXIT_CODES, exit_code
from utils.data.folders import Key, open_folders
from utils.data.transforms import MEAN_RGB, STD_RGB
from utils.exporting import export
from utils.training.checkpoint import load_trained

TRAIN = ["--data-dir", "data", "--output-dir", "new", *SMALL, "--device", "cpu"]
EVALUATE = ["--checkpoint", "done/last.pt", "--data-dir", "data", "--workers", 0]
IMAGE = "data/train/n00000000/0.JPEG"


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("scripts/*.py")))
def test_help_and_unknown_options(script, capsys):
    assert run(script, "--help") == 0
    assert EXIT_CODES in capsys.readouterr().out
    assert run(script, "--no-such-option") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture(scope="session")
def trained(folders, tmp_path_factory):
    """The folder of a finished run of scripts/train.py; read only."""
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    assert run("train.py", "--data-dir", folders, "--output-dir", run_dir, *SMALL) == 0
    return run_dir


def test_train_writes_a_complete_run_folder(trained, folders, capsys):
    """The same command on a finished run trains nothing and prints its result again."""
    names = {path.name for path in trained.iterdir()} - {".lock"}
    assert names == {"config.json", "metrics.csv", "speed.csv", "last.pt", "best.pt", "curves.png"}
    config = json.loads((trained / "config.json").read_text())
    assert config["recipe"]["epochs"] == 2
    assert config["backbone"] == "cspdarknet19"
    before = (trained / "last.pt").stat().st_mtime_ns
    assert run("train.py", "--data-dir", folders, "--output-dir", trained, *SMALL) == 0
    row = pd.read_csv(trained / "metrics.csv").iloc[-1]
    out = capsys.readouterr().out
    assert f"raw {row.val_top1_pct:.2f} %, EMA {row.ema_val_top1_pct:.2f} %" in out
    assert str(trained / "curves.png") in out
    assert (trained / "last.pt").stat().st_mtime_ns == before


def test_evaluate_agrees_with_the_run_and_takes_other_sizes(trained, folders, capsys):
    checkpoint = ["--checkpoint", trained / "last.pt", "--data-dir", folders, "--workers", 0]
    assert run("evaluate.py", *checkpoint) == 0
    row = pd.read_csv(trained / "metrics.csv").iloc[-1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"raw: top-1 {row.val_top1_pct:.2f} %")
    assert lines[1].startswith(f"EMA: top-1 {row.ema_val_top1_pct:.2f} %")
    assert run("evaluate.py", *checkpoint, "--size", 48) == 0
    assert "(18 images)" in capsys.readouterr().out


def test_predict_is_right_as_often_as_the_run_says(trained, folders, capsys):
    """All validation images at once, by the EMA weights."""
    images = sorted((folders / "val").glob("*/*.JPEG"))
    args = [*images, "--checkpoint", trained / "last.pt", "--device", "cpu", "--json"]
    assert run("predict.py", *args) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found] == [str(image) for image in images]
    shares = pd.DataFrame([row["probability"] for row in each["predictions"]] for each in found)
    assert (shares.sum(axis=1) - 1).abs().max() < 1e-5  # all three classes
    correct = [
        each["predictions"][0]["class"] == image.parent.name
        for each, image in zip(found, images, strict=True)
    ]
    row = pd.read_csv(trained / "metrics.csv").iloc[-1]
    assert 100 * sum(correct) / len(correct) == pytest.approx(row.ema_val_top1_pct)


def test_predict_prints_words_at_other_sizes(trained, folders, tmp_path, capsys):
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n00000000 red, carmine\nn00000001 green\nn00000002 blue\n")
    image = folders / "val" / "n00000000" / "0.JPEG"
    args = [image, image, "--checkpoint", trained / "last.pt", "--class-names", mapping]
    assert run("predict.py", *args, "--size", 48) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == lines[4:]
    assert lines[0] == str(image)
    assert any(re.fullmatch(r" +\d+\.\d\d %  n00000000  red, carmine", line) for line in lines[1:4])


@torch.no_grad()
@pytest.mark.parametrize("classifier", [False, True], ids=["backbone", "classifier"])
def test_export_takes_the_ema_weights(trained, tmp_path, capsys, classifier):
    path, images = tmp_path / "net.pt2", torch.randn(2, 3, 64, 96)
    args = ["--checkpoint", trained / "last.pt", "--output", path]
    args += ["--classifier"] if classifier else ["--option", "out_indices=2,-1"]
    path.write_text("an older one")
    assert run("export.py", *args) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("export.py", *args, "--overwrite") == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    net = create_classifier("cspdarknet19", 3, width=0.125)
    load_weights(net, trained / "last.pt", entry="ema")
    net.eval()
    expected = {"logits": net(images)}
    if not classifier:
        maps = net.backbone(images)
        expected = {"stride_8": maps[2], "stride_32": maps[4]}
    found = torch.export.load(path).module()(images)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_export_of_a_classifiers_weights_alone(trained, tmp_path):
    """With the sizes of the recipe; then again from that file, with other names of the classes."""
    names, paths = tmp_path / "names.txt", [tmp_path / f"{name}.safetensors" for name in "ab"]
    names.write_text("ant\nbee\ncat\n")
    args = ["--checkpoint", trained / "last.pt", "--classifier", "--output", paths[0]]
    assert run("export.py", *args) == 0
    assert paths[0].stat().st_size < (trained / "last.pt").stat().st_size / 2.5
    args = ["--backbone", "cspdarknet19", "--option", "width=0.125", "--weights", paths[0]]
    args += ["--classifier", "--class-names", names, "--output", paths[1]]
    assert run("export.py", *args) == 0
    found = []
    for path in paths:
        with safe_open(path, "pt") as file:
            found.append(file.metadata())
    assert (found[0]["eval_resize_px"], found[0]["eval_crop_px"]) == ("36", "32")
    classes = json.loads((trained / "config.json").read_text())["classes"]
    assert [json.loads(each.pop("classes")) for each in found] == [classes, classes]
    assert json.loads(found[1]["class_names"]) == ["ant", "bee", "cat"]
    states = [load_file(path) for path in paths]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_eight_bits_and_what_they_cost(trained, folders, tmp_path, capsys):
    """Kernels are 8-bit integers; the accuracy of the file is that of its own predictions."""
    path, checkpoint = tmp_path / "net.onnx", ["--checkpoint", trained / "last.pt"]
    options = ["--classifier", "--optimize", "--int8", folders / "train", "--output", path]
    assert run("export.py", *checkpoint, *options) == 0
    assert "int8 weights and activations calibrated on 48 images" in capsys.readouterr().out
    kernels = [each for each in onnx.load(path).graph.initializer if len(each.dims) == 4]
    assert {each.data_type for each in kernels} == {onnx.TensorProto.INT8}
    options = ["--data-dir", folders, "--workers", 0, "--device", "cpu", "--exported", path]
    assert run("evaluate.py", *checkpoint, *options) == 0
    (line,) = re.findall(r"net.onnx: top-1 ([\d.]+) %", capsys.readouterr().out)
    val = open_folders(folders, load_trained(trained / "last.pt").recipe).val
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN_RGB, STD_RGB))
    images, labels = zip(*(val[Key(0, index)] for index in range(len(val))), strict=True)
    batch = (torch.stack(images) - mean) / std
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"images": batch.numpy()})
    assert float(line) == pytest.approx(100 * (logits.argmax(1) == labels).mean(), abs=0.01)


def test_exported_classifiers_are_evaluated(trained, folders, tmp_path, capsys):
    """In float32, with the loss of the EMA weights; one of other classes is an error."""
    path, checkpoint = tmp_path / "net.pt2", ["--checkpoint", trained / "last.pt"]
    assert run("export.py", *checkpoint, "--classifier", "--output", path) == 0
    options = [*checkpoint, "--data-dir", folders, "--workers", 0, "--device", "cpu"]
    options += ["--size", 64]  # exported networks take images above 32 pixels
    assert run("evaluate.py", *options, "--exported", path) == 0
    found = re.findall(r"(EMA|net.pt2): .* loss ([\d.]+)", capsys.readouterr().out)
    losses = {name: float(loss) for name, loss in found}
    assert losses["net.pt2"] == pytest.approx(losses["EMA"], rel=0.01)
    other = NamedOutputs(create_classifier("cspdarknet19", 2, width=0.125)).eval()
    export(other, path, overwrite=True)
    assert run("evaluate.py", *options, "--exported", path) == 1
    assert "net.pt2: gives {'logits': 2}, not 3 logits" in capsys.readouterr().err


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def here(folders, trained, tmp_path, monkeypatch):
    """A working directory with `data`, the finished run `done`, and a file `words.csv`."""
    for source, name in ((folders, "data"), (trained, "done")):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "words.csv").write_text("ImageId,PredictionString\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def broken_image():
    Path(IMAGE).write_bytes(Path(IMAGE).read_bytes()[:-300])


def strange_broken_image():
    Path(IMAGE).with_name("a\nb\udce9.JPEG").write_bytes(b"no image")


PREDICT = [IMAGE, "--checkpoint", "done/last.pt"]
BY_NAME = ["--backbone", "cspdarknet19", "--output", "new.pt2"]
# name: what is done before, script, arguments, exit code, words of the one line
MISTAKES = {
    "no folder": (None, "train.py", [*TRAIN, "--data-dir", "x"], 2, "x is not a folder"),
    "a tar for each argument": (
        None, "train.py", ["--data-dir", "a-0.tar", "a-1.tar"], 2, "quote the brace pattern"
    ),
    "negative seed": (
        None, "train.py", [*TRAIN, "--seed", -1], 2, "--seed: '-1' must be an integer of at least 0"
    ),
    "bad recipe": (None, "train.py", [*TRAIN, "--epochs", -1], 2, "epochs=-1 must be at least 1"),
    "backbone": (
        None, "train.py", [*TRAIN, "--backbone", "darknet54"], 2, "'darknet54'; nearest: darknet53"
    ),
    "width": (None, "train.py", [*TRAIN, "--backbone", "resnet18"], 2, "takes no 'width'"),
    "device": (None, "train.py", [*TRAIN, "--device", "cuda:99"], 2, "device='cuda:99'"),
    "sync": (None, "train.py", [*TRAIN, "--sync-batchnorm"], 2, "sync_batchnorm=True needs GPUs"),
    "file as run": (None, "train.py", [*TRAIN, "--output-dir", "words.csv"], 2, "File exists"),
    "broken image": (broken_image, "train.py", TRAIN, 1, "0.JPEG: not a readable image"),
    "control characters in a name": (
        strange_broken_image, "train.py", [*TRAIN, "--batch-size", 49], 1, r"a\nb\udce9.JPEG: not"
    ),
    "no checkpoint": (
        None, "evaluate.py", [*EVALUATE, "--checkpoint", "x.pt"], 2, "x.pt: no such checkpoint"
    ),
    "no image": (None, "predict.py", [*PREDICT, "x.jpg"], 2, "x.jpg: no such image file"),
    "weights missing": (None, "export.py", [*BY_NAME, "--weights", "x.pt"], 2, "x.pt"),
    "weights broken": (None, "export.py", [*BY_NAME, "--weights", "words.csv"], 1, "words.csv"),
    "frozen random weights": (
        None, "train.py", [*TRAIN, "--freeze", 1], 2, "--freeze 1 would keep random weights"
    ),
    "two widths": (
        None, "train.py", [*TRAIN, "--option", "width=0.25"], 2, "--width and --option width=..."
    ),
    "option": (None, "export.py", [*BY_NAME, "--option", "[2]"], 2, "must be KEY=VALUE, such as"),
    "head": (None, "export.py", [*BY_NAME, "--classifier"], 2, "cspdarknet19 needs --weights"),
    "words of no head": (
        None, "export.py", [*BY_NAME, "--class-names", "words.csv"], 2, "is for --classifier"
    ),
    "int8": (None, "export.py", [*BY_NAME, "--int8", "data"], 2, "--int8 is for .onnx alone"),
    "nothing to calibrate on": (
        Path("empty").mkdir, "export.py", [*BY_NAME, "--int8", "empty"], 1, "empty: no image in"
    ),
    "int8 of grey images": (
        None, "export.py", [*BY_NAME, "--int8", "data", "--option", "in_channels=1"], 2, "for RGB"
    ),
    "opset": (None, "export.py", [*BY_NAME, "--opset", 18], 2, "--opset is for .onnx alone"),
    "notebook": (None, "run_notebooks.py", ["x.ipynb"], 2, "x.ipynb: no such notebook"),
    "no notebook": (None, "run_notebooks.py", ["words.csv"], 1, "words.csv: not a notebook"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(here, capsys, name):
    """Nothing is written but a run's config.json, from which it resumes."""
    prepare, script, args, code, words = MISTAKES[name]
    if prepare:
        prepare()
    before = {*here.rglob("*")}
    capsys.readouterr()
    assert run(script, *args) == code
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.strip() and "%|" not in line]  # no progress bar
    assert line.startswith("error: ")
    assert line.isprintable()
    assert words in line
    left = {str(path.relative_to(here)) for path in {*here.rglob("*")} - before}
    assert left <= {"new", "new/config.json", "new/.lock", "done/.lock"}


def test_a_presets_width_is_for_families_that_take_one(folders, capsys):
    args = ["--data-dir", folders, "--recipe", "quick", "--workers", 0, "--batch-size", 8]
    args += ["--backbone", "resnet18", "--train-crop-px", 32, "--dry-run"]
    assert run("train.py", *args) == 0
    assert "model: resnet18, 11.18 M parameters" in capsys.readouterr().out


def test_compiling_without_a_compiler_is_one_line(capsys):
    from torch._inductor import config  # slow to import

    with config.patch("cpp.cxx", (None, "no-compiler")):
        assert exit_code(lambda: torch.compile(torch.sin)(torch.ones(77))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch.compile failed (InvalidCxxCompiler: No working C++ ")
    assert line.endswith("; install a C++ compiler, or omit --compile")


def test_a_full_disk_is_one_line(here, capsys):
    with small_disk("disk", "8k"):
        Path("disk/full").write_bytes(bytes(8192))
        assert run("train.py", *TRAIN, "--output-dir", "disk/new") == 1
        assert "(No space left on device)" in capsys.readouterr().err
        assert run("export.py", *BY_NAME, "--output", "disk/net.pt2") == 1
        error = "net.pt2: cannot be written (No space left on device)"
        assert error in capsys.readouterr().err


def test_two_processes_train_as_one(folders, tmp_path, capsys):
    """torchrun with Gloo: rank 0 writes, and every validation image counts once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "scripts" / "train.py"), "--data-dir"]
    command += [str(folders), "--output-dir", str(tmp_path / "run"), "--device", "cpu", *SMALL]
    command += ["--precision", "float32"]  # bf16 would round by batch
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation top-1") == 1
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert list(table.step) == [6, 12]
    counted = table.val_top1_pct * 18 / 100
    assert (counted - counted.round()).abs().max() < 1e-6
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    # The reported accuracy is that of the saved weights: all processes use the same statistics.
    checkpoint = ["--checkpoint", tmp_path / "run" / "last.pt", "--data-dir", folders]
    assert run("evaluate.py", *checkpoint, "--workers", 0, "--device", "cpu") == 0
    row, lines = table.iloc[-1], capsys.readouterr().out.splitlines()
    assert f"top-1 {row.val_top1_pct:.2f} %" in lines[0]
    assert f"top-1 {row.ema_val_top1_pct:.2f} %" in lines[1]
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert losses == pytest.approx([row.val_loss, row.ema_val_loss], rel=1e-3)
