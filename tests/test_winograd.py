"""Convolutions by tiles against PyTorch's, and networks that have them."""

import pickle

import pytest
import torch
from helpers import needs_onednn
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import conv2d

import backbones
from backbones import winograd
from backbones.deploy import FusedConv, optimize


def by_tiles(x, weight, bias):
    """The products as PyTorch's plain grouped convolution computes them."""
    kernels, biases, seen = winograd.kernels(weight), winograd.biases(bias), []

    def multiply(values):
        seen.append(values.shape)
        return conv2d(values, kernels, biases, groups=36)

    y = winograd.convolve(x, len(weight), multiply)
    # One shape: for any other, oneDNN would bring the kernels in another order, at every call.
    assert set(seen) == {winograd.values_shape(x.shape)}
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


@pytest.mark.parametrize(
    "shape", [(2, 5, 8, 12), (1, 3, 7, 9), (3, 4, 1, 2), (1, 8, 14, 5), (8, 2, 5, 8)]
)
@pytest.mark.parametrize("part", [1, 12, 128])
def test_is_the_convolution(shape, part, monkeypatch):
    """In double precision to rounding, at sizes that are no multiples of a tile's."""
    monkeypatch.setattr(winograd, "PART", part)  # an image at a time, a few, or all
    x, weight = torch.randn(shape).double(), torch.randn(6, shape[1], 3, 3).double()
    for bias in (torch.randn(6).double(), None):
        expected = conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(by_tiles(x, weight, bias), expected, rtol=0, atol=1e-12)


def test_rounds_in_float32_as_stated():
    """Against double precision: less than 1e-4 of the largest value, in one layer."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, 28, 28), torch.randn(128, 128, 3, 3)
    expected = conv2d(x.double(), weight.double(), padding=1)
    error = (by_tiles(x, weight, None) - expected).abs().max() / expected.abs().max()
    assert error < 5e-5


@pytest.mark.parametrize(
    ("options", "size", "suited"),
    [
        ({}, 28, True),
        ({}, 12, False),  # too few tiles
        ({"stride": 2}, 28, False),
        ({"dilation": 2, "padding": 2}, 28, False),
        ({"padding": 0}, 28, False),
        ({"groups": 2}, 28, False),
        ({"kernel_size": 5, "padding": 2}, 28, False),
        ({"in_channels": 64}, 28, False),
        ({"out_channels": 64}, 28, False),
    ],
)
def test_what_it_suits(options, size, suited):
    shape = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1, **options}
    conv = nn.Conv2d(**shape)
    assert winograd.suits(conv, torch.Size((1, conv.in_channels, size, size))) == suited


@needs_onednn
@pytest.mark.parametrize("name", ["cspdarknet19", "resnet18", "vovnet39"])
def test_networks_lose_no_precision(name, monkeypatch):
    """Maps as near those of double precision as the plain network's, within a factor of four."""
    torch.manual_seed(0)
    net, x = backbones.create(name).eval(), torch.randn(3, 3, 128, 160)
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: calls.append(args) or convolve(*args))
    with torch.no_grad():
        plain, fast = net(x), optimize(net)
        fast(x)  # plain weights still
        assert not calls
        found = fast(x)
        exact = net.double()(x.double())
    assert calls
    for a, b, c in zip(found, plain, exact, strict=True):
        largest = c.abs().max()
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert (a - c).abs().max() / largest < max(1e-5, 4 * (b - c).abs().max() / largest)


def test_sums_and_activations_follow():
    """What oneDNN has in its kernel otherwise: ResNet's addition, and an activation."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    fused = FusedConv(conv, nn.SiLU())
    x, added = torch.randn(2, 1, 128, 28, 28)
    assert winograd.suits(conv, x.shape)
    with torch.no_grad():
        expected = [nn.functional.silu(conv(x)), nn.functional.silu(conv(x) + added)]
        for _ in range(3):
            found = [fused(x), fused(x, added)]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("name", ["cspdarknet53", "darknet19", "vovnet39", "resnet18", "resnet50"])
def test_small_networks_by_tiles_alone(all_by_tiles, name):
    """Maps within what `optimize` states, also in inference mode, for other weights and a copy."""
    torch.manual_seed(0)
    options = {} if name.startswith("resnet") else {"width": 0.25}
    net, other = (backbones.create(name, **options).eval() for _ in range(2))
    fast, x = optimize(net), torch.randn(2, 3, 64, 96)
    fast(x)

    def compare(fast, net):
        for a, b in zip(fast(x), net(x), strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()

    with torch.inference_mode():
        compare(fast, net)
    with torch.no_grad():
        compare(pickle.loads(pickle.dumps(fast)), net)
        fast.load_state_dict(optimize(other).state_dict())
        for _ in range(3):
            compare(fast, other)


@needs_onednn
def test_autocast_changes_nothing(all_by_tiles):
    conv = FusedConv(nn.Conv2d(8, 8, 3, padding=1))
    x = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = [conv(x) for _ in range(3)]
        assert torch.equal(found[1], found[2])
        for y in found:
            torch.testing.assert_close(y, conv.conv(x), rtol=0, atol=1e-5)


@needs_onednn
def test_compiled_networks_have_them_too(all_by_tiles, monkeypatch):
    """Each copy by its own weights; all in one graph, whose other convolutions are packed too."""
    torch.manual_seed(0)
    torch.compiler.reset()
    nets = [backbones.create("cspdarknet19", width=0.25).eval() for _ in range(2)]
    x, calls = torch.randn(3, 3, 64, 96), []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: calls.append(args) or convolve(*args))
    fast = [optimize(net, compile=True) for net in nets]
    fast.append(pickle.loads(pickle.dumps(fast[0])))
    fast[2].load_state_dict(fast[1].state_dict())
    with torch.no_grad():
        for net, copy in zip([*nets, nets[1]], fast, strict=True):
            expected = net(x)
            maps, (code,) = run_and_get_code(copy, x)
            assert "mkldnn._convolution_pointwise" in code
            tiled = code.count("backbones.convolve_by_tiles.default(")
            for k in range(3):
                for a, b in zip(maps, expected, strict=True):
                    assert (a - b).abs().max() < 1e-4 * b.abs().max()
                assert len(calls) == k * tiled  # plain weights at first
                maps = copy(x)
            assert tiled > 5
            calls.clear()


def test_exported_programs_are_for_other_machines(all_by_tiles):
    fast = optimize(backbones.create("cspdarknet19", width=0.25).eval())
    program = torch.export.export(fast, (torch.randn(2, 3, 64, 96),))
    assert "convolve_by_tiles" not in str(program.graph)
