"""Optimized networks against the ones they were made from."""

import copy
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from helpers import randomise_norms
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import parametrizations, prune
from torchvision.models.resnet import BasicBlock

import backbones
from backbones import create_classifier, deploy
from backbones.deploy import optimize

DTYPES = (torch.float32, torch.bfloat16)
# A network of each kind of block, and the options that change how it is optimized.
KINDS = [
    ("cspdarknet53", {"width": 0.25}),
    ("cspdarknet53", {"width": 0.25, "split": "slice", "act": "mish"}),
    ("cspdarknet53", {"width": 0.25, "layout": "darknet"}),
    ("darknet19", {"width": 0.25, "act": "leaky_relu"}),
    ("vovnet39", {"width": 0.25}),
    ("vovnet19_slim", {"ese": "last", "stem_stride": 4}),
    ("resnet18", {"out_indices": (0, 2), "in_channels": 1}),
    ("resnext50_32x4d", {}),
    ("mobilenet_v2", {"tap": "block"}),
    ("mobilenet_v3_small", {}),
    ("efficientnet_b0", {}),
]


def make(name, **options):
    torch.manual_seed(0)
    return randomise_norms(backbones.create(name, **options)).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def error(found, expected):
    """Largest difference over the largest value, of the worst map."""
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_gives_the_same_maps(name, options, dtype):
    """To rounding in float32; about as close as the plain network of that type in bfloat16."""
    net = make(name, **options)
    state = copy.deepcopy(net.state_dict())
    fast, plain = optimize(net, dtype), copy.deepcopy(net).to(dtype)
    for size in ((64, 96), (37, 64)):
        x = images(2, net.in_channels, *size)
        expected, maps = net(x), fast(x)
        limit = 1e-5 if dtype == torch.float32 else 2 * error(plain(x.to(dtype)), expected)
        assert {m.dtype for m in maps} == {dtype}
        assert error(maps, expected) < limit
    assert (fast.channels, fast.strides) == (net.channels, net.strides)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fast.modules())
    for key, tensor in net.state_dict().items():  # the original is as it was
        assert torch.equal(tensor, state[key])


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class PreNorm(BasicBlock):
    """Runs its norm before the convolution that is registered before it."""

    def forward(self, x):
        return x + self.conv1(self.bn1(x))


def double(module, inputs, output):
    return 2 * output


# What a convolution or a norm of ResNet-18 may be instead, or have, that folding would lose.
REPLACED = {
    "padding_mode": ("conv1", nn.Conv2d(3, 64, 7, 2, 3, padding_mode="reflect")),
    "subclass of Conv2d": ("layer1.0.conv1", Doubled(64, 64, 3, padding=1)),
    "subclass of BasicBlock": ("layer1.0", PreNorm(64, 64)),
    "GroupNorm": ("layer1.0.bn2", nn.GroupNorm(4, 64)),
    "SyncBatchNorm": ("layer1.0.bn1", nn.SyncBatchNorm(64)),
    # Its second name is one that `named_children` skips.
    "shared activation": (
        "maxpool",
        nn.Sequential(relu := nn.ReLU(), nn.Conv2d(64, 64, 1, 2), relu, nn.BatchNorm2d(64)),
    ),
}
CHANGES = {
    "hook of a convolution": lambda net: net.layer1[0].conv1.register_forward_hook(double),
    "pre-hook": lambda net: net.layer2[0].conv2.register_forward_pre_hook(lambda m, x: 2 * x[0]),
    "patched forward": lambda net: setattr(net.layer1[0].bn1, "forward", lambda x: -x),
    "no running statistics": lambda net: setattr(
        net.layer1[0], "bn2", nn.BatchNorm2d(64, track_running_stats=False)
    ),
    "shared convolution": lambda net: setattr(net.layer1[0], "conv2", net.layer1[0].conv1),
    "pruned": lambda net: prune.l1_unstructured(net.layer1[0].conv1, "weight", amount=0.5),
    "parametrized": lambda net: parametrizations.spectral_norm(net.layer1[0].conv1),
}


@pytest.mark.parametrize("change", [*REPLACED, *CHANGES])
def test_changed_networks_keep_their_function(change):
    net, x = make("resnet18"), images(2, 3, 64, 64)
    plain = net(x)
    with torch.no_grad():  # a pruned weight with a gradient cannot be copied
        if change in REPLACED:
            path, module = REPLACED[change]
            net.set_submodule(path, randomise_norms(copy.deepcopy(module)))
        else:
            CHANGES[change](net)
    net.requires_grad_(False).eval()
    expected = net(x)
    assert error(plain, expected) > 1e-3
    assert error(optimize(net)(x), expected) < 1e-5


