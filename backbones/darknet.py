"""Darknet-19/53 and CSPDarknet-19/53.

Papers: YOLOv2 (arXiv:1612.08242, table 6: Darknet-19), YOLOv3 (arXiv:1804.02767, table 1:
Darknet-53), CSPNet (arXiv:1911.11929, figures 2, 3), YOLOv4 (arXiv:2004.10934: CSPDarknet-53).

Differences from the papers:

- ReLU by default. YOLOv2 and YOLOv3 use `act="leaky_relu"`, YOLOv4 `act="mish"`.
- Darknet-19 has YOLOv2's depths with YOLOv3's strided convolutions and residual blocks instead of
  max-pools and plain 3x3 / 1x1 sequences. It has as many parameters as darknet19.cfg.
- CSP stages have half the channels in both branches and no bottleneck in the blocks, as
  CSPDarknet-53 has from its second stage on. `layout="darknet"` gives the first stage the full
  width and a bottleneck, and every stage a 1x1 transition before the concatenation, as
  csdarknet53.cfg of AlexeyAB/darknet has.
- A CSP stage without blocks (CSPDarknet-19's first) is the strided convolution alone.
- Residual branches start small, see `backbones.layers.LAST_NORM`.

How a CSP stage splits its strided convolution's output (`split`):

- "separate": two 1x1 convolutions, one per branch (YOLOv5, YOLOX, the .cfg files).
- "slice": one 1x1 convolution whose output is sliced in two (timm). The same function as
  "separate": `convert_split` converts the weights exactly.
- "partial": no convolution; the output itself is sliced in two (CSPNet's figure 2).
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from backbones.base import Backbone, validate_choice, validate_number
from backbones.layers import LAST_NORM, ConvNormAct, scale_channels

Split = Literal["separate", "slice", "partial"]
Layout = Literal["half", "darknet"]

CHANNELS = (32, 64, 128, 256, 512, 1024)  # of the stem and the stages
STRIDES = (2, 4, 8, 16, 32)
SPLIT_CONVS = ("shortcut_conv", "blocks_conv", "split_conv")


@dataclass(frozen=True)
class DarknetConfig:
    """Residual blocks of each stage, and whether stages are cross-stage partial."""

    depths: tuple[int, int, int, int, int]
    csp: bool = False


VARIANTS = {
    "darknet19": DarknetConfig((0, 1, 1, 2, 2)),  # YOLOv2, table 6
    "darknet53": DarknetConfig((1, 2, 8, 8, 4)),  # YOLOv3, table 1
    "cspdarknet19": DarknetConfig((0, 1, 1, 2, 2), csp=True),  # Darknet-19's depths
    "cspdarknet53": DarknetConfig((1, 2, 8, 8, 4), csp=True),  # csdarknet53.cfg
}


class Block(nn.Module):
    """Residual block: 1x1 to `mid_channels`, 3x3 back, plus the input. Keeps `[N, C, H, W]`."""

    def __init__(self, channels: int, mid_channels: int, act: str, last_norm: float) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, mid_channels, 1, act=act)
        self.conv2 = ConvNormAct(mid_channels, channels, 3, act=act)
        nn.init.constant_(self.conv2.norm.weight, last_norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class DarknetStage(nn.Sequential):
    """Strided 3x3 convolution, then residual blocks. `[N, C, H, W]` to `[N, C', H/2, W/2]`."""

    def __init__(
        self, in_channels: int, channels: int, depth: int, act: str, last_norm: float
    ) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, channels, 3, stride=2, act=act)
        blocks = [Block(channels, channels // 2, act, last_norm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)


class CSPStage(nn.Module):
    """Strided convolution, split in two, blocks on the second part, concatenation, 1x1 convolution.

    Args:
        split: see the module's docstring.
        wide: whether each part has all of `channels`, not half of them.
        transition: whether a 1x1 convolution follows the blocks.

    Shape:
        `[N, in_channels, H, W]` to `[N, channels, ceil(H / 2), ceil(W / 2)]`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        act: str,
        last_norm: float = LAST_NORM,
        *,
        split: Split,
        wide: bool = False,
        transition: bool = False,
    ) -> None:
        super().__init__()
        self.split = split
        part = channels if wide else channels // 2
        self.conv = ConvNormAct(in_channels, channels, 3, stride=2, act=act)
        for name in SPLIT_CONVS:  # keeps their place, so that `convert_stage` keeps the order
            self.register_module(name, None)
        if split == "separate":
            self.shortcut_conv = ConvNormAct(channels, part, 1, act=act)
            self.blocks_conv = ConvNormAct(channels, part, 1, act=act)
        elif split == "slice":
            self.split_conv = ConvNormAct(channels, 2 * part, 1, act=act)
            for half in self.split_conv.conv.weight.chunk(2):  # fan-out of a half, as "separate"
                nn.init.kaiming_normal_(half, mode="fan_out", nonlinearity="relu")
        blocks = [Block(part, channels // 2, act, last_norm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.transition_conv = ConvNormAct(part, part, 1, act=act) if transition else None
        self.out_conv = ConvNormAct(2 * part, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.split == "separate":
            shortcut, x = self.shortcut_conv(x), self.blocks_conv(x)
        elif self.split == "slice":
            shortcut, x = self.split_conv(x).chunk(2, dim=1)
        else:
            shortcut, x = x.chunk(2, dim=1)
        x = self.blocks(x)
        if self.transition_conv is not None:
            x = self.transition_conv(x)
        return self.out_conv(torch.cat((shortcut, x), dim=1))


class Darknet(Backbone):
    """Darknet: a full-resolution stem and five stages, feature maps at strides 2 to 32.

    Args:
        config: the variant.
        act: a key of `backbones.layers.ACTIVATIONS`.
        width: factor on every channel count, rounded to multiples of 8.
        last_norm: initial weight of each block's last BatchNorm, see `backbones.layers.LAST_NORM`.
        options: `out_indices`, `in_channels`, `gradient_checkpointing` of `Backbone`.
    """

    def __init__(
        self,
        config: DarknetConfig,
        *,
        act: str = "relu",
        width: float = 1.0,
        last_norm: float = LAST_NORM,
        **options: Any,
    ) -> None:
        channels = [scale_channels(c, width) for c in CHANNELS]
        super().__init__(channels[1:], STRIDES, **options)
        validate_number("last_norm", last_norm)
        self.config, self.act, self.width, self.last_norm = config, act, float(width), last_norm
        self.stem = ConvNormAct(self.in_channels, channels[0], 3, act=act)
        self.stages = nn.ModuleList(
            self.make_stage(i, channels[i], channels[i + 1]) for i in range(self.num_stages)
        )

    def make_stage(self, index: int, in_channels: int, channels: int) -> nn.Module:
        depth = self.config.depths[index]
        return DarknetStage(in_channels, channels, depth, self.act, self.last_norm)


class CSPDarknet(Darknet):
    """Darknet with cross-stage partial stages.

    Args:
        config: the variant.
        split: how a stage splits its input, see the module's docstring.
        layout: "half", or "darknet" for the authors' full-width first stage and transitions, which
            "partial" cannot have: it would slice twice the channels that there are.
        options: keyword arguments of `Darknet`.
    """

    def __init__(
        self,
        config: DarknetConfig,
        *,
        split: Split = "separate",
        layout: Layout = "half",
        **options: Any,
    ) -> None:
        validate_choice("split", split, get_args(Split))
        validate_choice("layout", layout, get_args(Layout))
        if layout == "darknet" and split == "partial":
            raise ValueError('layout="darknet" takes split="separate" or "slice", not "partial"')
        self.split, self.layout = split, layout  # `make_stage` needs them
        super().__init__(config, **options)

    def make_stage(self, index: int, in_channels: int, channels: int) -> nn.Module:
        depth = self.config.depths[index]
        if depth == 0:
            return ConvNormAct(in_channels, channels, 3, stride=2, act=self.act)
        authors = self.layout == "darknet"
        options = {"split": self.split, "wide": authors and index == 0, "transition": authors}
        return CSPStage(in_channels, channels, depth, self.act, self.last_norm, **options)


def convert_split(net: nn.Module, split: Literal["separate", "slice"]) -> nn.Module:
    """A copy of `net` whose CSP stages split by `split` and compute the same function.

    The two 1x1 convolutions of "separate" are the two halves of the one of "slice", and BatchNorm
    works per channel, so outputs and gradients agree in train and eval mode up to rounding.

    Args:
        net: a CSPDarknet, or any module that contains one.

    Raises:
        ValueError: `split` or a stage of `net` is "partial", which is another function.
    """
    validate_choice("split", split, ("separate", "slice"))
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, CSPStage) and module.split != split:
            convert_stage(module, split)
        elif isinstance(module, CSPDarknet):
            module.split = split
    return net


def convert_stage(stage: CSPStage, split: Literal["separate", "slice"]) -> None:
    """`convert_split` of one stage, in place."""
    if stage.split == "partial":
        raise ValueError('stages with split="partial" compute another function; cannot convert')
    state = stage.state_dict()
    convert_keys(state, split)
    source = stage.shortcut_conv or stage.split_conv
    for name in SPLIT_CONVS:
        layer = None
        if f"{name}.conv.weight" in state:
            layer = copy.deepcopy(source)
            layer.conv.out_channels = layer.norm.num_features = len(state[f"{name}.conv.weight"])
            for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                tensor.data = state[f"{name}.{key}"]
        setattr(stage, name, layer)
    stage.split = split


def convert_keys(state: dict[str, Tensor], split: Split, prefix: str = "") -> None:
    """Converts the split convolutions of a stage, whose keys begin with `prefix`, in place."""
    first, second, one = (f"{prefix}{name}." for name in SPLIT_CONVS)
    if split == "slice":
        for key in [key for key in state if key.startswith(first)]:
            halves = state.pop(key), state.pop(key.replace(first, second))
            state[key.replace(first, one)] = torch.cat(halves) if halves[0].ndim else halves[0]
    elif split == "separate":
        for key in [key for key in state if key.startswith(one)]:
            value = state.pop(key)  # BatchNorm's count of batches is a single number
            halves = value.chunk(2) if value.ndim else (value, value)
            for name, half in zip((first, second), halves, strict=True):
                state[key.replace(one, name)] = half.clone()
