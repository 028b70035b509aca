"""Optimized networks against the ones they were made of, over all names."""

import copy
import io
import pickle
import resource
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import needs_onednn
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import utils as dynamo_utils
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock

import backbones
from backbones import create_classifier, deploy
from backbones.deploy import FusedConv, optimize
from backbones.layers import ACTIVATIONS, ConvNormAct

DTYPES = (torch.float32, torch.bfloat16)


def trained(net):
    """The same network with statistics and weights of BatchNorm that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.8, 1.2),
                (module.bias.data, -0.1, 0.1),
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.8, 1.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return net.eval()


def make(name, **options):
    torch.manual_seed(0)
    if "width" in backbones._keywords(backbones._MODELS[name][0]):
        options = {"width": 0.25, **options}
    return trained(backbones.create(name, **options))


def with_other_weights(net):
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1.1)
    return net


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def error(found, expected):
    """Largest difference over the largest value, of the worst map."""
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@torch.no_grad()
def outputs(net, x):
    found = net(x)
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", backbones.list_models())
def test_gives_the_same_maps(name, dtype):
    """To rounding in float32; about as near as the plain network of that type in bfloat16."""
    net = make(name)
    state = copy.deepcopy(net.state_dict())
    fast = optimize(net, dtype)
    plain = copy.deepcopy(net).to(dtype)
    for shape in ((2, 3, 64, 96), (1, 3, 37, 64)):
        x = images(*shape)
        expected = outputs(net, x)
        most = 1e-4 if dtype == torch.float32 else 2 * error(outputs(plain, x.to(dtype)), expected)
        for _ in range(3):  # plain weights, weights that are packed now, packed weights
            maps = fast(x)
            assert [m.dtype for m in maps] == [dtype] * len(maps)
            assert error(maps, expected) < most
    assert (fast.channels, fast.strides) == (net.channels, net.strides)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules())
    for key, tensor in net.state_dict().items():  # the original is as it was
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize("name", ["cspdarknet53", "darknet53", "vovnet57", "resnet50"])
def test_gives_the_same_maps_by_tiles(name, all_by_tiles):
    net, x = make(name), images(2, 3, 64, 96)
    fast, expected = optimize(net), outputs(net, x)
    assert all(error(fast(x), expected) < 1e-4 for _ in range(3))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act):
    net, x = make("cspdarknet19", act=act), images(2, 3, 64, 64)
    fast, expected = optimize(net), outputs(net, x)
    assert all(error(fast(x), expected) < 1e-5 for _ in range(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cspdarknet53", {"split": "slice"}),
        ("cspdarknet53", {"split": "partial"}),
        ("cspdarknet53", {"layout": "darknet", "act": "leaky_relu"}),
        ("vovnet39", {"ese": "last", "stem_stride": 4}),
        ("vovnet39", {"residual": False, "ese": False}),
        ("mobilenet_v2", {"tap": "block"}),
        ("resnet18", {"out_indices": (0, 2), "in_channels": 1}),
    ],
)
def test_every_option(name, options):
    net = make(name, **options)
    x = images(2, net.in_channels, 64, 96)
    fast, expected = optimize(net), outputs(net, x)
    assert all(error(fast(x), expected) < 1e-5 for _ in range(3))


@pytest.mark.parametrize("name", ["cspdarknet19", "resnet18", "mobilenet_v3_small"])
def test_classifiers(name):
    torch.manual_seed(0)
    net, x = trained(create_classifier(name, 7)), images(2, 3, 64, 64)
    assert error(outputs(optimize(net), x), outputs(net, x)) < 1e-5


def test_what_is_merged():
    """A CSP stage's two split convolutions are one; ResNet's sums and activations are fused."""
    net = optimize(make("cspdarknet53"))
    separate = sum(isinstance(m, nn.Conv2d) for m in make("cspdarknet53").modules())
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == separate - 5
    assert all(type(m.act) is nn.Identity for m in net.modules() if isinstance(m, ConvNormAct))
    convs = [m for m in optimize(make("resnet50")).modules() if isinstance(m, FusedConv)]
    assert sum(conv.act is not None for conv in convs) == 1 + 3 * 16  # not the four shortcuts


def test_is_for_inference_alone():
    fast = optimize(make("cspdarknet19"))
    assert not fast.train().training
    assert not any(m.training for m in fast.modules())
    x = images(1, 3, 64, 64).requires_grad_()
    assert not any(m.requires_grad for m in fast(x))


def test_images_of_any_floating_point_type_and_no_others():
    fast, x = optimize(make("cspdarknet19")), images(1, 3, 64, 64)
    assert error(fast(x.double()), fast(x)) < 1e-6
    with pytest.raises(ValueError, match=r"torch.uint8; expected a floating point type"):
        fast(x.to(torch.uint8))
    with pytest.raises(ValueError, match=r"\[1, 4, 64, 64\]; expected \[N, 3, H, W\]"):
        fast(images(1, 4, 64, 64))
    with pytest.raises(ValueError, match=r"\[3, 64, 64\]"):
        fast(images(3, 64, 64))
    assert [len(m) for m in fast(images(0, 3, 64, 64))] == [0] * 5


def test_new_weights_are_packed_anew():
    """Loading into an optimized network moves no memory, so its address tells nothing."""
    x, other = images(1, 3, 64, 64), with_other_weights(make("cspdarknet19"))
    for assign in (False, True):
        fast = optimize(make("cspdarknet19"))
        for _ in range(3):
            fast(x)
        fast.load_state_dict(optimize(other).state_dict(), assign=assign)
        assert all(error(fast(x), outputs(other, x)) < 1e-5 for _ in range(3))


def test_weights_loaded_in_inference_mode_are_packed_anew():
    """Tensors that are made there have no version."""
    x, other = images(1, 3, 64, 64), with_other_weights(make("cspdarknet19"))
    with torch.inference_mode():
        fast = copy.deepcopy(optimize(make("cspdarknet19")))
        for _ in range(3):
            fast(x)
        fast.load_state_dict(optimize(other).state_dict())
        assert all(error(fast(x), outputs(other, x)) < 1e-5 for _ in range(3))


def test_copies_and_pickles():
    fast, x = optimize(make("vovnet19_slim")), images(1, 3, 64, 64)
    expected = fast(x)
    assert error(copy.deepcopy(fast)(x), expected) == 0
    assert error(pickle.loads(pickle.dumps(fast))(x), expected) == 0
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert error(torch.load(buffer, weights_only=False)(x), expected) == 0


@pytest.mark.parametrize("name", ["cspdarknet19", "vovnet39", "resnet18"])
def test_exports(name):
    net = make(name)
    fast = optimize(net)
    sizes = {0: torch.export.Dim("n", min=1, max=8)}
    sizes |= {d: 32 * torch.export.Dim(k, min=2, max=8) for d, k in ((2, "h"), (3, "w"))}
    program = torch.export.export(fast, (images(2, 3, 64, 64),), dynamic_shapes=(sizes,))
    x = images(3, 3, 96, 128)
    assert error(program.module()(x), outputs(net, x)) < 1e-5


def test_traces():
    """By TorchScript, which knows no packed weights; after calls that packed them."""
    net, x = make("resnet18"), images(2, 3, 64, 64)
    fast = optimize(net)
    for _ in range(3):
        fast(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(fast, x), buffer)
    buffer.seek(0)
    assert error(torch.jit.load(buffer)(x), outputs(net, x)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_compiles(dtype, most):
    net, x = make("cspdarknet19"), images(2, 3, 64, 64)
    fast = optimize(net, dtype, compile=True)
    assert error(fast(x), outputs(net, x)) < most
    assert fast.strides == net.strides


def test_compiled_networks_have_packed_weights_at_every_size():
    """By itself PyTorch makes the second graph one for all sizes, for which it packs none."""
    torch.compiler.reset()
    net = make("cspdarknet19")
    fast = optimize(net, compile=True)
    for shape in ((2, 3, 64, 64), (1, 3, 64, 96)):
        maps, (code,) = run_and_get_code(fast, images(*shape))
        assert "mkldnn._convolution_pointwise" in code
        assert error(maps, outputs(net, images(*shape))) < 1e-5


def test_compiled_networks_that_have_run_refuse_weights():
    """Their graphs hold some of the old ones: maps would be of neither network."""
    net, x = make("cspdarknet19"), images(1, 3, 32, 32)
    fast = optimize(net, compile=True)
    state = optimize(trained(make("cspdarknet19")), compile=True).state_dict()
    with pytest.raises(ValueError, match="images"):
        fast(x[0])
    fast.load_state_dict(state)
    fast(x)
    with pytest.raises(ValueError, match="that has run keeps its weights; load into the network"):
        nn.Sequential(fast).load_state_dict({f"0.{key}": state[key] for key in state})
    copy.deepcopy(fast).load_state_dict(state)  # has no graph yet


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_no_type(dtype):
    net, x = make("resnet18"), images(2, 3, 64, 64)
    fast = optimize(net, dtype)
    expected = fast(x)
    most = 1e-5 if dtype == torch.float32 else 0.03
    in_graph = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        for call in (fast, fast, fast, in_graph):
            maps = call(x)
            assert {m.dtype for m in maps} == {dtype}
            assert error(maps, expected) < most


@needs_onednn
def test_weights_are_packed_for_sizes_that_come_twice_in_a_row():
    conv = FusedConv(nn.Conv2d(4, 4, 1)).requires_grad_(False)
    a, b = images(1, 4, 8, 8), images(1, 4, 6, 8)
    conv(a)
    assert conv._packed is None
    for x, packed_for in ((a, a), (b, a), (a, a), (b, a), (a, a), (b, a), (b, b)):
        conv(x)
        assert conv._packed[0][0] == packed_for.shape


@dynamo_config.patch(recompile_limit=1)
def test_every_compiled_copy_has_its_graph():
    """Past PyTorch's limit for all networks of a class, and whole after images that are refused."""
    torch.compiler.reset()
    x = images(1, 3, 32, 32)
    backbone, classifier = make("cspdarknet19"), create_classifier("resnet18", 3).eval()
    for net in (backbone, backbone, classifier):
        fast = optimize(net, compile=True)
        with pytest.raises(ValueError, match="images are"):
            fast(x[0])
        graphs = dynamo_utils.counters["stats"]["unique_graphs"]
        assert error(outputs(fast, x), outputs(net, x)) < 1e-5
        assert dynamo_utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_networks_of_other_precision_are_taken():
    net, x = make("resnet18"), images(1, 3, 64, 64)
    assert error(optimize(copy.deepcopy(net).double())(x), outputs(net, x)) < 1e-4


