"""The contract of `backbones.base`, over every name."""

import copy
import csv
import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torchvision.models import efficientnet, resnet
from torchvision.ops import StochasticDepth

import backbones
from backbones.classifier import Classifier
from utils.measure import count_macs

NAMES = backbones.list_models()
PORTS = [
    name
    for name in NAMES
    if name.startswith(("resnet", "resnext", "wide_resnet", "mobilenet", "efficientnet"))
]
BLOCKS = 2  # every kind of block and of junction is there
# Names whose small networks differ in more than depth and width; what takes seconds is shown on
# these alone.
KINDS = [
    *("cspdarknet19", "cspdarknet53", "darknet19", "darknet53", "efficientnet_b0"),
    *("efficientnet_b5", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *("resnet18", "resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d"),
    *("vovnet19_slim", "vovnet39", "vovnet99", "wide_resnet50_2"),
]
# Of a family that is new, every name.
_CLASSES = {backbones._MODELS[kind][0] for kind in KINDS}
KINDS += [name for name in NAMES if backbones._MODELS[name][0] not in _CLASSES]
# Kinds whose operators another kind has, in other numbers and sizes: the translation of operators
# to ONNX takes seconds and is shown once each.
SAME_OPERATORS = {
    *("cspdarknet53", "darknet19", "darknet53", "efficientnet_b5", "mobilenet_v3_small"),
    *("resnet50", "resnext101_32x8d", "resnext101_64x4d", "vovnet19_slim", "vovnet99"),
    "wide_resnet50_2",
}
OTHER_SHAPES = ((3, 3, 96, 128), (1, 3, 65, 43))  # than the one that a network is traced with
FACTS = list(csv.DictReader((Path(__file__).parent / "backbone_facts.csv").open()))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(name, **options):
    """The same code with few channels and at most `BLOCKS` blocks per stage.

    torchvision's ResNets and EfficientNets have one width, and its MobileNets one depth too.
    """
    network, config = backbones._MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "_resnet", partial(shallow_resnet, resnet._resnet))
        patch.setattr(
            efficientnet,
            "_efficientnet_conf",
            partial(shallow_efficientnet, efficientnet._efficientnet_conf),
        )
        if name not in PORTS:
            options["width"] = 0.125
            depths = tuple(min(depth, BLOCKS) for depth in config.depths)
            config = dataclasses.replace(config, depths=depths)
            patch.setitem(backbones._MODELS, name, (network, config))
        return backbones.create(name, **options)


def shallow_resnet(original, block, layers, *args, **options):
    return original(block, [min(depth, BLOCKS) for depth in layers], *args, **options)


def shallow_efficientnet(original, arch, **options):
    """EfficientNet-B0 has up to four blocks per stage, the others `depth_mult` times as many."""
    return original(arch, **{**options, "depth_mult": BLOCKS / 4})


def without_chance(net):
    """EfficientNet skips blocks at random in training; here it does not."""
    for module in net.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return net


def assert_near(found, expected):
    """Equal to 1e-4 of the largest value, as deep float32 sums in another order are."""
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact['name']} {fact['options']}")
def test_parameters_are_those_counted_elsewhere(fact):
    with torch.device("meta"):
        net = backbones.create(fact["name"], **json.loads(fact["options"]))
    assert sum(p.numel() for p in net.parameters()) == int(fact["parameters"])
    assert " ".join(map(str, net.channels)) == fact["channels"]
    assert f"{count_macs(net, 224, 224) / 1e9:.2f}" == fact["gmacs_224"]


def test_kinds_stand_for_every_name():
    """The others have the modules of one of them, once blocks are few, with other channels."""
    facts = ("kernel_size", "stride", "padding", "eps", "p")
    modules = {}
    with torch.device("meta"):
        for name in NAMES:
            every = small(name).modules()
            modules[name] = tuple((type(m), *(getattr(m, f, None) for f in facts)) for m in every)
    assert {modules[kind] for kind in KINDS} == set(modules.values())


def test_every_name_has_its_facts():
    assert sorted(fact["name"] for fact in FACTS if fact["options"] == "{}") == NAMES


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


def test_construction_runs_nothing(name):
    net = small(name)
    assert all(module.training for module in net.modules())
    for key, buffer in net.named_buffers():
        assert (buffer == (1 if key.endswith("running_var") else 0)).all(), key


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


@pytest.mark.parametrize("indices", [(5,), (-6,), (1, 1), (2, 1), (), ("a",), (True,)])
def test_bad_out_indices_are_refused(indices):
    with pytest.raises(ValueError, match="out_indices="):
        small("darknet19", out_indices=indices)


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
        ([[0.0]], r"images are a list; expected a tensor \[N, C, H, W\]"),
    ],
)
def test_bad_input_is_one_clear_error(name, images, words):
    with pytest.raises(ValueError, match=words):
        small(name)(images)


def test_frozen_stages_stay_as_they_are(kind):
    net = without_chance(small(kind)).freeze(2)
    net.eval().train()
    frozen = {
        id(t)
        for part in net.parts()[:3]
        for module in part
        for t in (*module.parameters(), *module.buffers())
    }
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in net.parameters() if p.requires_grad), lr=0.1)
    sum(m.square().mean() for m in net(torch.randn(2, 3, 64, 96))).backward()
    optimizer.step()
    tensors = dict((*net.named_parameters(), *net.named_buffers()))
    kept = {key for key, tensor in tensors.items() if id(tensor) in frozen}
    changed = {key for key, tensor in tensors.items() if not torch.equal(tensor, before[key])}
    assert len(kept) > 10
    # Everything else learns and counts batches, weights and statistics alike.
    assert changed == before.keys() - kept


