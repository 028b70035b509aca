"""The ports against torchvision's own feature extraction and classifiers."""

import pytest
import torch
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

import backbones
from backbones.classifier import Classifier
from backbones.torchvision_ports import INVERTED_RESIDUALS, RESNETS
from backbones.weights import load_weights
from utils.measure import count_macs

# Nodes of create_feature_extractor, read off torchvision's printed networks: the expansion of each
# strided block and the last convolution; and the last block of each stride.
RESNET_NODES = ["relu", "layer1", "layer2", "layer3", "layer4"]
NODES = {
    "mobilenet_v2": (
        ["features.2.conv.0", "features.4.conv.0", "features.7.conv.0", "features.14.conv.0"],
        ["features.1", "features.3", "features.6", "features.13", "features.17"],
    ),
    "mobilenet_v3_large": (
        ["features.2.block.0", "features.4.block.0", "features.7.block.0", "features.13.block.0"],
        ["features.1", "features.3", "features.6", "features.12", "features.15"],
    ),
    "mobilenet_v3_small": (
        ["features.0", "features.2.block.0", "features.4.block.0", "features.9.block.0"],
        ["features.0", "features.1", "features.3", "features.8", "features.11"],
    ),
}
EFFICIENTNET_NODES = (
    [f"features.{i}.0.block.0" for i in (2, 3, 4, 6)],
    ["features.1", "features.2", "features.3", "features.5", "features.7"],
)


def nodes_of(name, network, tap):
    if name in RESNETS:
        return RESNET_NODES
    expansion, block = NODES.get(name, EFFICIENTNET_NODES)
    return block if tap == "block" else [*expansion, f"features.{len(network.features) - 1}"]


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "resnext50_32x4d", *NODES, "efficientnet_b0", "efficientnet_b3"],
)
def test_maps_and_logits_are_torchvisions(name):
    """A checkpoint of torchvision's classifier loads strictly, and gives its maps and logits."""
    theirs = get_model_builder(name)(weights=None, num_classes=5).eval()
    images = torch.randn(1, 3, 65, 96)
    for options in [{}] if name in RESNETS else [{"tap": "expansion"}, {"tap": "block"}]:
        ours = backbones.create(name, weights=theirs.state_dict(), **options).eval()
        nodes = nodes_of(name, theirs, options.get("tap"))
        extractor = create_feature_extractor(theirs, {n: n for n in dict.fromkeys(nodes)})
        expected = extractor(images)
        assert len(nodes) == len(ours.strides) == 5
        for node, found, channels in zip(nodes, ours(images), ours.channels, strict=True):
            assert torch.equal(found, expected[node]), node
            assert found.shape[1] == channels
    ours = Classifier(backbones.create(name), 5)
    load_weights(ours, theirs.state_dict())
    torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RESNETS + INVERTED_RESIDUALS)
def test_parameters_and_macs_are_the_published_ones(name):
    """torchvision publishes them with its weights, at the size that those are tested at."""
    meta = get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        model = Classifier(backbones.create(name), 1000)
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    first = get_model_weights(name).IMAGENET1K_V1
    (side,) = first.transforms().crop_size
    assert count_macs(model, side, side) / 1e9 == pytest.approx(first.meta["_ops"], rel=0.01)


def test_a_head_is_made_for_what_is_there():
    """torchvision's own where its input is the last map, one linear layer elsewhere."""
    assert len(Classifier(backbones.create("mobilenet_v3_small"), 7).head) == 4
    for options in ({"tap": "block"}, {"out_indices": (1, 3)}):
        model = Classifier(backbones.create("mobilenet_v3_small", **options), 7)
        assert isinstance(model.head, torch.nn.Linear)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
