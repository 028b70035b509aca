"""From weights to the classes of another folder: heads, freezing, rates, splits, and new runs."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL, TINY, run
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mobilenet_v2

from backbones import create, create_classifier
from backbones.classifier import Classifier
from backbones.pretrained import published
from utils.data.folders import Preprocess, open_folders
from utils.training.checkpoint import load_checkpoint, load_published, load_trained
from utils.training.loop import (
    Trainer,
    estimate_norms,
    has_folded_norms,
    make_loaders,
    train_one_epoch,
)

TUNE = ["--recipe", "finetune", "--epochs", "3", *SMALL[4:-4], "--workers", "0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of torchvision's keys with a head for five classes."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "five.pth"
    torch.save(mobilenet_v2(num_classes=5).state_dict(), path)
    return path


def test_the_head_comes_with_the_weights(weights):
    theirs = mobilenet_v2(num_classes=5).eval()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    ours = create_classifier("mobilenet_v2", weights=weights).eval()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)
    new = create_classifier("mobilenet_v2", 3, weights=weights).eval()
    assert new(images).shape == (2, 3)
    torch.testing.assert_close(new.backbone(images), ours.backbone(images))
    headless = create("mobilenet_v2").state_dict()
    with pytest.raises(ValueError, match="a state dict: no head; num_classes adds a new one"):
        create_classifier("mobilenet_v2", weights=headless)


def trainer(recipe, **options):
    torch.manual_seed(0)
    model = Classifier(create("darknet19", width=0.125), 3)
    return Trainer(model, dataclasses.replace(TINY, **recipe), 6, 3, **options)


def test_frozen_stages_keep_everything_in_both_models(folders):
    """Weights, buffers and the EMA model's, while the rest moves; bit for bit."""
    recipe = {"freeze": 1, "optimizer": "adamw", "lr_per_1024": 0.05}
    ours = trainer(recipe)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    loader, _ = make_loaders(open_folders(folders, TINY), TINY, 0, torch.device("cpu"))
    train_one_epoch(ours, loader)
    for state in (ours.model.state_dict(), ours.ema.module.state_dict()):
        for name, value in state.items():
            is_frozen = name.startswith(("backbone.stem", "backbone.stages.0."))
            assert torch.equal(value, before[name]) == is_frozen, name


def test_statistics_of_folded_weights_are_estimated(folders):
    """The outputs stay the same; in training mode they are near to them, and were far before."""
    torch.manual_seed(0)
    model = create_classifier("darknet53", 3, width=0.125)
    assert has_folded_norms(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # without statistics, as if it were not there
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    data = open_folders(folders, TINY)
    images = Preprocess(torch.device("cpu"), TINY)(next(iter(data.train.train_loader(8, 0))))[0]
    with torch.no_grad():
        expected = model.eval()(images)
        far = copy.deepcopy(model).train()(images)
        assert estimate_norms(model, data, TINY) == 48
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-3, atol=1e-4)
        near = model.train()(images)
    assert (near - expected).norm() < 0.2 * (far - expected).norm()
    assert not has_folded_norms(model)


def test_the_backbones_rate_is_a_share_of_the_heads_in_every_step():
    ours = trainer({"backbone_lr_factor": 0.1})
    owner = {id(p): name for name, p in ours.model.named_parameters()}
    for _ in range(2):
        for group in ours.optimizer.param_groups:
            factors = {0.1 if owner[id(p)].startswith("backbone.") else 1 for p in group["params"]}
            assert factors == {group["lr"] / ours.lr_at(ours.step)}
        ours.optimizer.step()
        ours.schedule.step()
        ours.step += 1
    with pytest.raises(ValueError, match=r"are for a backbones\.Classifier"):
        Trainer(nn.Linear(2, 2), dataclasses.replace(TINY, freeze=0), 6, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_one_over_the_images_of_a_class(smoothing):
    recipe = {"class_weights": True, "label_smoothing": smoothing, "accumulate": 2}
    recipe |= {"cutmix_alpha": 0.0, "mixup_alpha": 0.0}
    ours = trainer(recipe, class_images=torch.tensor([10, 20, 70]))
    logits = torch.randn(8, 3, requires_grad=True)
    ours.net = lambda images: logits[images[:, 0, 0, 0].long()]
    labels = torch.tensor([0, 1, 2, 2, 2, 1, 2, 2])
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 2)
    loss = ours._backward(images, labels)
    logs = logits.log_softmax(1)
    targets = torch.eye(3)[labels] * (1 - smoothing) + smoothing / 3
    weight = 100 / 3 / torch.tensor([10, 20, 70])
    expected = -(logs * targets * weight).sum() / 8
    torch.testing.assert_close(loss, expected.detach())
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(logits.grad, gradient)
    with pytest.raises(ValueError, match="needs class folders"):
        trainer(recipe)


