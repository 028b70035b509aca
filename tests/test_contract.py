"""The contract of `backbones.base`, over every name."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

import backbones
from backbones.classifier import Classifier

NAMES = backbones.list_models()
FACTS = list(csv.DictReader((Path(__file__).parent / "backbone_facts.csv").open()))
SMALL = {"width": 0.125}  # same code, few channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(name, **options):
    return backbones.create(name, **SMALL, **options)


def assert_near(found, expected):
    """Equal to 1e-4 of the largest value, as deep float32 sums in another order are."""
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact['name']} {fact['options']}")
def test_parameters_are_those_counted_elsewhere(fact):
    with torch.device("meta"):
        net = backbones.create(fact["name"], **json.loads(fact["options"]))
    assert sum(p.numel() for p in net.parameters()) == int(fact["parameters"])


@pytest.mark.parametrize("name", NAMES)
def test_maps_have_the_promised_shapes(name):
    net = small(name)
    assert all(b == 2 * a for a, b in zip(net.strides, net.strides[1:], strict=False))
    for height, width in ((64, 96), (65, 43)):
        maps = net(torch.randn(2, 3, height, width))
        expected = [
            (2, c, math.ceil(height / s), math.ceil(width / s))
            for c, s in zip(net.channels, net.strides, strict=True)
        ]
        assert [tuple(m.shape) for m in maps] == expected


@pytest.mark.parametrize("name", NAMES)
def test_construction_runs_nothing(name):
    net = small(name)
    assert all(module.training for module in net.modules())
    for key, buffer in net.named_buffers():
        assert (buffer == (1 if key.endswith("running_var") else 0)).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_out_indices_pick_maps_and_leave_out_later_stages(name):
    whole = small(name).eval()
    images = torch.randn(1, 3, 64, 96)
    for picked in ((1, 3), (-4, -2)):
        part = small(name, out_indices=picked).eval()
        assert part.channels == (whole.channels[1], whole.channels[3])
        assert part.strides == (whole.strides[1], whole.strides[3])
        missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
        assert not missing
        assert unexpected  # the last stage is not there
        every = whole(images)
        for ours, theirs in zip(part(images), (every[1], every[3]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("indices", [(5,), (-6,), (1, 1), (2, 1), (), ("a",)])
def test_bad_out_indices_are_refused(indices):
    with pytest.raises(ValueError, match="out_indices="):
        small("darknet19", out_indices=indices)


@pytest.mark.parametrize("name", NAMES)
def test_in_channels(name):
    assert small(name, in_channels=5)(torch.randn(1, 5, 32, 64))[-1].shape[-2:] == (1, 2)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="in_channels="):
            small(name, in_channels=wrong)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.randn(3, 64, 64), r"\[3, 64, 64\]; expected \[N, 3, H, W\]"),
        (torch.randn(1, 4, 64, 64), r"\[1, 4, 64, 64\]; expected \[N, 3, H, W\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8; expected a floating"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_clear_error(name, images, words):
    with pytest.raises(ValueError, match=words):
        small(name)(images)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_stages_stay_as_they_are(name):
    net = small(name).freeze(2)
    net.eval().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    sum(m.square().mean() for m in net(torch.randn(2, 3, 64, 96))).backward()
    optimizer.step()
    frozen = [k for k in before if k.startswith(("stem.", "stages.0.", "stages.1."))]
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert len(frozen) > 10
    assert not set(frozen) & set(changed)
    # Everything else learns and counts batches, weights and statistics alike.
    assert set(before) - set(frozen) == set(changed)


def test_freezing_can_be_taken_back():
    net = small("darknet19").freeze(5).freeze(None)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match="choose 0 to 5 stages"):
            net.freeze(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_memory_only(name):
    plain, checked = small(name), small(name, gradient_checkpointing=True)
    checked.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 96)
    saved = {}
    for net in (plain, checked):
        count = saved.setdefault(net, [])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, count=count: count.append(t.numel()) or t, lambda t: t
        ):
            loss = sum(m.square().mean() for m in net(images))
        loss.backward()
    for (key, a), b in zip(plain.named_parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    # Running statistics too: the second forward pass must not move them again.
    for (key, a), b in zip(plain.named_buffers(), checked.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert sum(saved[checked]) < 0.5 * sum(saved[plain])


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_goes_through(name):
    net = small(name).eval()
    images = torch.randn(1, 3, 64, 96)
    plain = net(images)
    net = net.to(memory_format=torch.channels_last)
    for a, b in zip(plain, net(images.to(memory_format=torch.channels_last)), strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert_near(b, a)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    net = small(name).eval().to(torch.bfloat16)
    assert all(m.dtype is torch.bfloat16 for m in net(torch.randn(1, 3, 64, 64).bfloat16()))


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_dynamic_batch_and_size(name):
    net = small(name).eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    images = torch.randn(3, 3, 96, 128)
    for a, b in zip(net(images), program.module()(images), strict=True):
        assert_near(b, a)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph(name, checkpointing):
    torch.compiler.reset()
    net = small(name, gradient_checkpointing=checkpointing)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 96)
    sum(m.square().mean() for m in compiled(images)).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum(m.square().mean() for m in net(images)).backward()
    for a, b in zip(found, net.parameters(), strict=True):
        assert_near(a, b.grad)


def test_list_models_takes_wildcards():
    assert backbones.list_models("csp*") == ["cspdarknet19", "cspdarknet53"]
    assert backbones.list_models("*19") == ["cspdarknet19", "darknet19"]
    assert backbones.list_models("no such") == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cspdarknet35", {}, "'cspdarknet35'; nearest: cspdarknet53"),
        (5, {}, "5; nearest"),
        ("darknet19", {"out_indices": 2}, "out_indices=2 must be a tuple"),
        ("darknet19", {"width": "1"}, "width='1' must be a number"),
        ("xyz", {}, "'xyz'; nearest: cspdarknet19, cspdarknet53, darknet19, darknet53"),
        ("darknet53", {"split": "slice"}, "darknet53 takes no 'split'; it takes act, width"),
        ("cspdarknet53", {"splits": 1}, "no 'splits'; it takes split, layout, act, width"),
        ("cspdarknet53", {"split": "both"}, "split='both' must be one of"),
        ("cspdarknet53", {"layout": "wide"}, "layout='wide' must be one of"),
        ("cspdarknet53", {"layout": "darknet", "split": "partial"}, "separate"),
        ("darknet19", {"act": "swish"}, "act='swish' is not an activation; choose from"),
        ("darknet19", {"width": 0}, "width=0 must be a number above 0"),
    ],
)
def test_create_says_what_it_accepts(name, options, words):
    with pytest.raises(ValueError, match=words):
        backbones.create(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_is_pool_and_linear(name):
    net = Classifier(small(name), 7).eval()
    images = torch.randn(2, 3, 64, 96)
    pooled = net.backbone(images)[-1].flatten(2).mean(2)
    expected = pooled @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def test_classifier_needs_a_class():
    with pytest.raises(ValueError, match="num_classes=0"):
        Classifier(small("darknet19"), 0)
