"""Detectors on every backbone, boxes against pixels, precision against a hand count, the study."""

import dataclasses
import re

import pandas as pd
import pytest
import torch
from helpers import TINY, assert_same_bits, run, run_check, write_coco
from torchvision.models.detection.retinanet import _default_anchorgen

import backbones
from backbones.detection import Pyramid, faster_rcnn, retinanet
from utils import notebook
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

SMALL = {"min_size": 64, "max_size": 64, "out_channels": 32}
FAMILIES = ("darknet19", "cspdarknet19", "vovnet19_slim", "resnet18", "mobilenet_v3_small")


def narrow(name, **options):
    """A backbone at the paper's strides for detection, narrow where its family can be."""
    if "darknet" in name or "vovnet" in name:
        options["width"] = 0.125
    return backbones.create(name, **{"out_indices": (2, 3, 4), **options})


def scene(channels=3):
    """Two images, the second without an object."""
    torch.manual_seed(0)
    boxes = torch.tensor([[4.0, 6, 40, 50], [30, 20, 60, 44]])
    first = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    return [torch.rand(channels, 64, 64), torch.rand(channels, 64, 48)], [first, empty]


def take_a_step(model, channels=3):
    """One step of SGD moves the backbone's first weights; all losses and weights are finite."""
    images, targets = scene(channels)
    first = next(model.backbone.backbone.parameters())
    before = first.detach().clone()
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                parameter -= 1e-3 * parameter.grad
    assert not torch.equal(first, before)


# ---- detectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", backbones.list_models())
def test_every_backbone_takes_a_step_in_a_retinanet(name):
    take_a_step(retinanet(narrow(name), 3, **SMALL))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_of_each_family_takes_a_step_in_a_faster_rcnn(name):
    take_a_step(faster_rcnn(narrow(name, out_indices=(1, 2, 3, 4)), 3, **SMALL))


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_detections_lie_within_their_images(make):
    images, _ = scene()
    found = make(narrow("resnet18"), 3, score_thresh=0.0, **SMALL).eval()(images)
    for image, each in zip(images, found, strict=True):
        assert len(each["boxes"])
        assert set(each["labels"].tolist()) <= {0, 1, 2, 3}
        height_px, width_px = image.shape[1:]
        assert each["boxes"].min() >= 0
        assert (each["boxes"] <= torch.tensor([width_px, height_px] * 2)).all()


def test_the_pyramid_has_a_level_per_map():
    """Sizes of ceil(size / stride); the coarsest is its map through two convolutions."""
    pyramid, images = Pyramid(narrow("vovnet19_slim"), 16).eval(), torch.rand(1, 3, 72, 104)
    levels = pyramid(images)
    shapes = [tuple(level.shape) for level in levels.values()]
    assert list(levels) == ["0", "1", "2"]
    assert shapes == [(1, 16, 9, 13), (1, 16, 5, 7), (1, 16, 3, 4)]
    coarsest = pyramid.fpn.inner_blocks[2](pyramid.backbone(images)[-1])
    assert torch.equal(pyramid.fpn.layer_blocks[2](coarsest), levels["2"])


@pytest.mark.parametrize("strides", [(4, 8, 16), (8, 16, 32)])
def test_anchors_follow_the_strides(strides):
    """As in the papers: 32 pixels and up at stride 8 (RetinaNet), 32 at stride 4 (Faster R-CNN)."""
    picked = tuple(int(stride).bit_length() - 2 for stride in strides)
    net = narrow("cspdarknet19", out_indices=picked)
    assert net.strides == strides
    anchors = retinanet(net, 3, **SMALL).anchor_generator.sizes
    assert [sizes[0] for sizes in anchors] == [4 * strides[0] * 2**k for k in range(5)]
    if strides[0] == 8:  # as of its retinanet_resnet50_fpn_v2
        assert anchors == _default_anchorgen().sizes
    proposals = faster_rcnn(net, 3, **SMALL).rpn.anchor_generator.sizes
    assert proposals == tuple((8 * strides[0] * 2**k,) for k in range(4))