@pytest.mark.parametrize("change", ["SyncBatchNorm", "GroupNorm", "SiLU"])
def test_changed_resnets_are_still_the_same(change):
    """Only blocks as torchvision has them get another forward pass."""
    net, x = make("resnet18"), images(2, 3, 64, 64)
    if change == "SyncBatchNorm":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in list(net.modules()):
        if isinstance(module, BasicBlock) and change == "GroupNorm":
            module.bn2 = nn.GroupNorm(4, module.bn2.num_features)
        if isinstance(module, BasicBlock) and change == "SiLU":
            module.relu = nn.SiLU()
    fast, expected = optimize(net.eval()), outputs(net.eval(), x)
    assert all(error(fast(x), expected) < 1e-5 for _ in range(3))


def test_works_without_onednn(monkeypatch):
    net, x = make("resnet18"), images(1, 3, 64, 64)
    fast, expected = optimize(net), outputs(net, x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert all(error(fast(x), expected) < 1e-5 for _ in range(3))
    assert all(m._packed is None for m in fast.modules() if isinstance(m, FusedConv))


def test_inference_mode_changes_nothing():
    net, x = make("cspdarknet19"), images(1, 3, 64, 64)
    with torch.inference_mode():
        fast = optimize(net)
        assert all(error(fast(x), outputs(net, x)) < 1e-5 for _ in range(3))


def test_refuses_other_modules_and_types():
    with pytest.raises(ValueError, match="net is a Conv2d; expected a Backbone or a Classifier"):
        optimize(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"dtype=torch.float16 must be one of \(torch.float32"):
        optimize(make("resnet18"), torch.float16)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (partial(prune.l1_unstructured, name="weight", amount=0.5), "conv1"),
        (partial(prune.l1_unstructured, name="bias", amount=0.5), "bn1"),
        (parametrizations.weight_norm, "conv1"),
        (parametrizations.spectral_norm, "conv1"),
    ],
)
def test_refuses_weights_that_are_computed(change, name):
    net = make("resnet18")
    block = next(m for m in net.modules() if isinstance(m, BasicBlock))
    change(block.get_submodule(name))
    with pytest.raises(ValueError, match=rf"a weight of .*{name} is computed at every call; make"):
        optimize(net)


def page_faults(keep):
    """Of the later eight of sixteen allocations of 64 MiB, in a process of its own."""
    code = (
        "import resource, torch\n"
        "from backbones.deploy import keep_freed_memory\n"
        f"print({keep} and keep_freed_memory())\n"
        "for i in range(16):\n"
        "    if i == 8: start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(16 << 20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == str(keep)
    return int(faults)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(deploy.ctypes.CDLL(None), "mallopt"),
    reason="glibc alone is told to keep memory",
)
def test_freed_memory_is_kept():
    """64 MiB are 16,384 pages of 4 KiB; eight times that many are mapped anew, or none.

    Or once, where a small block has come to lie in the room that was free.
    """
    pages = 8 * (64 << 20) // resource.getpagesize()
    assert page_faults(keep=False) > 0.9 * pages
    assert page_faults(keep=True) < 0.2 * pages
