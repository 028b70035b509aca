"""VoVNet-19-slim, 39, 57 and 99, versions 1 and 2.

Papers: VoVNet (arXiv:1904.09730, table 1: 39 and 57), CenterMask (arXiv:1911.06667: version 2).
VoVNet-19-slim and 99 are those of the authors' code, youngwanLEE/vovnet-detectron2.

A one-shot aggregation (OSA) block runs 3x3 convolutions in a row and concatenates its input with
all of their outputs, once, for a 1x1 convolution. Version 2 adds the block's input to its output
where the channels agree, from the second block of a stage on, and gates the channels by effective
squeeze-excitation (eSE).

Versions and where they come from:

- Default: version 2, eSE in every block (the authors' code).
- `ese="last"`: eSE only in the last block of each stage (timm).
- `residual=False, ese=False`: version 1.
- `slim_channels=128`: vision-toolbox's VoVNet-19-slim. Its first stage has 128 channels for the
  authors' 112, which are the stem's, so that this stage's block has a residual.

Residual branches start small, see `backbones.layers.LAST_NORM`.

Two stems, which are two functions with the same number of parameters:

- `stem_stride=2`: the paper's. Three convolutions with strides 2, 1, 1; every stage begins with a
  3x3 max-pool, padded by one pixel on all sides like ResNet's (gau-nernst/vision-toolbox).
- `stem_stride=4`: the authors' code and timm. The third convolution has stride 2, replaces the
  first stage's pool and is part of that stage; the other pools are padded at the end only.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import max_pool2d, pad

from backbones.base import Backbone, validate_choice, validate_number
from backbones.layers import LAST_NORM, ConvNormAct, EffectiveSqueezeExcite, scale_channels

ESE = Literal[True, False, "last"]
StemStride = Literal[2, 4]
SlimChannels = Literal[112, 128]

STEM_CHANNELS = (64, 64, 128)
STRIDES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class VoVNetConfig:
    """OSA blocks per stage, convolutions per block, channels inside and after the blocks."""

    depths: tuple[int, int, int, int]
    convs_per_block: int = 5
    conv_channels: tuple[int, int, int, int] = (128, 160, 192, 224)
    channels: tuple[int, int, int, int] = (256, 512, 768, 1024)


VARIANTS = {
    # The authors' V-19-slim-eSE.
    "vovnet19_slim": VoVNetConfig((1, 1, 1, 1), 3, (64, 80, 96, 112), (112, 256, 384, 512)),
    "vovnet39": VoVNetConfig((1, 1, 2, 2)),  # VoVNet, table 1
    "vovnet57": VoVNetConfig((1, 1, 4, 3)),  # VoVNet, table 1
    "vovnet99": VoVNetConfig((1, 3, 9, 3)),  # the authors' V-99-eSE
}


class OSABlock(nn.Module):
    """One-shot aggregation: `[N, in_channels, H, W]` to `[N, channels, H, W]`.

    Args:
        depth: number of 3x3 convolutions, each with `conv_channels` outputs.
        residual: add the input to the output; needs equal channels.
        ese: gate the output's channels.
        last_norm: initial weight of the last BatchNorm where there is a residual.
    """

    def __init__(
        self,
        in_channels: int,
        conv_channels: int,
        channels: int,
        depth: int,
        act: str,
        *,
        residual: bool,
        ese: bool,
        last_norm: float = LAST_NORM,
    ) -> None:
        super().__init__()
        self.residual = residual
        widths = [in_channels] + [conv_channels] * depth
        self.convs = nn.ModuleList(
            ConvNormAct(widths[i], widths[i + 1], 3, act=act) for i in range(depth)
        )
        self.out_conv = ConvNormAct(sum(widths), channels, 1, act=act)
        if residual:
            nn.init.constant_(self.out_conv.norm.weight, last_norm)
        self.ese = EffectiveSqueezeExcite(channels) if ese else None

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        y = self.out_conv(torch.cat(maps, dim=1))
        if self.ese is not None:
            y = self.ese(y)
        return x + y if self.residual else y


class TrailingMaxPool(nn.Module):
    """3x3 max-pool whose windows begin at pixels 0, 2, 4, ...: `[N, C, H, W]` to half, rounded up.

    The authors' `MaxPool2d(3, 2, ceil_mode=True)` rounds an odd size down, which breaks the
    contract's map sizes; here padding with minus infinity at the end makes up for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        # In a graph for all sizes they are symbols, under torch.jit.trace tensors.
        is_traced = torch.jit.is_tracing()
        if not is_traced and all(statically_known_true(edge % 2 == 0) for edge in x.shape[-2:]):
            return max_pool2d(x, 3, stride=2, ceil_mode=True)
        return max_pool2d(pad(x, (0, 2, 0, 2), value=float("-inf")), 3, stride=2)


