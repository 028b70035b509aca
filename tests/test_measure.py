"""Costs of a network, counted by hand."""

from torch import nn

from utils.measure import count_activations, count_macs, count_parameters


def test_macs_and_parameters_by_hand():
    """A strided, grouped convolution and a linear layer."""
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(6, 5))
    assert count_parameters(model) == 6 * 2 * 9 + 2 * 6 + 6 * 5 + 5
    assert count_macs(model, 9, 12, channels=4) == 5 * 6 * (6 * 2 * 9) + 6 * 5
    assert model.training


def test_activations_by_hand():
    """The image, and the outputs of convolution and norm, which an in-place ReLU overwrites."""
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    statistics = 2 * 8  # mean and deviation of the batch
    assert count_activations(block, 9, 12) == 4 * (9 * 12 * (3 + 8 + 8) + statistics)