def test_regions_are_read_at_the_scales_that_torchvision_infers():
    """From images whose sizes the strides divide; ours are known before the first image."""
    model = faster_rcnn(narrow("resnet18", out_indices=(1, 2, 3, 4)), 3, **SMALL).eval()
    known = model.roi_heads.box_roi_pool
    scales, levels = known.scales, vars(known.map_levels)
    known.scales = known.map_levels = None
    model(scene()[0][:1])
    assert known.scales == scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert vars(known.map_levels) == levels


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_images_of_other_channels(make):
    for channels in (1, 5):
        model = make(narrow("darknet19", in_channels=channels), 3, **SMALL)
        assert len(model.transform.image_mean) == len(model.transform.image_std) == channels
        take_a_step(model, channels)
    mean = [0.1, 0.2, 0.3]
    assert make(narrow("darknet19"), 3, image_mean=mean, **SMALL).transform.image_mean == mean


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_what_makes_no_detector_is_refused(make):
    net = narrow("resnet18")
    with pytest.raises(ValueError, match=r"strides \(4, 16\) skip one; .* out_indices=\(2, 3, 4\)"):
        make(narrow("resnet18", out_indices=(1, 3)), 3)
    with pytest.raises(ValueError, match="backbone is a Conv2d; give a Backbone"):
        make(torch.nn.Conv2d(3, 8, 1), 3)
    for bad in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"num_classes={bad} must be an integer"):
            make(net, bad)
        with pytest.raises(ValueError, match=f"out_channels={bad} must be an integer"):
            make(net, 3, out_channels=bad)
    with pytest.raises(ValueError, match="image_std has 1 numbers; the backbone takes 3 channels"):
        make(net, 3, image_std=[0.5])
    with pytest.raises(ValueError, match="image_mean has 3 numbers; the backbone takes 1 channels"):
        make(narrow("resnet18", in_channels=1), 3, image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match="out_channels=48 must be a multiple of 32"):
        retinanet(net, 3, out_channels=48)


# ---- training and precision --------------------------------------------------------------------

QUICK = DetectorRecipe(epochs=2, batch_size=8, image_px=64, out_channels=32)


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_the_same_seed_trains_to_the_same_bits(scenes, make):
    states, losses = [], []
    for seed in (5, 5, 6):
        torch.manual_seed(0)
        model = make(narrow("cspdarknet19"), 10, **SMALL)
        data = open_boxes(scenes, seed)
        rows = train_detector(model, data.train, QUICK, seed=seed, quiet=True)
        losses.append([row["train_loss"] for row in rows])
        states.append(model.state_dict())
        assert [row["epoch"] for row in rows] == [1, 2]
    assert losses[0] == losses[1] != losses[2]
    assert_same_bits(*states[:2])


def test_a_detector_learns_its_images(scenes):
    """Few images by heart: the loss falls, and most of what is in them is found."""
    data = open_boxes(scenes)
    data.val.names, data.val.targets = data.val.names[:4], data.val.targets[:4]
    torch.manual_seed(0)
    recipe = DetectorRecipe(epochs=50, batch_size=4, lr=2e-3)
    model = retinanet(
        backbones.create("cspdarknet19", width=0.125, out_indices=(2, 3, 4)),
        10,
        out_channels=32,
        min_size=128,
        max_size=128,
    )
    rows = train_detector(model, data.val, recipe, quiet=True)
    assert rows[-1]["train_loss"] < 0.3 * rows[0]["train_loss"]
    found = detect(model, data.val)
    assert mean_average_precision(found, data.val.targets)["map50_pct"] > 60


def test_a_loss_that_is_not_finite_stops_the_training(scenes):
    model = retinanet(narrow("cspdarknet19"), 10, **SMALL)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match="the loss is not finite before step 3"):
        train_detector(model, open_boxes(scenes).train, QUICK, quiet=True)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float).reshape(-1, 4)


def test_at_each_place_the_clearest_is_kept():
    """The second overlaps the first by 0.8, the third by a third; the fourth is not sure."""
    found = {
        "boxes": boxes([0, 0, 10, 10], [0, 0, 10, 8], [5, 0, 15, 10], [40, 40, 50, 50]),
        "labels": torch.tensor([1, 2, 2, 1]),
        "scores": torch.tensor([0.6, 0.7, 0.5, 0.2]),
    }
    sure = clearest(found, 0.3)
    assert sure["labels"].tolist() == [2, 2]
    assert sure["boxes"].tolist() == [[0, 0, 10, 8], [5, 0, 15, 10]]
    assert sure["scores"].tolist() == pytest.approx([0.7, 0.5])


def test_mean_average_precision_by_hand():
    """Two objects of class 1, one of class 2; found are one wholly, one by overlap 0.6, one not.

    Class 1, best score first: right at every overlap, wrong (no object there), right up to overlap
    0.6. Precision interpolated at COCO's 101 recalls: 1 up to recall 0.5 (51 of them), 2/3 above,
    at the overlaps 0.50, 0.55 and 0.60; elsewhere 1 up to 0.5 and 0 above. Class 2: nothing found.
    """
    targets = [
        {"boxes": boxes([0, 0, 10, 10], [50, 50, 60, 60]), "labels": torch.tensor([1, 1])},
        {"boxes": boxes([0, 0, 10, 10]), "labels": torch.tensor([2])},
    ]
    found = [
        {
            "boxes": boxes([0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56.2]),
            "labels": torch.tensor([1, 1, 1]),
            "scores": torch.tensor([0.9, 0.8, 0.7]),
        },
        {
            "boxes": boxes(),
            "labels": torch.tensor([], dtype=torch.long),
            "scores": torch.tensor([]),
        },
    ]
    result = mean_average_precision(found, targets)
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert result["map50_pct"] == pytest.approx(100 * low / 2, abs=1e-3)
    assert result["map_pct"] == pytest.approx(100 * (3 * low + 7 * high) / 10 / 2, abs=1e-3)


