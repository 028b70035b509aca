"""The diagrams of docs/figures: their numbers are the networks', and notebooks show them."""

import re
from math import ceil
from xml.etree import ElementTree

import pytest
import torch
from helpers import ROOT

import backbones
from backbones.detection import Pyramid
from utils.recipe import RECIPES, DetectorRecipe

TIMES = "\N{MULTIPLICATION SIGN}"
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.svg"))


def texts(name, kind=""):
    """The texts of a diagram whose class begins with `kind`, in the order of the file."""
    root = ElementTree.parse(ROOT / "docs" / "figures" / f"{name}.svg").getroot()
    found = [each for each in root.iter() if each.tag.endswith("}text")]
    return [each.text for each in found if each.get("class", "").startswith(kind)]


def channels(name):
    return [int(text) for text in texts(name, "channels")]


def make(name, **options):
    with torch.device("meta"):
        return backbones.create(name, **options)


def widths(conv):
    return conv.conv.in_channels, conv.conv.out_channels


def test_feature_maps():
    net, px = make("cspdarknet53"), 224
    shapes = [(3, px), *((c, ceil(px / s)) for c, s in zip(net.channels, net.strides, strict=True))]
    assert texts("feature_maps", "channels") == [f"{c} {TIMES} {n} {TIMES} {n}" for c, n in shapes]
    assert {f"stride {stride}" for stride in net.strides} < set(texts("feature_maps"))


def test_a_darknet_stage():
    stage = make("darknet53").stages[2]
    block, (_, last) = stage.blocks[0], widths(stage.blocks[-1].conv2)
    _, added = widths(block.conv2)
    expected = [*widths(stage.conv), last, *widths(block.conv1), added, added]
    assert channels("darknet_stage") == expected
    assert f"{len(stage.blocks)} {TIMES} block" in texts("darknet_stage")


def test_a_cspdarknet():
    net, px = make("cspdarknet19", width=0.25), 64
    stage, shapes = net.stages[2], zip(net.channels, net.strides, strict=True)
    sizes = [(net.stem.conv.out_channels, px), *((c, px // s) for c, s in shapes)]
    cubes = [f"{c} {TIMES} {n} {TIMES} {n}" for c, n in sizes]
    halves = widths(stage.shortcut_conv)[1], widths(stage.blocks[0].conv1)[0]
    path = [*widths(stage.conv), *halves, *widths(stage.out_conv)]
    expected = [*cubes, str(net.channels[-1]), "10 logits", *map(str, path)]
    assert texts("cspdarknet", "channels") == expected
    assert len(stage.blocks) == 1


def test_the_input_pipeline():
    recipe, found = RECIPES["imagenet"], " ".join(filter(None, texts("input_pipeline")))
    px = recipe.train_crop_px
    assert f"{recipe.min_crop_area * 100:g} to 100 % of the area" in found
    assert f"N {TIMES} 3 {TIMES} {px} {TIMES} {px}" in found
    assert "a tenth of the images" in found
    assert recipe.random_erasing == 0.1


def test_csp_splits():
    """Per split: into the stage, the strided convolution, both halves, the blocks, and the end."""
    expected = []
    for split in ("separate", "slice", "partial"):
        stage = make("cspdarknet53", split=split).stages[2]
        blocks = widths(stage.blocks[0].conv1)[0], widths(stage.blocks[-1].conv2)[1]
        joined, out = widths(stage.out_conv)
        expected += [*widths(stage.conv), joined - blocks[1], *blocks, joined, out]
        assert f'split="{split}"' in texts("csp_splits", "head")
    assert channels("csp_splits") == expected
    assert texts("csp_splits").count(f"{len(stage.blocks)} {TIMES} block") == 3


def test_an_osa_block():
    block = make("vovnet39").stages[2].blocks[1]
    joined, out = widths(block.out_conv)
    first, *others = (widths(conv) for conv in block.convs)
    outputs = [first[1], *(width for _, width in others)]
    assert channels("osa_block") == [first[0], *outputs, first[0], joined, out, out, out]
    assert block.residual
    assert block.ese is not None


def test_the_taps_of_an_inverted_residual():
    narrow, wide = (make("mobilenet_v2", tap=tap) for tap in ("block", "expansion"))
    taps = narrow.channels[2], wide.channels[2]
    assert channels("inverted_residual")[:3] == [*taps, taps[1]]
    for tap in taps:
        assert f"{tap} channels, stride {narrow.strides[2]}" in texts("inverted_residual")


def test_a_feature_pyramid():
    net, px = make("cspdarknet19", width=0.25, out_indices=(2, 3, 4)), 128
    with torch.device("meta"):
        levels = Pyramid(net, DetectorRecipe().out_channels)(torch.zeros(1, 3, px, px))
    expected = []
    for stride, c, level in zip(net.strides, net.channels, levels.values(), strict=True):
        assert f"stride {stride}" in texts("feature_pyramid")
        sizes = (c, px // stride, px // stride), level.shape[1:]
        expected += [f" {TIMES} ".join(map(str, size)) for size in sizes]
    assert texts("feature_pyramid", "channels") == expected
    assert px == DetectorRecipe().image_px


def test_fixres():
    recipe = RECIPES["imagenet"]
    sizes = [recipe.train_crop_px, recipe.eval_resize_px, recipe.eval_crop_px]
    assert channels("fixres") == sizes


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_diagram_has_a_description_and_is_shown_with_one(path):
    root = ElementTree.parse(path).getroot()
    assert [each.tag.split("}")[1] for each in root[:2]] == ["title", "desc"]
    shown = [each.read_text() for each in ROOT.glob("notebooks/*.ipynb")]
    pattern = rf"!\[[^\]]{{20,}}\]\(\.\./docs/figures/{path.name}\)"
    assert any(re.search(pattern, text) for text in shown)
