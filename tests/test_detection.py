"""Detectors: training, precision against a hand count, and the study of pretrained backbones."""

import dataclasses
from unittest import mock

import pandas as pd
import pytest
import torch
from helpers import TINY, assert_same_bits, run, write_coco

import backbones
from backbones.detection import faster_rcnn, retinanet
from utils.data.boxes import open_boxes
from utils.recipe import DetectorRecipe
from utils.studies import detection
from utils.studies.detection import (
    DetectionStudy,
    clearest,
    detect,
    mean_average_precision,
    run_detection_study,
    train_detector,
)
from utils.training.checkpoint import load_trained
from utils.training.loop import DivergedError

QUICK = DetectorRecipe(epochs=2, batch_size=4, image_px=64, out_channels=32)


def detector(make=retinanet, image_px=64):
    torch.manual_seed(0)
    net = backbones.create("cspdarknet19", width=0.125, out_indices=(2, 3, 4))
    return make(net, 10, min_size=image_px, max_size=image_px, out_channels=32)


@pytest.mark.parametrize(
    ("make", "option", "words"),
    [
        (retinanet, "score_treshold", "RetinaNet takes no 'score_treshold'; it takes anchor_gener"),
        (faster_rcnn, "backbone", "FasterRCNN takes no 'backbone'; it takes bbox_reg_weights"),
    ],
)
def test_unknown_options_are_refused(make, option, words):
    """torchvision's detectors take any keyword and ignore it."""
    net = backbones.create("cspdarknet19", width=0.125, out_indices=(2, 3, 4))
    with pytest.raises(ValueError, match=words):
        make(net, 2, **{option: 3})
    assert make(net, 2, out_channels=32, size_divisible=64).transform.size_divisible == 64


def first_images(data, count):
    data.names, data.targets = data.names[:count], data.targets[:count]
    return data


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_the_same_seed_trains_to_the_same_bits(scenes, make):
    found = []
    for seed in (5, 5, 6):
        model = detector(make)
        images = first_images(open_boxes(scenes, seed).train, 8)
        rows = train_detector(model, images, QUICK, seed=seed, quiet=True)
        assert [row["epoch"] for row in rows] == [1, 2]
        found.append((rows, model.state_dict()))
    (rows, state), (same_rows, same_state), (other_rows, _) = found
    assert rows == same_rows != other_rows
    assert_same_bits(state, same_state)


def test_a_detector_learns_its_images(scenes):
    """It overfits four images: the loss falls, and most of their objects are found."""
    images = first_images(open_boxes(scenes).val, 4)
    model = detector(image_px=128)
    recipe = DetectorRecipe(epochs=50, batch_size=4, lr=2e-3)
    rows = train_detector(model, images, recipe, quiet=True)
    assert rows[-1]["train_loss"] < 0.3 * rows[0]["train_loss"]
    found = detect(model, images)
    assert mean_average_precision(found, images.targets)["map50_pct"] > 60


def test_a_loss_that_is_not_finite_stops_the_training(scenes):
    model = detector()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss is not finite before step 2"):
        train_detector(model, first_images(open_boxes(scenes).train, 8), QUICK, quiet=True)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float)


def test_at_each_place_the_clearest_is_kept():
    """The second overlaps the first by 0.8, the third by a third; the fourth has a low score."""
    found = {
        "boxes": boxes([0, 0, 10, 10], [0, 0, 10, 8], [5, 0, 15, 10], [40, 40, 50, 50]),
        "labels": torch.tensor([1, 2, 2, 1]),
        "scores": torch.tensor([0.6, 0.7, 0.5, 0.2]),
    }
    sure = clearest(found, 0.3)
    assert sure["labels"].tolist() == [2, 2]
    assert sure["boxes"].tolist() == [[0, 0, 10, 8], [5, 0, 15, 10]]


