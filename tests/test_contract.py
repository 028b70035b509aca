"""The contract of `backbones.base`: shapes and counts of every name, the rest once per kind."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import assert_near
from torchvision.ops import StochasticDepth

import backbones
from backbones.classifier import Classifier
from utils.measure import count_macs

NAMES = backbones.list_models()
# A network of each kind of block; costly properties are tested on these.
KINDS = [
    *("cspdarknet19", "darknet19", "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small"),
    *("resnet18", "vovnet39"),
]
_CLASSES = {backbones._MODELS[kind][0] for kind in KINDS}
KINDS += [name for name in NAMES if backbones._MODELS[name][0] not in _CLASSES]  # a new family
OTHER_SHAPES = ((3, 3, 96, 128), (1, 3, 65, 43))  # than the one that a network is traced with
FACTS = list(csv.DictReader((Path(__file__).parent / "backbone_facts.csv").open()))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def small(name, **options):
    """The network with few channels, if its family takes a width."""
    if "width" in backbones.list_options(name):
        options["width"] = 0.125
    return backbones.create(name, **options)


def deterministic(net):
    """EfficientNet skips blocks at random in training; here it does not."""
    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return net


def backward(maps):
    sum(m.square().mean() for m in maps).backward()


# ---- every name --------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact['name']} {fact['options']}")
def test_parameters_are_those_counted_elsewhere(fact):
    with torch.device("meta"):
        net = backbones.create(fact["name"], **json.loads(fact["options"]))
    assert sum(p.numel() for p in net.parameters()) == int(fact["parameters"])
    assert " ".join(map(str, net.channels)) == fact["channels"]
    assert f"{count_macs(net, 224, 224) / 1e9:.2f}" == fact["gmacs_224"]


def test_maps_have_the_promised_shapes(name):
    assert any(fact["name"] == name for fact in FACTS)
    with torch.device("meta"):
        net = backbones.create(name)
        assert all(module.training for module in net.modules())
        for height, width in ((64, 96), (65, 43)):
            assert [tuple(m.shape) for m in net(torch.empty(2, 3, height, width))] == [
                (2, c, math.ceil(height / s), math.ceil(width / s))
                for c, s in zip(net.channels, net.strides, strict=True)
            ]
        assert net.strides == tuple(net.strides[0] * 2**k for k in range(len(net.strides)))
        assert Classifier(net, 7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_options_of_every_backbone(name):
    with torch.device("meta"):
        net = backbones.create(name, in_channels=5, out_indices=(1, -2))
        assert [m.shape[1] for m in net(torch.empty(1, 5, 64, 64))] == list(net.channels)
        whole = backbones.create(name)
    assert (net.channels, net.strides) == (whole.channels[1:4:2], whole.strides[1:4:2])
    left = {key for key in whole.state_dict() if key.startswith(net.left_out)}
    assert whole.state_dict().keys() - net.state_dict().keys() == left > set()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.randn(3, 64, 64), r"torch.float32 \[3, 64, 64\]"),
        (torch.randn(1, 4, 64, 64), r"torch.float32 \[1, 4, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"torch.uint8 \[1, 3, 64, 64\]"),
        (np.zeros((1, 3, 64, 64), np.float32), "ndarray"),
    ],
)
def test_bad_images_are_one_clear_error(images, words):
    expected = r"; expected a floating-point tensor \[N, 3, H, W\]"
    with pytest.raises(ValueError, match=f"images are {words}{expected}"):
        small("darknet19")(images)


# ---- every kind --------------------------------------------------------------------------------


def test_construction_runs_nothing(kind):
    for key, buffer in small(kind).named_buffers():
        assert (buffer == (1 if key.endswith("running_var") else 0)).all(), key


def test_out_indices_pick_the_same_maps(kind):
    whole = small(kind).eval()
    images = torch.randn(1, 3, 64, 96)
    expected = whole(images)[1:4:2]
    for picked in ((1, 3), (-4, -2)):
        part = small(kind, out_indices=picked).eval()
        assert not part.load_state_dict(whole.state_dict(), strict=False).missing_keys
        for ours, theirs in zip(part(images), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_frozen_stages_do_not_change(kind):
    net = deterministic(small(kind)).freeze(2)
    net.eval().train()
    frozen = {
        id(t)
        for part in net.parts()[:3]
        for module in part
        for t in (*module.parameters(), *module.buffers())
    }
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    backward(net(torch.randn(2, 3, 64, 96)))
    optimizer.step()
    tensors = dict((*net.named_parameters(), *net.named_buffers()))
    kept = {key for key, tensor in tensors.items() if id(tensor) in frozen}
    changed = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert len(kept) > 10
    # Everything else learns and counts batches, weights and statistics alike.
    assert changed == before.keys() - kept


def test_freezing_can_be_undone():
    net = small("darknet19").freeze(5).freeze(None)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())
    for wrong in (-1, 6, True):
        with pytest.raises(ValueError, match=f"freeze={wrong} must be one of .*5, None"):
            net.freeze(wrong)


def test_gradient_checkpointing_only_saves_memory(kind):
    plain, checked = small(kind), small(kind, gradient_checkpointing=True)
    checked.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 96)
    saved = {}
    for net in (plain, checked):
        count = saved.setdefault(net, [])
        torch.manual_seed(0)  # for EfficientNet's stochastic depth
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, count=count: count.append(t.numel()) or t, lambda t: t
        ):
            maps = net(images)
        backward(maps)
    for (key, a), b in zip(plain.named_parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    # Running statistics too: the second forward pass must not update them again.
    for (key, a), b in zip(plain.named_buffers(), checked.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert sum(saved[checked]) < 0.5 * sum(saved[plain])


def test_channels_last_is_kept(kind):
    net = small(kind).eval()
    images = torch.randn(1, 3, 64, 96)
    plain = net(images)
    net = net.to(memory_format=torch.channels_last)
    maps = net(images.to(memory_format=torch.channels_last))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert_near(maps, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    net, images = small(kind).eval(), torch.randn(2, 3, 64, 96)
    expected = net(images)[0]
    maps = net.to(dtype)(images.to(dtype))
    assert all(m.dtype is dtype for m in maps)
    # Rounding errors grow from layer to layer in random networks, so only the first map is close.
    similarity = torch.cosine_similarity(maps[0].float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


@torch.no_grad()
def test_exports_with_dynamic_batch_and_size_also_to_onnx(kind, tmp_path):
    net, free = small(kind).eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )
    path = tmp_path / f"{kind}.onnx"
    torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for shape in OTHER_SHAPES:
        images = torch.randn(shape)
        expected, found = net(images), session.run(None, {entry.name: images.numpy()})
        assert_near(program.module()(images), expected)
        assert_near(map(torch.from_numpy, found), expected)


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in KINDS), ("cspdarknet19", True)]
)
def test_compiled_graphs_train_alike(kind, checkpointing):
    torch.compiler.reset()
    # Without stochastic depth, whose random numbers come in another order when compiled.
    net = deterministic(small(kind, gradient_checkpointing=checkpointing))
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 96)
    backward(compiled(images))
    backward(plain(images))
    assert_near(*([p.grad for p in each.parameters()] for each in (net, plain)))
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):  # statistics moved once
        torch.testing.assert_close(a, b)


# ---- names and options -------------------------------------------------------------------------


def test_list_models_takes_wildcards():
    assert backbones.list_models("csp*") == ["cspdarknet19", "cspdarknet53"]
    assert backbones.list_models("*19") == ["cspdarknet19", "darknet19"]
    assert backbones.list_models("no such") == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cspdarknet35", {}, "'cspdarknet35'; nearest: cspdarknet53"),
        ("xyz", {}, "'xyz'; nearest: cspdarknet19, cspdarknet53, darknet19, darknet53"),
        *(
            ("darknet19", {"out_indices": wrong}, "out_indices=.* from -5 to 4 that names each")
            for wrong in (2, (5,), (-6,), (1, 1), (2, 1), (), ("a",))
        ),
        *(
            ("darknet19", {"in_channels": wrong}, "in_channels=.* must be an integer of at least 1")
            for wrong in (0, 1.5, True)
        ),
        *(
            ("darknet19", {"width": width}, "width=.* must be a number above 0, at most 16")
            for width in ("1", True, 0, float("nan"), 1000)
        ),
        ("vovnet19_slim", {"width": -3}, "width=-3 must be a number above 0, at most 16"),
        ("darknet19", {"last_norm": "x"}, "last_norm='x' must be a finite number"),
        ("cspdarknet53", {"splits": 1}, "no 'splits'; it takes split, layout, act, width"),
        ("resnet18", {"tap": "block"}, "resnet18 takes no 'tap'; it takes out_indices, in_chann"),
        ("cspdarknet53", {"split": "both"}, "split='both' must be one of"),
        ("cspdarknet53", {"layout": "wide"}, "layout='wide' must be one of"),
        ("cspdarknet53", {"layout": "darknet", "split": "partial"}, "separate"),
        ("darknet19", {"act": "swish"}, "act='swish' must be one of"),
        ("mobilenet_v2", {"tap": "end"}, "tap='end' must be one of"),
        ("vovnet39", {"ese": 1}, r"ese=1 must be one of \(True, False, 'last'\)"),
        ("vovnet39", {"residual": "yes"}, r"residual='yes' must be one of \(True, False\)"),
        ("vovnet39", {"stem_stride": 8}, r"stem_stride=8 must be one of \(2, 4\)"),
        ("resnet18", {"gradient_checkpointing": "no"}, "gradient_checkpointing='no' must be one"),
    ],
)
def test_create_says_what_it_accepts(name, options, words):
    with pytest.raises(ValueError, match=words):
        backbones.create(name, **options)


def test_classifier_is_pool_and_head(kind):
    net = Classifier(small(kind), 7).eval()
    images = torch.randn(2, 3, 64, 96)
    expected = net.head(net.backbone(images)[-1].flatten(2).mean(2))
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_classes=0 must be an integer of at least 1"):
        Classifier(net.backbone, 0)