def test_a_split_is_held_out_where_there_is_no_val(folders, tmp_path):
    """Every fourth image of each class, the same ones in train/ and in bare class folders."""
    shutil.copytree(folders / "train", tmp_path / "a" / "train")
    shutil.copytree(folders / "train", tmp_path / "b")
    found = [open_folders(tmp_path / name, TINY, val_share=0.25) for name in "ab"]
    for data in found:
        assert (len(data.train), len(data.val), data.classes) == (36, 12, sorted(data.classes))
        assert np.bincount(data.val.labels).tolist() == [4, 4, 4]
        assert not {*data.train.names.tolist()} & {*data.val.names.tolist()}
    assert found[0].val.names.tolist() == found[1].val.names.tolist()
    with pytest.raises(ValueError, match="omit --val-share"):
        open_folders(folders, TINY, val_share=0.25)
    with pytest.raises(ValueError, match=r"with --val-share 0\.2 a folder of images"):
        open_folders(tmp_path / "a", TINY)


def test_images_that_a_run_did_not_hold_out_are_reported(folders, tmp_path, capsys):
    """One more image moves the split."""
    photos, first = shutil.copytree(folders / "train", tmp_path / "photos"), tmp_path / "first"
    data = ["--data-dir", photos, "--val-share", 0.25]
    assert run("train.py", *data, *SMALL, "--output-dir", first) == 0
    out = capsys.readouterr().out
    assert "data: 36 training and 12 validation images, 4 steps of 8 images per epoch; " in out
    assert "; classes: 3 (n00000000, n00000001, n00000002)" in out
    shutil.copy(next(photos.glob("n00000000/*")), photos / "n00000000" / "000.JPEG")
    words = "the run held out other images"
    evaluation = ["--checkpoint", first / "last.pt", "--workers", 0]
    more = ["--init-from", first / "last.pt", *TUNE, "--output-dir", tmp_path / "second"]
    (tmp_path / "again").symlink_to(photos)  # a warning is printed once
    assert run("evaluate.py", *data, *evaluation) == 0
    assert run("train.py", "--data-dir", tmp_path / "again", *data[2:], *more) == 0
    assert capsys.readouterr().err.count(words) == 2
    (photos / "n00000000" / "000.JPEG").unlink()
    assert run("evaluate.py", *data, *evaluation) == 0
    assert words not in capsys.readouterr().err


def test_the_normalization_classes_and_sizes_of_weights_are_used_and_kept(folders, tmp_path):
    """Of a run with another one: by what starts from it, and by its own evaluation."""
    half, first = ["--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5], tmp_path / "first"
    assert run("train.py", "--data-dir", folders, "--output-dir", first, *SMALL, *half) == 0
    assert load_trained(first / "last.pt").recipe.mean == (0.5, 0.5, 0.5)
    again = ["--data-dir", folders, "--output-dir", tmp_path / "again", *SMALL]
    assert run("train.py", *again, "--weights", first / "last.pt") == 0
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["recipe"]["mean"], config["recipe"]["std"]) == ([0.5] * 3, [0.5] * 3)
    names = tmp_path / "names.txt"  # their order is not that of the logits
    names.write_text("".join(f"n0000000{k} {'abc'[k]}\n" for k in (2, 1, 0)))
    source = "cspdarknet19", str(first / "last.pt"), {"width": 0.125}
    trained = load_published(*source, class_names=names)
    assert trained.classes == ["n00000000", "n00000001", "n00000002"]
    assert trained.recipe.eval_crop_px == 32