def test_changed_csp_stages_keep_their_function():
    """Two different convolutions are not merged, nor those with hooks."""
    net, x = make("cspdarknet19", width=0.25), images(2, 3, 64, 64)
    stages = net.stages
    stages[1].shortcut_conv.act = nn.SiLU()
    stages[2].blocks_conv.register_forward_hook(double)
    stages[3].blocks_conv.norm = nn.GroupNorm(4, stages[3].blocks_conv.conv.out_channels)
    fast = optimize(net)
    assert error(fast(x), net(x)) < 1e-5
    assert [stage.split for stage in fast.stages[1:]] == ["separate"] * 3 + ["slice"]


def test_classifiers():
    torch.manual_seed(0)
    net, x = randomise_norms(create_classifier("resnet18", 7)).eval(), images(2, 3, 64, 64)
    assert error([optimize(net)(x)], [net(x)]) < 1e-5


def test_is_for_inference_only():
    fast = optimize(make("cspdarknet19", width=0.25))
    assert not any(m.training for m in fast.train().modules())
    x = images(1, 3, 64, 64)
    assert not any(m.requires_grad for m in fast(x.requires_grad_()))
    with torch.autocast("cpu", torch.bfloat16):
        assert {m.dtype for m in fast(x)} == {torch.float32}
    with torch.inference_mode():
        again = optimize(make("cspdarknet19", width=0.25))
    assert error(again(x), fast(x)) == 0


def test_takes_images_of_any_floating_point_type_and_no_others():
    fast, x = optimize(make("cspdarknet19", width=0.25)), images(1, 3, 64, 64)
    assert error(fast(x.double()), fast(x)) < 1e-6
    with pytest.raises(ValueError, match=r"torch.uint8 .*; expected a floating-point tensor"):
        fast(x.to(torch.uint8))


def test_pickles_and_state_dicts():
    fast, x = optimize(make("vovnet19_slim")), images(1, 3, 64, 64)
    other = optimize(randomise_norms(backbones.create("vovnet19_slim")))
    other.load_state_dict(fast.state_dict())
    for each in (other, pickle.loads(pickle.dumps(fast))):
        assert error(each(x), fast(x)) == 0


@pytest.mark.parametrize(
    ("name", "options"), [("cspdarknet19", {}), ("vovnet39", {"width": 0.25}), ("resnet18", {})]
)
def test_exports_and_compiles_in_another_graph(name, options):
    net = make(name, **options)
    fast = optimize(net)
    sizes = {0: torch.export.Dim("n", min=1, max=8)}
    sizes |= {d: 32 * torch.export.Dim(k, min=2, max=8) for d, k in ((2, "h"), (3, "w"))}
    program = torch.export.export(fast, (images(2, 3, 64, 64),), dynamic_shapes=(sizes,))
    x = images(3, 3, 96, 128)
    expected = net(x)
    assert error(program.module()(x), expected) < 1e-5
    torch.compiler.reset()
    assert error(torch.compile(fast, fullgraph=True, backend="eager")(x), expected) < 1e-5


def test_compiles_with_frozen_weights():
    """At every image size; after an error too; and past Dynamo's limit of graphs per class."""
    torch.compiler.reset()
    net = make("cspdarknet19", width=0.25)
    fast = optimize(net, compile=True)
    with pytest.raises(ValueError, match="images are"):
        fast(images(3, 64, 64))
    with torch._dynamo.config.patch(recompile_limit=1):
        for shape in ((2, 3, 64, 64), (1, 3, 64, 96)):
            maps, (code,) = run_and_get_code(fast, images(*shape))
            assert not torch.backends.mkldnn.is_available() or "mkldnn._convolution" in code
            assert error(maps, net(images(*shape))) < 1e-5
    for loader in (fast, nn.Sequential(fast)):
        with pytest.raises(ValueError, match="froze the weights of this optimized network"):
            loader.load_state_dict(loader.state_dict())
    assert pickle.loads(pickle.dumps(fast)).compiled


def test_validates_network_and_type():
    with pytest.raises(ValueError, match="net is a Conv2d; expected a Backbone or a Classifier"):
        optimize(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"dtype=torch.float16 must be one of \(torch.float32"):
        optimize(make("resnet18"), torch.float16)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(deploy.ctypes.CDLL(None), "mallopt"),
    reason="only glibc can be told to keep memory",
)
def test_freed_memory_is_kept():
    """Page faults of eight allocations of 64 MiB: all of their pages, then none.

    Or the pages of one of them, where a small block has taken some of the free room.
    """
    code = (
        "import resource, torch\n"
        "from backbones.deploy import keep_freed_memory\n"
        "for keep in (False, True):\n"
        "    if keep: assert keep_freed_memory()\n"
        "    for i in range(16):\n"
        "        if i == 8: start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "        torch.ones(16 << 20)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    pages = 8 * (64 << 20) // resource.getpagesize()
    assert before > 0.9 * pages
    assert after < 0.2 * pages
