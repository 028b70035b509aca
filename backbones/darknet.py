"""Darknet-19/53 and CSPDarknet-19/53.

Papers: YOLOv2 (arXiv:1612.08242, table 6: Darknet-19), YOLOv3 (arXiv:1804.02767, table 1:
Darknet-53), CSPNet (arXiv:1911.11929, figures 2, 3), YOLOv4 (arXiv:2004.10934: CSPDarknet-53).

Differences from the papers:

- ReLU by default. YOLOv2 and YOLOv3 use `act="leaky_relu"`, YOLOv4 `act="mish"`.
- Darknet-19 has YOLOv2's depths with YOLOv3's strided convolutions and residual blocks instead of
  max-pools and plain 3x3 / 1x1 sequences; its count of parameters is that of darknet19.cfg.
- CSP stages have half the channels in both branches and no bottleneck in the blocks, as
  CSPDarknet-53 has from its second stage on. `layout="darknet"` gives the first stage the full
  width and a bottleneck, and every stage a 1x1 transition before the concatenation, as
  csdarknet53.cfg of AlexeyAB/darknet has.
- A CSP stage without blocks (CSPDarknet-19's first) is the strided convolution alone.

How a CSP stage splits its strided convolution's output (`split`):

- "separate": two 1x1 convolutions, one a branch (YOLOv5, YOLOX, the .cfg files).
- "slice": one 1x1 convolution whose output is cut in two (timm). The same function as "separate":
  `convert_split` carries weights across.
- "partial": no convolution; the map itself is cut in two (CSPNet's figure 2).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.layers import ConvNormAct, scale_channels

Split = Literal["separate", "slice", "partial"]
Layout = Literal["half", "darknet"]

STEM_CHANNELS = 32
STAGE_CHANNELS = (64, 128, 256, 512, 1024)
STRIDES = (2, 4, 8, 16, 32)


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

    def __init__(self, channels: int, mid_channels: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, mid_channels, 1, act=act)
        self.conv2 = ConvNormAct(mid_channels, channels, 3, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class DarknetStage(nn.Sequential):
    """Strided 3x3 convolution, then residual blocks. `[N, C, H, W]` to `[N, C', H/2, W/2]`."""

    def __init__(self, in_channels: int, channels: int, depth: int, act: str) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, channels, 3, stride=2, act=act)
        self.blocks = nn.Sequential(*(Block(channels, channels // 2, act) for _ in range(depth)))


class CSPStage(nn.Module):
    """Strided convolution, split in two, blocks on the second part, concatenation, 1x1 convolution.

    Args:
        split: see the module's docstring.
        wide: whether each part has all of `channels`, not half of them.
        transition: whether the blocks end in a 1x1 convolution.

    Shape:
        `[N, in_channels, H, W]` to `[N, channels, ceil(H / 2), ceil(W / 2)]`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        act: str,
        *,
        split: Split,
        wide: bool = False,
        transition: bool = False,
    ) -> None:
        super().__init__()
        self.split = split
        part = channels if wide else channels // 2
        self.conv = ConvNormAct(in_channels, channels, 3, stride=2, act=act)
        if split == "separate":
            self.shortcut_conv = ConvNormAct(channels, part, 1, act=act)
            self.blocks_conv = ConvNormAct(channels, part, 1, act=act)
        elif split == "slice":
            self.split_conv = ConvNormAct(channels, 2 * part, 1, act=act)
            for half in self.split_conv.conv.weight.chunk(2):  # each by its own fan-out, as above
                nn.init.kaiming_normal_(half, mode="fan_out", nonlinearity="relu")
        self.blocks = nn.Sequential(*(Block(part, channels // 2, act) for _ in range(depth)))
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


def _darknet_stage(
    index: int, in_channels: int, channels: int, depth: int, act: str
) -> DarknetStage:
    return DarknetStage(in_channels, channels, depth, act)


class Darknet(Backbone):
    """Darknet: a full-resolution stem and five stages, maps at strides 2, 4, 8, 16 and 32.

    Args:
        config: depths of the variant.
        make_stage: builds one stage from (index, in_channels, channels, depth, act).
        act: a key of `backbones.layers.ACTIVATIONS`.
        width: factor on every channel count, rounded to multiples of 8.
        out_indices, in_channels, gradient_checkpointing: see `Backbone`.
    """

    def __init__(
        self,
        config: DarknetConfig,
        make_stage: Callable[[int, int, int, int, str], nn.Module] = _darknet_stage,
        *,
        act: str = "relu",
        width: float = 1.0,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        channels = [scale_channels(c, width) for c in (STEM_CHANNELS, *STAGE_CHANNELS)]
        super().__init__(
            channels[1:],
            STRIDES,
            out_indices=out_indices,
            in_channels=in_channels,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.config, self.act = config, act
        self.stem = ConvNormAct(in_channels, channels[0], 3, act=act)
        self.stages = nn.ModuleList(
            make_stage(i, channels[i], channels[i + 1], config.depths[i], act)
            for i in range(self.num_stages)
        )


class CSPDarknet(Darknet):
    """Darknet with cross-stage partial stages.

    Args:
        split: how a stage splits its input, see the module's docstring.
        layout: "half", or "darknet" for the authors' full-width first stage and transitions.
        options: `Darknet`'s.

    Raises:
        ValueError: an unknown split or layout, or `layout="darknet"` with `split="partial"`, whose
            first stage would need twice the channels that there are to cut.
    """

    def __init__(
        self,
        config: DarknetConfig,
        *,
        split: Split = "separate",
        layout: Layout = "half",
        **options,
    ) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split={split!r} must be one of {get_args(Split)}")
        if layout not in get_args(Layout):
            raise ValueError(f"layout={layout!r} must be one of {get_args(Layout)}")
        if layout == "darknet" and split == "partial":
            raise ValueError('layout="darknet" takes split="separate" or "slice", not "partial"')

        def make_stage(index: int, in_channels: int, channels: int, depth: int, act: str):
            if depth == 0:
                return ConvNormAct(in_channels, channels, 3, stride=2, act=act)
            authors = layout == "darknet"
            wide = authors and index == 0
            return CSPStage(
                in_channels, channels, depth, act, split=split, wide=wide, transition=authors
            )

        super().__init__(config, make_stage, **options)
        self.layout = layout


def convert_split(net: nn.Module, split: Literal["separate", "slice"]) -> nn.Module:
    """A copy of `net` whose CSP stages split by `split` and compute the same function.

    The two 1x1 convolutions of "separate" are the two halves of the one of "slice", and BatchNorm
    works channel by channel, so outputs and gradients agree in train and eval mode to rounding.

    Args:
        net: a CSPDarknet, or any module that holds one.

    Raises:
        ValueError: `split` or a stage of `net` is "partial", which is another function.
    """
    if split not in ("separate", "slice"):
        raise ValueError(f'split={split!r} must be "separate" or "slice"')
    net = copy.deepcopy(net)
    for stage in net.modules():
        if isinstance(stage, CSPStage) and stage.split != split:
            convert_stage(stage, split)
    return net


def convert_stage(stage: CSPStage, split: Literal["separate", "slice"]) -> None:
    """`convert_split` of one stage, in place."""
    if stage.split == "partial":
        raise ValueError('stages with split="partial" compute another function; cannot convert')
    if split == "slice":
        parts = stage.shortcut_conv.state_dict(), stage.blocks_conv.state_dict()
        state = {k: torch.cat((v, parts[1][k])) if v.ndim else v for k, v in parts[0].items()}
        stage.split_conv = _with_state(stage.shortcut_conv, state)
        del stage.shortcut_conv, stage.blocks_conv
    else:
        state = stage.split_conv.state_dict()
        halves = {k: v.chunk(2) if v.ndim else (v, v) for k, v in state.items()}
        for i, name in enumerate(("shortcut_conv", "blocks_conv")):
            half = {k: v[i].clone() for k, v in halves.items()}
            setattr(stage, name, _with_state(stage.split_conv, half))
        del stage.split_conv
    stage.split = split
    # In the order of construction: optimizers know parameters by their number.
    order = ("conv", "shortcut_conv", "blocks_conv", "split_conv", "blocks", "transition_conv")
    order += ("out_conv",)
    stage._modules = {name: stage._modules[name] for name in order if name in stage._modules}


def _with_state(layer: ConvNormAct, state: dict[str, Tensor]) -> ConvNormAct:
    """A copy of `layer` that holds `state`, whatever its number of output channels."""
    layer = copy.deepcopy(layer)
    layer.conv.out_channels = layer.norm.num_features = len(state["conv.weight"])
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        tensor.data = state[name]
    return layer