def test_freezing_can_be_taken_back():
    net = small("darknet19").freeze(5).freeze(None)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())
    for wrong in (-1, 6, True, 1.0):
        with pytest.raises(ValueError, match="choose 0 to 5 stages"):
            net.freeze(wrong)


def test_gradient_checkpointing_changes_memory_only(kind):
    plain, checked = small(kind), small(kind, gradient_checkpointing=True)
    checked.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 96)
    saved = {}
    for net in (plain, checked):
        count = saved.setdefault(net, [])
        torch.manual_seed(0)  # of EfficientNet's stochastic depth
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


def test_channels_last_goes_through(kind):
    net = small(kind).eval()
    images = torch.randn(1, 3, 64, 96)
    plain = net(images)
    net = net.to(memory_format=torch.channels_last)
    for a, b in zip(plain, net(images.to(memory_format=torch.channels_last)), strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert_near(b, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    net, images = small(kind).eval(), torch.randn(2, 3, 64, 96)
    expected = net(images)[0]
    maps = net.to(dtype)(images.to(dtype))
    assert all(m.dtype is dtype for m in maps)
    # Rounding grows from layer to layer in random networks: the first map shows whether it is one.
    similarity = torch.cosine_similarity(maps[0].float().flatten(), expected.flatten(), dim=0)
    assert similarity > 0.999


def exported(net):
    free = torch.export.Dim.DYNAMIC
    return torch.export.export(
        net, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: free, 2: free, 3: free},)
    )


@torch.no_grad()
def test_exports_with_dynamic_batch_and_size(kind):
    net = small(kind).eval()
    program = exported(net).module()
    for shape in OTHER_SHAPES:
        images = torch.randn(shape)
        for a, b in zip(net(images), program(images), strict=True):
            assert_near(b, a)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SAME_OPERATORS])
def test_onnx_has_dynamic_batch_and_size(kind, tmp_path):
    net = small(kind).eval()
    path = tmp_path / f"{kind}.onnx"
    torch.onnx.export(exported(net), dynamo=True, optimize=False, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for shape in OTHER_SHAPES:
        images = torch.randn(shape)
        for a, b in zip(net(images), session.run(None, {entry.name: images.numpy()}), strict=True):
            assert a.shape == b.shape
            assert_near(torch.from_numpy(b), a)


def test_compiles_to_one_graph(kind):
    """Traced whole; what the graph then computes is tested below for each kind of network."""
    torch.compiler.reset()
    net = small(kind)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    images = torch.randn(2, 3, 64, 96)
    for a, b in zip(net.eval()(images), compiled.eval()(images), strict=True):
        assert_near(b, a)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["darknet19", "cspdarknet19", "vovnet39", "resnet18", "mobilenet_v3_small", "efficientnet_b0"],
)
def test_compiled_graphs_learn_alike(kind, checkpointing):
    torch.compiler.reset()
    # Chance, because it is drawn in another order when compiled.
    net = without_chance(small(kind, gradient_checkpointing=checkpointing))
    plain = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 64, 96)
    sum(m.square().mean() for m in compiled(images)).backward()
    sum(m.square().mean() for m in plain(images)).backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert_near(a.grad, b.grad)
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):  # statistics moved once
        torch.testing.assert_close(a, b)


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
        *(
            (name, {"width": width}, "width=.* must be a number above 0, at most 16")
            for name in ("darknet19", "vovnet19_slim")
            for width in ("1", None, True, 0, -3, float("nan"), float("inf"), 1000)
        ),
        ("xyz", {}, "'xyz'; nearest: cspdarknet19, cspdarknet53, darknet19, darknet53"),
        ("darknet53", {"split": "slice"}, "darknet53 takes no 'split'; it takes act, width"),
        ("cspdarknet53", {"splits": 1}, "no 'splits'; it takes split, layout, act, width"),
        ("cspdarknet53", {"split": "both"}, "split='both' must be one of"),
        ("cspdarknet53", {"layout": "wide"}, "layout='wide' must be one of"),
        ("cspdarknet53", {"layout": "darknet", "split": "partial"}, "separate"),
        ("darknet19", {"act": "swish"}, "act='swish' is not an activation; choose from"),
        ("resnet18", {"in_channels": True}, "in_channels=True must be an integer"),
        ("resnet18", {"gradient_checkpointing": "no"}, "gradient_checkpointing='no' must be True"),
    ],
)
def test_create_says_what_it_accepts(name, options, words):
    with pytest.raises(ValueError, match=words):
        backbones.create(name, **options)


def test_classifier_is_pool_and_linear(name):
    net = Classifier(small(name), 7).eval()
    images = torch.randn(2, 3, 64, 96)
    pooled = net.backbone(images)[-1].flatten(2).mean(2)
    expected = net.head(pooled)
    assert [m for m in net.head.modules() if isinstance(m, torch.nn.Linear)][-1].out_features == 7
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


def test_classifier_needs_a_class():
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"num_classes={wrong}"):
            Classifier(small("darknet19"), wrong)
    with pytest.raises(ValueError, match="backbone is a str; give a Backbone"):
        Classifier("darknet19", 3)