class VoVNet(Backbone):
    """VoVNet: a stem and four stages, feature maps at strides 2 (the stem's), 4, 8, 16 and 32.

    Args:
        config: the variant.
        residual: whether a block adds its input where the channels agree.
        ese: which blocks gate their channels: all, none, or the last of each stage.
        stem_stride: 2 or 4, see the module's docstring.
        slim_channels: channels of the first stage of `vovnet19_slim`, 112 or 128.
        act: a key of `backbones.layers.ACTIVATIONS`.
        width: factor on every channel count, rounded to multiples of 8.
        last_norm: initial weight of the last BatchNorm in blocks that add their input, see
            `backbones.layers.LAST_NORM`.
        options: `out_indices`, `in_channels`, `gradient_checkpointing` of `Backbone`.
    """

    stem_gives_map = True

    def __init__(
        self,
        config: VoVNetConfig,
        *,
        residual: bool = True,
        ese: ESE = True,
        stem_stride: StemStride = 2,
        slim_channels: SlimChannels = 112,
        act: str = "relu",
        width: float = 1.0,
        last_norm: float = LAST_NORM,
        **options: Any,
    ) -> None:
        validate_choice("residual", residual, (True, False))
        validate_choice("ese", ese, get_args(ESE))
        validate_choice("stem_stride", stem_stride, get_args(StemStride))
        validate_number("last_norm", last_norm)
        is_slim = config == VARIANTS["vovnet19_slim"]
        validate_choice("slim_channels", slim_channels, get_args(SlimChannels)[: 1 + is_slim])
        first = slim_channels if is_slim else config.channels[0]
        stem = [scale_channels(c, width) for c in STEM_CHANNELS]
        channels = [scale_channels(c, width) for c in (first, *config.channels[1:])]
        strided_stage = stem_stride == 4
        super().__init__([stem[1] if strided_stage else stem[2], *channels], STRIDES, **options)
        self.residual, self.ese, self.stem_stride, self.act = residual, ese, stem_stride, act
        self.slim_channels, self.width = slim_channels, float(width)
        self.stem = nn.Sequential(
            ConvNormAct(self.in_channels, stem[0], 3, stride=2, act=act),
            ConvNormAct(stem[0], stem[1], 3, act=act),
        )
        if not strided_stage:
            self.stem.append(ConvNormAct(stem[1], stem[2], 3, act=act))
        self.stages = nn.ModuleList()
        widths = [stem[2], *channels]
        for i in range(self.num_stages):
            if not strided_stage:
                halve = nn.MaxPool2d(3, stride=2, padding=1)
            elif i == 0:
                halve = ConvNormAct(stem[1], stem[2], 3, stride=2, act=act)
            else:
                halve = TrailingMaxPool()
            depth, conv_channels = config.depths[i], scale_channels(config.conv_channels[i], width)
            blocks = [
                OSABlock(
                    widths[i + (k > 0)],
                    conv_channels,
                    widths[i + 1],
                    config.convs_per_block,
                    act,
                    residual=residual and (k > 0 or (i == 0 and first == STEM_CHANNELS[2])),
                    ese=k == depth - 1 if ese == "last" else ese,
                    last_norm=last_norm,
                )
                for k in range(depth)
            ]
            stage = OrderedDict(halve=halve, blocks=nn.Sequential(*blocks))
            self.stages.append(nn.Sequential(stage))
