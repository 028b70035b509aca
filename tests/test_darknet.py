"""Darknet against direct sums, split strategies against each other; timm: test_weights.py."""

import copy

import pytest
import torch
from helpers import randomise_norms
from torch.nn.functional import conv2d, leaky_relu

import backbones
from backbones.classifier import Classifier
from backbones.darknet import CSPStage, convert_split
from backbones.layers import ConvNormAct, scale_channels


@torch.no_grad()
def test_conv_norm_act_is_the_three_of_them():
    layer = randomise_norms(ConvNormAct(3, 8, 3, stride=2, act="leaky_relu")).eval()
    x, norm = torch.randn(1, 3, 9, 11), layer.norm
    y = conv2d(x, layer.conv.weight, stride=2, padding=1)
    shape = (1, -1, 1, 1)
    y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
    y = y * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(layer(x), leaky_relu(y, 0.1))


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1, 32), (30, 1, 30), (32, 0.5, 16), (64, 0.3, 16), (32, 0.1, 8), (1024, 0.75, 768)],
)
def test_widths_are_multiples_of_eight(channels, width, expected):
    assert scale_channels(channels, width) == expected


@pytest.mark.parametrize("there", ["separate", "slice"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["half", "darknet"])
def test_separate_and_slice_are_one_function(there, training, layout):
    """Outputs, gradients and running statistics, in float64 to allow only rounding errors."""
    here = {"separate": "slice", "slice": "separate"}[there]
    options = {"width": 0.25, "layout": layout}
    source = Classifier(backbones.create("cspdarknet19", split=here, **options), 3)
    source = randomise_norms(source).double().train(training)
    target = convert_split(source, there)
    copies = copy.deepcopy(source.state_dict())
    for parameter in convert_split(source, there).parameters():
        parameter.data.zero_()
    assert all(torch.equal(v, copies[k]) for k, v in source.state_dict().items())
    fresh = Classifier(backbones.create("cspdarknet19", split=there, **options), 3).double()
    fresh.load_state_dict(target.state_dict())  # strict: it is a network of that split
    assert list(target.state_dict()) == list(fresh.state_dict())  # in its order, for optimizers
    fresh.train(training)
    images = torch.randn(4, 3, 64, 96, dtype=torch.float64)
    outputs = [net(images) for net in (source, target, fresh)]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-9, atol=1e-12)
        output.square().sum().backward()
    expected = gradients(source)
    for name, gradient in gradients(target).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)
    # The statistics that the pass in train mode moved agree as well.
    back = convert_split(target, here).state_dict()
    for name, value in source.state_dict().items():
        torch.testing.assert_close(value, back[name], rtol=1e-9, atol=1e-12, msg=name)


def gradients(net):
    """Gradients under the names of the "slice" network."""
    holder = copy.deepcopy(net)
    for parameter, source in zip(holder.parameters(), net.parameters(), strict=True):
        parameter.data = source.grad
    return dict(convert_split(holder, "slice").named_parameters())


def test_separate_and_slice_start_alike():
    """The same spread: BatchNorm hides the scale of weights, but it changes their updates."""
    stages = {split: CSPStage(128, 256, 1, "relu", split=split) for split in ("separate", "slice")}
    halves = stages["slice"].split_conv.conv.weight.chunk(2)
    others = (stages["separate"].shortcut_conv, stages["separate"].blocks_conv)
    for half, other in zip(halves, others, strict=True):
        assert half.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)
        assert other.conv.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)
    assert not torch.equal(*halves)


def test_partial_is_another_function():
    net = backbones.create("cspdarknet19", width=0.125, split="partial")
    for split in ("separate", "slice"):
        with pytest.raises(ValueError, match="partial"):
            convert_split(net, split)
    with pytest.raises(ValueError, match="must be"):
        convert_split(net, "partial")


@torch.no_grad()
def test_partial_passes_half_of_the_map_by():
    stage = CSPStage(8, 16, 1, "relu", split="partial").eval()
    x = stage.conv(torch.randn(1, 8, 8, 12))
    by, through = x[:, :8], x[:, 8:]
    block = stage.blocks[0]
    through = through + block.conv2(block.conv1(through))
    expected = stage.out_conv(torch.cat((by, through), 1))
    stage.conv = torch.nn.Identity()
    assert torch.equal(stage(x), expected)