def test_mean_average_precision_by_hand():
    """Two objects of class 1, one of class 2; found are one exactly, one with IoU 0.6, one not.

    Class 1, best score first: right at every overlap, wrong (no object there), right up to overlap
    0.6. Precision interpolated at COCO's 101 recalls: 1 up to recall 0.5 (51 of them), 2/3 above,
    at the overlaps 0.50, 0.55 and 0.60; elsewhere 1 up to 0.5 and 0 above. Class 2: nothing found.
    """
    targets = [
        {"boxes": boxes([0, 0, 10, 10], [50, 50, 60, 60]), "labels": torch.tensor([1, 1])},
        {"boxes": boxes([0, 0, 10, 10]), "labels": torch.tensor([2])},
    ]
    found = {
        "boxes": boxes([0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56.2]),
        "labels": torch.tensor([1, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    nothing = {key: value[:0] for key, value in found.items()}
    result = mean_average_precision([found, nothing], targets)
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert result["map50_pct"] == pytest.approx(100 * low / 2, abs=1e-3)
    assert result["map_pct"] == pytest.approx(100 * (3 * low + 7 * high) / 10 / 2, abs=1e-3)


# ---- the study -----------------------------------------------------------------------------------


@pytest.fixture
def study(scenes, folders):
    """One epoch of a classifier and of a detector, of three classes of colours and of scenes."""
    recipe = dataclasses.replace(TINY, epochs=1, warmup_epochs=0.0)
    quick = DetectorRecipe(epochs=1, warmup_epochs=0.0, image_px=64, out_channels=32)
    options = recipe.backbone_options
    return DetectionStudy("cspdarknet19", options, quick, scenes, folders, recipe)


def test_the_study_resumes_and_keeps_its_record(study, tmp_path, monkeypatch):
    output, train = tmp_path / "new" / "table.csv", mock.Mock(wraps=detection.train_detector)
    monkeypatch.setattr(detection, "train_detector", train)
    train.side_effect = [mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        run_detection_study(study, 2, tmp_path / "runs", output)
    train.side_effect = None
    table = run_detection_study(study, 2, tmp_path / "runs", output)
    assert [call.kwargs["seed"] for call in train.call_args_list] == [0, 0, 1, 1, 1]
    assert table.seed.tolist() == [0, 0, 1, 1]
    assert table.value.tolist() == ["from scratch", "pretrained"] * 2
    assert not table.isna().any(axis=None)
    assert pd.read_csv(output).map_pct.equals(table.map_pct)
    once = run_detection_study(study, 1, tmp_path / "others", output)  # of a record alone
    assert train.call_count == 5
    assert once.equals(table)
    longer = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, epochs=3))
    with pytest.raises(ValueError, match="'from scratch' with seed 0 was recorded with epochs=1"):
        run_detection_study(longer, 2, tmp_path / "runs", output)


def test_pretrained_weights_reach_the_detector(study, tmp_path, monkeypatch):
    """The EMA weights of the seed's own classifier, and all of them."""
    seen = []

    def train(model, *args, **options):
        state = model.backbone.backbone.state_dict()
        seen.append({key: value.clone() for key, value in state.items()})
        return [{"train_loss": 0.0}]

    monkeypatch.setattr(detection, "train_detector", train)
    run_detection_study(study, 1, tmp_path, tmp_path / "table.csv")
    trained = load_trained(tmp_path / "classifier-seed0" / "last.pt")
    first = next(iter(seen[0]))
    assert not torch.equal(seen[0][first], seen[1][first])
    assert_same_bits(seen[1], trained.ema.backbone.state_dict())


def test_the_scripts_errors_are_one_line(folders, tmp_path, capsys):
    boxed = write_coco(tmp_path / "boxed")
    for options, code, words in (
        (("--data-dir", folders), 1, "a detector needs boxes in COCO's format"),
        (("--data-dir", boxed, "--checkpoint", "none.pt"), 2, "none.pt: no such checkpoint"),
        (("--seeds", "0"), 2, "'0' must be an integer of at least 1"),
    ):
        assert run("detect.py", *options) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