@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"batch_size": 2.0}]
)
def test_a_bad_recipe_is_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        DetectorRecipe(**bad)
    with pytest.raises(ValueError, match=r"warmup_epochs=3.0 must be below the epochs"):
        DetectorRecipe(epochs=2, warmup_epochs=3.0)


# ---- the study ---------------------------------------------------------------------------------


@pytest.fixture
def study(scenes, folders):
    """One epoch of a classifier and of a detector, of three classes of colours and of scenes."""
    recipe = dataclasses.replace(TINY, epochs=1, warmup_epochs=0.0)
    quick = DetectorRecipe(epochs=1, warmup_epochs=0.0, image_px=64, out_channels=32)
    options = recipe.backbone_options
    return DetectionStudy("cspdarknet19", options, quick, scenes, folders, recipe)


def test_the_study_resumes_and_keeps_its_record(study, tmp_path, monkeypatch):
    output, seeds, train = tmp_path / "new" / "table.csv", [], detection.train_detector

    def interrupted(*args, seed, **options):
        seeds.append(seed)
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return train(*args, seed=seed, **options)

    monkeypatch.setattr(detection, "train_detector", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_detection_study(study, 2, tmp_path / "runs", output)
    table = run_detection_study(study, 2, tmp_path / "runs", output)
    assert seeds == [0, 0, 1, 1, 1]
    order = [["from scratch", 0], ["pretrained", 0], ["from scratch", 1], ["pretrained", 1]]
    assert table[["value", "seed"]].values.tolist() == order
    assert not table.isna().any(axis=None)
    assert pd.read_csv(output).map_pct.equals(table.map_pct)
    once = run_detection_study(study, 1, tmp_path / "others", output)  # of a record alone
    assert len(seeds) == 5
    assert once.equals(table)

    other = dataclasses.replace(study, checkpoint=tmp_path / "a.pt")
    longer = dataclasses.replace(study, recipe=dataclasses.replace(study.recipe, epochs=3))
    for wrong, words in (
        (longer, "table.csv: 'from scratch' with seed 0 was recorded with epochs=1, not 3"),
        (other, "recorded with classifier='trained for each seed', not .*a.pt"),
    ):
        with pytest.raises(ValueError, match=words):
            run_detection_study(wrong, 2, tmp_path / "runs", output)


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


def test_the_scripts_errors_are_one_line(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    damaged = write_coco(tmp_path / "damaged", annotations=[{"bbox": 3}])
    boxed = ("--data-dir", write_coco(tmp_path / "boxed"))
    for options, code, words in (
        (("--data-dir", "none"), 2, "none: no such folder"),
        (("--data-dir", folders), 1, "a detector needs boxes in COCO's format"),
        (("--data-dir", damaged), 1, "not valid in COCO's format"),
        ((*boxed, "--checkpoint", "none.pt"), 2, "none.pt: no such checkpoint"),
        ((*boxed, "--checkpoint", "broken.pt"), 1, "broken.pt: not a checkpoint"),
        (("--seeds", "0"), 2, "'0' must be an integer of at least 1"),
        (("--epochs", "3"), 2, "unrecognized arguments"),
    ):
        assert run("detect.py", *options) == code
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1, told
        assert words in told[0]


# ---- the notebook's parameters -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("data_dir", 3, "data_dir=3 must be the path of a folder"),
        ("data_dir", "nowhere", "data_dir='nowhere': nowhere: no such folder"),
        ("checkpoint", None, "checkpoint=None must be the path of a run's checkpoint"),
        ("checkpoint", "none.pt", "checkpoint='none.pt': none.pt: no such checkpoint"),
        ("backbone", "vovnet3", "backbone='vovnet3' must be one of vovnet39"),
        ("backbone", "resnet18", "resnet18 takes no 'width'"),
        ("recipe", "imagnet", "recipe='imagnet' must be one of imagenet"),
        ("seed", -1, "seed=-1 must be a whole number"),
        ("classifier_epochs", 0, "classifier_epochs=0 must be a whole number, 1 to"),
        ("epochs", "3", "epochs='3' must be a whole number, 1 to"),
        ("output_dir", None, "output_dir=None must be the path"),
    ],
)
def test_a_wrong_parameter_of_the_notebook_is_one_line(scenes, name, value, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        run_check("08", **{"data_dir": str(scenes), name: value})
    assert "\n" not in str(caught.value)


def test_right_parameters_of_the_notebook(scenes, folders):
    names = run_check("08", data_dir=str(scenes), epochs=1, classifier_epochs=1)
    assert names["data_dir"] == scenes
    assert names["detector_recipe"] == DetectorRecipe(epochs=1, warmup_epochs=0.5)
    with pytest.raises(notebook.ParameterError, match="a detector needs boxes in COCO's format"):
        run_check("08", data_dir=str(folders))
