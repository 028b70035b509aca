"""Inference copies of a trained network, and names for its outputs in an exported graph."""

import copy
import ctypes
import sys
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import resnet

from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.darknet import CSPStage, convert_stage
from backbones.torchvision_ports import ResNet

DTYPES = (torch.float32, torch.bfloat16)


def optimize(
    net: Backbone | Classifier, dtype: torch.dtype = torch.float32, compile: bool = False
) -> "Optimized":
    """A faster copy of `net` for inference: the same feature maps or logits up to rounding.

    BatchNorm is folded into the convolution before it, the two 1x1 convolutions that split a CSP
    stage become one, and weights and feature maps are channels_last. Convolutions and norms that
    are subclasses or have hooks stay as they are. `net` itself does not change.

    Args:
        net: a `Backbone` or `Classifier` on any device.
        dtype: `torch.float32` or `torch.bfloat16`, of the weights and outputs. bfloat16 is fast on
            CPUs with AVX-512 BF16 or AMX and on GPUs since Ampere, and slow elsewhere.
        compile: use `torch.compile` with frozen weights: each image size is compiled at its first
            call, which on a CPU needs a C++ compiler, and no other weights can be loaded.

    Raises:
        ValueError: `net` is another kind of module, or `dtype` another type.
    """
    if not isinstance(net, (Backbone, Classifier)):
        raise ValueError(f"net is a {type(net).__name__}; expected a Backbone or a Classifier")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES}")
    with torch.inference_mode(False), torch.no_grad():
        net = copy.deepcopy(net).eval().requires_grad_(False).float()
        for module in list(net.modules()):
            _fold_norms(module)
        for module in net.modules():
            if type(module) is CSPStage and module.split == "separate":
                _merge_split_convs(module)
        return Optimized(net.to(memory_format=torch.channels_last, dtype=dtype), compile)


class Optimized(nn.Module):
    """What `optimize` returns; stays in eval mode, computes no gradients and ignores autocast.

    It has `net`'s attributes, and can be exported, pickled, compiled in a larger graph and moved.
    """

    def __init__(self, net: Backbone | Classifier, compile: bool) -> None:
        super().__init__()
        self.dtype, self.compiled = next(net.parameters()).dtype, compile
        # One graph per image size: with dynamic sizes Inductor does not prepack the weights.
        self.net = torch.compile(net, dynamic=False) if compile else net
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        """`net`'s feature maps or logits of floating-point images `[N, C, H, W]`."""
        getattr(self, "backbone", self).validate_images(images)  # an error would break the graph
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if not self.compiled or torch.compiler.is_compiling():
                return self.net(images)
            from torch._dynamo import config as dynamo  # slow to import
            from torch._inductor import config as inductor

            # An option of torch.compile would freeze too late, after weights became inputs. Beyond
            # the limit, which all networks of a class share, they would run uncompiled.
            limit = dynamo.accumulated_recompile_limit
            with inductor.patch(freezing=True), dynamo.patch(recompile_limit=limit):
                return self.net(images)

    def _load_from_state_dict(self, *args) -> None:
        if self.compiled:
            reason = "compile=True froze the weights of this optimized network"
            raise ValueError(f"{reason}; load into the original one and call optimize again")
        super()._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> "Optimized":
        """Stays in eval mode, since BatchNorm is folded and cannot be trained."""
        return super().train(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("net"), name)


def _fold_norms(module: nn.Module) -> None:
    """Folds each BatchNorm of `module` that directly follows a convolution; both must be plain."""
    names = []
    if type(module).forward is nn.Sequential.forward:
        names = list(module._modules)
    elif type(module) in (resnet.BasicBlock, resnet.Bottleneck, ResNet):
        names = [name for i in (1, 2, 3) for name in (f"conv{i}", f"bn{i}")]
    for conv_name, norm_name in pairwise(names):
        conv, norm = module._modules.get(conv_name), module._modules.get(norm_name)
        foldable = _is_plain(conv, nn.Conv2d) and _is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
        if foldable and norm.running_mean is not None:
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())


def _merge_split_convs(stage: CSPStage) -> None:
    """Makes one 1x1 convolution of the two that split a stage if their norms have been folded."""
    first, second = stage.shortcut_conv, stage.blocks_conv
    plain = all(_is_plain(part, type(part)) for part in (*first.modules(), *second.modules()))
    if plain and type(first.norm) is nn.Identity and repr(first) == repr(second):
        convert_stage(stage, "slice")


def _is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether it is exactly of one of `classes`, without hooks or a replaced `forward`."""
    return type(module) in classes and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    )


class NamedOutputs(nn.Module):
    """Gives a network's outputs names, which `torch.export` and ONNX keep.

    Feature maps of a `Backbone` are named "stride_2", "stride_4", ...; the output of a `Classifier`
    is named "logits". `names` lists them in order, and `in_channels` is that of the images.
    """

    def __init__(self, net: Backbone | Classifier) -> None:
        super().__init__()
        self.net = net
        strides = net.strides if isinstance(net, Backbone) else ()
        self.names = [f"stride_{stride}" for stride in strides] or ["logits"]
        self.in_channels = getattr(net, "backbone", net).in_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps or logits of `images` `[N, in_channels, H, W]` by name."""
        outputs = self.net(images)
        maps = [outputs] if isinstance(outputs, Tensor) else outputs
        return dict(zip(self.names, maps, strict=True))


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep freed memory in the process and reuse it.

    By default glibc returns large blocks to the system, and each new one costs a page fault per
    4 KiB: up to a third of the time of a forward pass on a CPU. The process then stays at its peak
    size. Call it once, at any time. Returns whether it took effect, which needs Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h: never trim, never map.
    return mallopt is not None and bool(mallopt(-1, -1) and mallopt(-4, 0))