def test_published_weights_bring_options_to_the_run(folders, tmp_path, monkeypatch):
    """Its checkpoint makes the same network. The file, of which no hash is known, is made here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    row = published("vovnet39")["timm.ra_in1k"]
    path = tmp_path / "hub" / "checkpoints" / row.file_name
    path.parent.mkdir(parents=True)
    save_file(create("vovnet39", **row.options).state_dict(), path)
    args = ["--data-dir", folders, *TUNE, "--epochs", 1, "--warmup-epochs", 0, "--freeze", 4]
    args += ["--backbone", "vovnet39", "--weights", "timm.ra_in1k", "--output-dir", tmp_path / "x"]
    assert run("train.py", *args) == 0
    trained = load_trained(tmp_path / "x" / "last.pt")
    assert trained.ema.backbone.options.items() >= row.options.items()
    source = create("vovnet39", weights="timm.ra_in1k").eval()
    images = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(trained.ema.backbone(images), source(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_run_is_started_from_resumes_and_refuses_others(folders, weights, tmp_path, capsys):
    args = ["--data-dir", folders, "--backbone", "mobilenet_v2", *TUNE]
    one = tmp_path / "one"
    assert run("train.py", *args, "--weights", weights, "--output-dir", one) == 0
    moved = shutil.copy(weights, tmp_path / "moved.pth")
    assert run("train.py", *args, "--weights", moved, "--output-dir", one) == 0  # the same file
    capsys.readouterr()
    assert run("train.py", *args, "--output-dir", one) == 1
    assert "holds a run with weights_sha256=" in capsys.readouterr().err

    longer = ["--data-dir", folders, *TUNE, "--init-from", one]
    assert run("train.py", *longer, "--output-dir", tmp_path / "longer", "--lr-per-1024", 1e-9) == 0
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "longer")]
    for name in ("backbone.features.0.0.weight", "head.1.weight"):
        torch.testing.assert_close(states[1]["model"][name], states[0]["ema"][f"module.{name}"])
    assert states[1]["config"]["init_from"] == str(one)
    capsys.readouterr()
    weights = ["--weights", one / "last.pt", "--output-dir", tmp_path / "longer"]
    assert run("train.py", *args, *weights) == 1  # these begin with a new head
    assert "holds a run with " in capsys.readouterr().err
    assert run("train.py", *longer, "--backbone", "resnet18") == 2
    shutil.copytree(folders, tmp_path / "data")
    for each in ("train", "val"):
        (tmp_path / "data" / each / "n00000000").rename(tmp_path / "data" / each / "cat")
    capsys.readouterr()
    assert run("train.py", *longer, "--data-dir", tmp_path / "data") == 1
    assert "other classes than the run's: 2 (cat, n00000000)" in capsys.readouterr().err


def test_weights_are_evaluated_and_predict_with_their_own_classes(
    folders, weights, tmp_path, capsys
):
    """A val/ alone, of three of the five classes; sizes 256 and 224; float32."""
    shutil.copytree(folders / "val", tmp_path / "data" / "val")
    names = tmp_path / "names.txt"
    names.write_text("zebra\nn00000002\nn00000000\ngoat\nn00000001\n")
    network = ["--backbone", "mobilenet_v2", "--weights", weights]
    data = ["--data-dir", tmp_path / "data", "--workers", 0]
    assert run("evaluate.py", *network, *data) == 2
    assert "has 5 classes, not those of ImageNet" in capsys.readouterr().err
    network += ["--class-names", names]
    assert run("evaluate.py", *network, *data, "--output", tmp_path / "classes.csv") == 0
    out = capsys.readouterr().out
    assert "chosen among 3 of the network's 5 classes" in out

    table = pd.read_csv(tmp_path / "classes.csv")
    assert table["class"].tolist() == ["n00000000", "n00000001", "n00000002"]
    assert table.images.tolist() == [6, 6, 6]
    assert f"top-1 {table.top1_pct.mean():.2f} %" in out

    (tmp_path / "data" / "val" / "n00000001" / "broken.jpg").write_bytes(b"x")
    predict = [tmp_path / "data" / "val", *network, "--json"]
    assert run("predict.py", *predict) == 1
    assert run("predict.py", *predict, "--skip-corrupt") == 0
    captured = capsys.readouterr()
    assert "skipped: " in captured.err
    right = dict.fromkeys(table["class"], 0)
    for each in json.loads(captured.out):
        known = [row["class"] for row in each["predictions"] if row["class"] in right]
        right[known[0]] += Path(each["image"]).parent.name == known[0]
    assert [100 * count / 6 for count in right.values()] == pytest.approx(table.top1_pct.tolist())

    for path in (tmp_path / "data" / "val" / "n00000001").iterdir():
        path.write_bytes(b"x")
    output = ["--skip-corrupt", "--output", tmp_path / "classes.json"]
    assert run("evaluate.py", *network, *data, *output) == 0
    found = json.loads((tmp_path / "classes.json").read_text(), parse_constant=pytest.fail)
    assert (found["network_classes"], found["crop_px"], found["dtype"]) == (5, 224, "float32")
    assert [row["top1_pct"] is None for row in found["classes"]] == [False, True, False]
