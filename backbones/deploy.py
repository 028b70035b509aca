"""A trained backbone or classifier made fast for inference, or with named outputs for export.

What `optimize` changes, and why it is faster:

- BatchNorm is folded into the convolution before it, which saves a pass over every map.
- The two 1x1 convolutions that split a CSP stage become one (`backbones.darknet`).
- Weights and maps are channels_last, the layout that oneDNN's and cuDNN's fastest kernels take.
- On a CPU, activations and ResNet's additions run inside the convolution's kernel, which is handed
  weights in its own order: PyTorch's plain convolution orders them again at every call. These are
  the operators of oneDNN that `torch.compile` uses.
- In float32 on a CPU, wide 3x3 convolutions go by tiles, with a quarter of the multiplications
  (`backbones.winograd`).
- Sums and gates that autograd would need unchanged are written in place.

What is left of the time beside the convolutions is, in the main, the system's: a map of more than
32 MiB is fresh memory at every call, which Linux maps page by page. `keep_freed_memory` ends that.
"""

import copy
import ctypes
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import resnet

from backbones import darknet, vovnet, winograd
from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.torchvision_ports import TorchvisionPort

DTYPES = (torch.float32, torch.bfloat16)

# Activations that oneDNN computes with a convolution: its name and numbers for each.
FUSED: dict[type[nn.Module], Callable[[nn.Module], tuple[str, list[float], str]]] = {
    nn.ReLU: lambda act: ("relu", [], ""),
    nn.ReLU6: lambda act: ("hardtanh", [0.0, 6.0], ""),
    nn.LeakyReLU: lambda act: ("leaky_relu", [act.negative_slope], ""),
    nn.SiLU: lambda act: ("swish", [], ""),
    nn.Hardswish: lambda act: ("hardswish", [], ""),
    nn.GELU: lambda act: ("gelu", [], act.approximate),
}

NOTHING = ("none", [], "")


def optimize(
    net: nn.Module, dtype: torch.dtype = torch.float32, compile: bool = False
) -> "Optimized":
    """A copy of `net` that gives the same maps or logits, faster; `net` stays as it is.

    The copy is for inference alone: it stays in eval mode, gives no gradients, keeps its type, and
    its state dict is not one of `net`'s. Other weights come to it by `load_state_dict`; what is
    written through `.data` is not seen. It takes images of any floating point type and gives maps
    of `dtype`. With float32 they differ from `net`'s by rounding, by less than 1e-4 of each map's
    largest value; with bfloat16 by about as much as those of `net.bfloat16()` do, most often 1 or
    2 % (tests/test_deploy.py, every name). It can be exported, compiled, pickled, moved to a GPU.

    On a CPU weights are held twice, the second time in the kernels' order for images of the size
    that came last, and there those of 3x3 convolutions that go by tiles are four times as large;
    the tiles' values take several times the memory of a map while such a layer runs. A size that
    comes once runs as fast as in a plain network.

    Its compiled graphs are for one size of images each, and hold its weights: none can be loaded
    once it has run.

    Args:
        net: a `Backbone` or `Classifier`, on any device.
        dtype: `torch.float32` or `torch.bfloat16`, of weights and maps. bfloat16 is fast where the
            processor computes it (AVX-512 BF16, AMX, GPUs from Ampere on) and slow elsewhere.
        compile: whether to run `torch.compile` with frozen weights, at the first call with images
            of a new size. Needs a C++ compiler on a CPU.

    Raises:
        ValueError: `net` is another module, `dtype` another type, or a weight is computed anew at
            every call, as pruning and parametrizations do.
    """
    _refuse_others(net)
    _refuse_computed_weights(net)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES}")
    with torch.inference_mode(False), torch.no_grad():
        net = copy.deepcopy(net).eval().requires_grad_(False).float()
        for module in list(net.modules()):
            if isinstance(module, darknet.CSPStage) and module.split == "separate":
                darknet.convert_stage(module, "slice")
        _fold_norms(net)
        net = net.to(dtype=dtype, memory_format=torch.channels_last)
        _fuse_activations(net)
        _fuse_sums(net)
        return Optimized(net, dtype, compile)


