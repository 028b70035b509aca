"""Detectors on backbones: the feature pyramid, its anchors, and a step of training."""

import pytest
import torch
from torchvision.models.detection.retinanet import _default_anchorgen

import backbones
from backbones.detection import Pyramid, faster_rcnn, retinanet

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


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
@pytest.mark.parametrize(
    ("name", "channels"), [*((name, 3) for name in FAMILIES), ("darknet19", 1), ("darknet19", 5)]
)
def test_detectors_train(make, name, channels):
    """All losses and gradients are finite, and the first weights of the backbone have one."""
    picked = (2, 3, 4) if make is retinanet else (1, 2, 3, 4)
    model = make(narrow(name, out_indices=picked, in_channels=channels), 3, **SMALL)
    assert len(model.transform.image_mean) == len(model.transform.image_std) == channels
    losses = model.train()(*scene(channels))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert next(model.backbone.backbone.parameters()).grad.abs().max() > 0


def test_the_pyramid_has_a_level_per_map():
    """Sizes are ceil(size / stride)."""
    levels = Pyramid(narrow("vovnet19_slim"), 16).eval()(torch.rand(1, 3, 72, 104))
    shapes = [tuple(level.shape) for level in levels.values()]
    assert list(levels) == ["0", "1", "2"]
    assert shapes == [(1, 16, 9, 13), (1, 16, 5, 7), (1, 16, 3, 4)]


@pytest.mark.parametrize("strides", [(4, 8, 16), (8, 16, 32)])
def test_anchors_follow_the_strides(strides):
    """As in the papers: 32 pixels and up at stride 8 (RetinaNet), 32 at stride 4 (Faster R-CNN)."""
    picked = tuple(int(stride).bit_length() - 2 for stride in strides)
    net = narrow("cspdarknet19", out_indices=picked)
    assert net.strides == strides
    anchors = retinanet(net, 3, **SMALL).anchor_generator.sizes
    assert [sizes[0] for sizes in anchors] == [4 * strides[0] * 2**k for k in range(5)]
    if strides[0] == 8:  # those of its retinanet_resnet50_fpn_v2
        assert anchors == _default_anchorgen().sizes
    proposals = faster_rcnn(net, 3, **SMALL).rpn.anchor_generator.sizes
    assert proposals == tuple((8 * strides[0] * 2**k,) for k in range(4))


def test_regions_are_pooled_at_the_scales_that_torchvision_infers():
    """It infers them from images whose sizes the strides divide; ours are known before."""
    model = faster_rcnn(narrow("resnet18", out_indices=(1, 2, 3, 4)), 3, **SMALL).eval()
    known = model.roi_heads.box_roi_pool
    scales, levels = known.scales, vars(known.map_levels)
    known.scales = known.map_levels = None
    model(scene()[0][:1])
    assert known.scales == scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert vars(known.map_levels) == levels


@pytest.mark.parametrize("make", [retinanet, faster_rcnn])
def test_bad_options_are_refused(make):
    net = narrow("resnet18")
    with pytest.raises(ValueError, match=r"strides \(4, 16\) skip one; .* out_indices=\(2, 3, 4\)"):
        make(narrow("resnet18", out_indices=(1, 3)), 3)
    with pytest.raises(ValueError, match="num_classes=0 must be an integer"):
        make(net, 0)
    with pytest.raises(ValueError, match="out_channels=0 must be an integer"):
        make(net, 3, out_channels=0)
    with pytest.raises(ValueError, match=r"image_std=\[0.5\] needs 3 numbers"):
        make(net, 3, image_std=[0.5])
    with pytest.raises(ValueError, match="out_channels=48 must be a multiple of 32"):
        retinanet(net, 3, out_channels=48)
    mean = [0.1, 0.2, 0.3]
    assert make(net, 3, image_mean=mean, **SMALL).transform.image_mean == mean
