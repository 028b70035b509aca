"""Every script's `main`, on a small tree, as a user would call it."""

import base64
import io
import json
import os
import re
import runpy
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, SMALL, run
from PIL import Image, ImageColor

from backbones import create_classifier
from backbones.weights import load_weights
from utils import plotting
from utils.cli import EXIT_CODES


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("scripts/*.py")))
def test_help_lists_the_exit_codes_of_the_docs(script, capsys):
    assert run(script, "--help") == 0
    assert EXIT_CODES in capsys.readouterr().out
    assert EXIT_CODES in (ROOT / "docs" / "reliability.md").read_text()


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    assert run("train.py", "--data-dir", folders, "--output-dir", run_dir, *SMALL) == 0
    return run_dir


def test_train_leaves_a_whole_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.json", "metrics.csv", "speed.csv", "last.pt", "best.pt", "curves.png"}
    config = json.loads((trained / "config.json").read_text())
    assert config["recipe"]["epochs"] == 2
    assert config["backbone"] == "cspdarknet19"
    assert config["command"].startswith("python ")
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_train_prints_both_accuracies_and_the_folder(trained, folders, capsys):
    """The same command on a finished run trains nothing and says the same again."""
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
    """All validation images at once, by the averaged weights."""
    images = sorted((folders / "val").glob("*/*.JPEG"))
    args = [*images, "--checkpoint", trained / "last.pt", "--device", "cpu", "--json"]
    assert run("predict.py", *args) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["image"] for each in found] == [str(image) for image in images]
    for each in found:
        assert set(each) == {"image", "predictions"}
        shares = [row["probability"] for row in each["predictions"]]
        assert sorted(shares, reverse=True) == shares  # all three classes
        assert sum(shares) == pytest.approx(1)
        assert all(row["name"] == row["class"] for row in each["predictions"])
    right = [
        each["predictions"][0]["class"] == image.parent.name
        for each, image in zip(found, images, strict=True)
    ]
    row = pd.read_csv(trained / "metrics.csv").iloc[-1]
    assert 100 * sum(right) / len(right) == pytest.approx(row.ema_val_top1_pct)


def test_predict_prints_words_at_other_sizes(trained, folders, tmp_path, capsys):
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n00000000 red, carmine\nn00000001 green\nn00000002 blue\n")
    image = folders / "val" / "n00000000" / "0.JPEG"
    args = [image, image, "--checkpoint", trained / "last.pt", "--synset-mapping", mapping]
    assert run("predict.py", *args, "--size", 48) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == lines[4:]
    assert lines[0] == str(image)
    assert any(re.fullmatch(r" +\d+\.\d\d %  n00000000  red, carmine", line) for line in lines[1:4])
    mapping.write_text("n00000000 red\nn00000001 green\n")
    assert run("predict.py", *args) == 1
    assert "has no words for n00000002, a class of the run" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("classifier", [False, True], ids=["backbone", "classifier"])
def test_export_takes_the_averaged_weights(trained, tmp_path, capsys, classifier):
    path, images = tmp_path / "net.pt2", torch.randn(2, 3, 64, 96)
    args = ["--checkpoint", trained / "last.pt", "--output", path]
    args += ["--classifier"] if classifier else ["--options", '{"out_indices": [2, -1]}']
    path.write_text("an older one")
    assert run("export.py", *args) == 2
    assert "is there already" in capsys.readouterr().err
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