class Optimized(nn.Module):
    """What `optimize` returns: `net` behind a cast of its images. Has `net`'s other attributes."""

    def __init__(self, net: nn.Module, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.net, self.dtype, self.compiled = net, dtype, compile
        self._holds_weights = False  # in a compiled graph
        if compile:  # packed weights are for one size
            self.net = torch.compile(net, dynamic=False)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """`net`'s maps, or its logits, in `dtype`; see `Backbone.forward` for what it raises."""
        device = "cpu"
        if isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4:
            images = images.to(self.dtype, memory_format=torch.channels_last)
            if torch.amp.is_autocast_available(images.device.type):
                device = images.device.type
        with torch.no_grad():
            if torch.compiler.is_exporting():
                return self.net(images)
            with torch.autocast(device, enabled=False):
                if torch.compiler.is_compiling():  # another's graph
                    return self.net(images)
                if self.compiled:
                    # An error amid a graph would leave PyTorch with pieces of it from then on.
                    getattr(self, "backbone", self)._check(images)
                with self._compiling():
                    maps = self.net(images)
            self._holds_weights = self.compiled
            return maps

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """What is compiled in it has its weights as constants, packed for the kernels.

        `torch.compile`'s own option "freezing" is read too late, when the graph is traced already.
        Its limit of eight graphs is one for all networks of a class, of which a ninth would run
        uncompiled.
        """
        if not self.compiled:
            yield
            return
        from torch._dynamo import config as dynamo  # a second's work, which others are spared
        from torch._inductor import config as inductor

        limit = dynamo.accumulated_recompile_limit
        with inductor.patch(freezing=True), dynamo.patch(recompile_limit=limit):
            yield

    def _load_from_state_dict(self, *args) -> None:
        if self._holds_weights:
            raise ValueError(
                "a compiled network that has run keeps its weights; load into the network that it "
                "was made of and call optimize again"
            )
        super()._load_from_state_dict(*args)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"_holds_weights": False})  # a copy has no graphs yet

    def train(self, mode: bool = True) -> "Optimized":
        """Stays in eval mode: there is no BatchNorm left to train."""
        return super().train(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


class FusedConv(nn.Module):
    """A convolution and the activation after it, in one kernel of oneDNN where that can be.

    Args:
        conv: what it computes; zero padding.
        act: what comes after it, or None; one of `FUSED` for one kernel.

    Shape:
        `conv`'s. `added` has the shape of the output.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.act = conv, act
        self.post = NOTHING if act is None else FUSED[type(act)](act)
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._seen: tuple | None = None
        self._packed: tuple[tuple, Tensor, Tensor] | None = None  # for what, of what, packed
        self._number = _enrol(self)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The convolution of `x`, plus `added` if given, activated."""
        weight, bias = self.conv.weight, self.conv.bias
        if self._suits_tiles(x):
            compiling = torch.compiler.is_compiling()
            by_tiles = partial(_convolve_by_tiles, self._number) if compiling else self.by_tiles
            y = by_tiles(x, weight, bias)
        elif (packed := self._packed_for(x, weight)) is None:
            y = self.conv(x)
        elif added is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, *self.geometry, *self.post
            )
        else:
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, added, packed, bias, *self.geometry, "add", 1.0, *self.post
            )
        y = y if added is None else y + added
        return y if self.act is None else self.act(y)

    def by_tiles(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of `x` alone, by `backbones.winograd`, in channels_last."""
        with torch.autocast("cpu", enabled=False):  # which would round what it multiplies
            packed = self._packed_for(x, weight, by_tiles=True)
            if packed is None:
                y = conv2d(x, weight, bias, padding=1)
                return y.contiguous(memory_format=torch.channels_last)
            biases = winograd.biases(bias)
            return winograd.convolve(
                x,
                len(weight),
                lambda values: torch.ops.mkldnn._convolution_pointwise(
                    values, packed, biases, *winograd.GEOMETRY, *NOTHING
                ),
            )

    def _suits_tiles(self, x: Tensor) -> bool:
        """Not in bfloat16, which is too coarse for them, nor in a program for other machines."""
        if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_exporting():
            return False
        return winograd.suits(self.conv, x.shape)

    def _packed_for(self, x: Tensor, weight: Tensor, by_tiles: bool = False) -> Tensor | None:
        """The weight in the order that suits images of this shape, or None to do without.

        They are packed when a shape comes a second time in a row: packing takes as long as it saves
        in one call.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if not x.is_cpu or not x.numel() or not _packs(x.dtype):
            return None
        packed = self._packed  # other threads may put theirs there
        version = 0 if weight.is_inference() else weight._version  # moves when weights are loaded
        key = (x.shape, x.dtype, by_tiles, version)
        seen, self._seen = self._seen, key
        if packed is None or packed[0] != key or packed[1] is not weight:
            if seen != key:
                return None
            kernels, geometry, shape = weight, self.geometry, x.shape
            if by_tiles:
                kernels, geometry = winograd.kernels(weight), winograd.GEOMETRY
                shape = winograd.values_shape(x.shape)
            ordered = torch.ops.mkldnn._reorder_convolution_weight(kernels, *geometry, shape)
            self._packed = packed = (key, weight, ordered)
        return packed[2]

    def _load_from_state_dict(self, *args) -> None:
        self._packed = self._seen = None  # no version tells of weights made in inference mode
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict:
        # The kernel's order is of this machine.
        return {**self.__dict__, "_packed": None, "_seen": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._number = _enrol(self)  # a copy is another one


# Compiled graphs hold no modules, and know by a number which one packs their weights.
_CONVS: weakref.WeakValueDictionary[int, FusedConv] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def _enrol(conv: FusedConv) -> int:
    number = next(_NUMBERS)
    _CONVS[number] = conv
    return number


@torch.library.custom_op("backbones::convolve_by_tiles", mutates_args=(), device_types="cpu")
def _convolve_by_tiles(number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `torch.compile` calls and does not look into, as the weights' packing is kept."""
    return _CONVS[number].by_tiles(x, weight, bias)


@_convolve_by_tiles.register_fake
def _(number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images, _, height, width = x.shape
    return x.new_empty((images, height, width, len(weight))).permute(0, 3, 1, 2)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of this type for this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class _Block(darknet.Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)).add_(x)


class _OSABlock(vovnet.OSABlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.aggregate(x)
        if self.ese is not None:
            y = y.mul_(self.ese.gates(y))
        return y.add_(x) if self.residual else y


class _BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv2(self.conv1(x), shortcut)


class _Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)


IN_PLACE = {darknet.Block: _Block, vovnet.OSABlock: _OSABlock}
RESIDUAL = {resnet.BasicBlock: _BasicBlock, resnet.Bottleneck: _Bottleneck}


def _fold_norms(module: nn.Module) -> None:
    """Folds each BatchNorm into the convolution registered right before it, which it follows.

    That holds in the modules of the families and in torchvision's.
    """
    before, conv = "", None
    for name, child in list(module.named_children()):
        folds = isinstance(child, _BatchNorm) and child.track_running_stats
        if folds and isinstance(conv, nn.Conv2d):
            setattr(module, before, fuse_conv_bn_eval(conv, child))
            setattr(module, name, nn.Identity())
        else:
            _fold_norms(child)
        before, conv = name, child


def _fuse_activations(net: nn.Module) -> None:
    """Puts every convolution into a `FusedConv`, with the activation that runs next, if any."""
    for run in list(_runs(net)):
        for i, path in enumerate(run):
            conv = net.get_submodule(path)
            if not isinstance(conv, nn.Conv2d):
                continue
            after = [p for p in run[i + 1 :] if type(net.get_submodule(p)) is not nn.Identity]
            act = net.get_submodule(after[0]) if after else None
            if type(act) in FUSED:
                net.set_submodule(after[0], nn.Identity())
            net.set_submodule(path, FusedConv(conv, act if type(act) in FUSED else None))
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and not isinstance(parent, FusedConv):
                setattr(parent, name, FusedConv(child))


def _runs(net: nn.Module) -> Iterator[list[str]]:
    """Names of modules that run one right after another."""
    for path, module in net.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Sequential):
            yield [f"{prefix}{name}" for name, _ in module.named_children()]
        elif isinstance(module, TorchvisionPort):
            yield from ([prefix + p for p in part] for part in module.paths)


def _fuse_sums(net: nn.Module) -> None:
    """Has residual blocks and gates write in place, ResNet's inside the last convolution."""
    for module in net.modules():
        if type(module) in IN_PLACE:
            module.__class__ = IN_PLACE[type(module)]
        elif type(module) in RESIDUAL and _is_plain(module):
            module.__class__ = RESIDUAL[type(module)]
            for name, child in module.named_children():
                if isinstance(child, FusedConv):
                    setattr(module, name, FusedConv(child.conv, nn.ReLU()))


def _is_plain(block: resnet.BasicBlock | resnet.Bottleneck) -> bool:
    """Whether its norms have been folded and its activation is its own."""
    norms = [child for name, child in block.named_children() if name.startswith("bn")]
    return type(block.relu) is nn.ReLU and all(type(norm) is nn.Identity for norm in norms)


def _refuse_others(net: object) -> None:
    if not isinstance(net, (Backbone, Classifier)):
        raise ValueError(f"net is a {type(net).__name__}; expected a Backbone or a Classifier")


def _refuse_computed_weights(net: nn.Module) -> None:
    for name, module in net.named_modules():
        own = module._parameters
        pruned = any(key.endswith("_orig") for key in own)
        if pruned or (isinstance(module, (nn.Conv2d, nn.Linear)) and "weight" not in own):
            raise ValueError(
                f"a weight of {name} is computed at every call; make it a parameter first, by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )


class NamedOutputs(nn.Module):
    """A network whose outputs have names, as `torch.export` and ONNX keep them.

    Args:
        net: a `Backbone`, whose maps are called "stride_2", "stride_4" and so on by their strides,
            or a `Classifier`, whose output is called "logits".

    Attributes:
        names: of the outputs, in order.
        in_channels: of the images.

    Raises:
        ValueError: `net` is another module.
    """

    def __init__(self, net: Backbone | Classifier) -> None:
        super().__init__()
        _refuse_others(net)
        self.net = net
        if isinstance(net, Backbone):
            self.names = [f"stride_{stride}" for stride in net.strides]
            self.in_channels = net.in_channels
        else:
            self.names, self.in_channels = ["logits"], net.backbone.in_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`net`'s maps or logits of `images` `[N, in_channels, H, W]`, by name."""
        outputs = self.net(images)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return dict(zip(self.names, outputs, strict=True))


def keep_freed_memory() -> bool:
    """Has this process keep the memory that it frees, for what it allocates next.

    By default glibc gives large blocks back to the system, and gets each of them again as pages of
    zeros, one page fault per 4 KiB. On CPUs that took up to a third of the time of a forward pass
    (results/benchmark_*.csv has both). The price: the process stays as large as it ever was. Call
    it once, before or after anything else.

    Returns:
        Whether it was done: on Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    never_trim = mallopt(-1, -1)  # M_TRIM_THRESHOLD of malloc.h
    never_map = mallopt(-4, 0)  # M_MMAP_MAX
    return bool(never_trim and never_map)