def test_export_of_a_backbone_by_name_and_weights(trained, tmp_path):
    """To ONNX; a run's checkpoint is a file of weights, too."""
    path, options = tmp_path / "net.onnx", '{"width": 0.125, "out_indices": [1]}'
    args = ["--backbone", "cspdarknet19", "--options", options, "--output", path]
    assert run("export.py", *args, "--weights", trained / "last.pt") == 0
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("script", "args", "code", "words"),
    [
        ("train.py", ["--data-dir", "nowhere"], 2, "nowhere is not a folder"),
        ("train.py", ["--backbone", "darknet35"], 2, "'darknet35'; nearest: darknet53"),
        ("train.py", ["--epochs", "-1"], 2, "epochs=-1 must be at least 1"),
        ("train.py", ["--batch-size", "4096"], 2, "batch_size=4096 is more than the 48"),
        ("train.py", ["--device", "cuda:99"], 2, "device='cuda:99'"),
        ("train.py", ["--seed", "-1"], 2, "--seed: '-1' must be a whole number, at least 0"),
        ("train.py", ["--workers", "-1"], 2, "--workers: '-1' must be a whole number, at least 0"),
        ("train.py", ["--sync-batchnorm", "--device", "cpu"], 2, "sync_batchnorm=True needs GPUs"),
        ("evaluate.py", ["--checkpoint", "nothing.pt"], 2, "nothing.pt: no such checkpoint"),
        ("evaluate.py", ["--checkpoint", __file__], 1, "not a checkpoint"),
    ],
)
def test_a_mistake_is_one_clear_line(folders, tmp_path, capsys, script, args, code, words):
    defaults = ["--data-dir", folders]
    if script == "train.py":
        defaults += ["--output-dir", tmp_path / "run", *SMALL]
    assert run(script, *defaults, *args) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert words in error[0]
    assert not (tmp_path / "run").exists()


def test_an_output_dir_that_is_a_file_is_one_clear_line(folders, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    args = ["--data-dir", folders, *SMALL, "--output-dir", tmp_path / "file"]
    assert run("train.py", *args) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "script",
    [
        *("train.py", "evaluate.py", "predict.py", "export.py", "imagenet.py", "make_shards.py"),
        *("ablate.py", "run_notebooks.py", "benchmark.py", "update_readme.py"),
    ],
)
def test_help_and_bad_usage(script, capsys):
    assert run(script, "--help") == 0
    assert "--" in capsys.readouterr().out
    assert run(script, "--no-such-option") == 2


def test_a_notebooks_chart_keeps_the_colours_of_its_lines():
    """Bands and edges alone would fill a small palette; with 64 colours two lines look alike."""
    curves = pd.read_csv(ROOT / "results" / "study_recipe_add_one_curves.csv")
    figure = plotting.plot_bands(curves, "epoch", {"held_out_top1_pct": ""}, "epoch")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    shrink = runpy.run_path(str(ROOT / "scripts" / "run_notebooks.py"))["shrink"]
    png = base64.b64decode(shrink(base64.b64encode(drawn.getvalue()).decode()))
    assert len(png) < len(drawn.getvalue()) / 2
    found = np.array(Image.open(io.BytesIO(png)).convert("RGB"), int)
    for style in plotting.LINES[: curves.value.nunique()]:
        assert abs(found - ImageColor.getrgb(style["color"])).max(2).min() < 8, style


def test_two_processes_train_as_one(folders, tmp_path, capsys):
    """torchrun with gloo: rank 0 writes, and every validation image counts once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "scripts" / "train.py"), "--data-dir"]
    command += [str(folders), "--output-dir", str(tmp_path / "run"), "--device", "cpu", *SMALL]
    command += ["--precision", "float32"]  # bf16 would round by batch
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation top-1") == 1
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert list(table.step) == [6, 12]
    counted = table.val_top1_pct * 18 / 100
    assert (counted - counted.round()).abs().max() < 1e-6
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    # What was reported is what was saved: all processes evaluate with the same statistics.
    checkpoint = ["--checkpoint", tmp_path / "run" / "last.pt", "--data-dir", folders]
    assert run("evaluate.py", *checkpoint, "--workers", 0, "--device", "cpu") == 0
    row, lines = table.iloc[-1], capsys.readouterr().out.splitlines()
    assert f"top-1 {row.val_top1_pct:.2f} %" in lines[0]
    assert f"top-1 {row.ema_val_top1_pct:.2f} %" in lines[1]
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert losses == pytest.approx([row.val_loss, row.ema_val_loss], rel=1e-3)
