"""torchvision's ResNet, ResNeXt, Wide ResNet, MobileNetV2/V3 and EfficientNet as backbones.

Papers: ResNet (arXiv:1512.03385), ResNeXt (arXiv:1611.05431), Wide ResNet (arXiv:1605.07146),
MobileNetV2 (arXiv:1801.04381), MobileNetV3 (arXiv:1905.02244), EfficientNet (arXiv:1905.11946).

torchvision's own modules run, under torchvision's own names, so its checkpoints load as they are.
What comes after the last map asked for is taken off, and nothing is traced or run to find out where
maps are: a map ends where the stride doubles next.

ResNets give the stem's output (after its ReLU) at stride 2 and the output of each of their four
stages. For networks of inverted residuals `tap` says which map stands for a stride:

- "expansion": the output of the 1x1 expansion of the block that halves the map, and at last that of
  the final 1x1 convolution. These are the maps that MobileNetV2 (section 6.2) and MobileNetV3
  (section 6.3) give to a detector: many channels. A block without an expansion (the first of
  MobileNetV3-Small) gives its input. Strided blocks run layer by layer: hooks on their layers are
  called, hooks on the blocks are not.
- "block": the output of the last block of each stride: few channels. The final 1x1 convolution is
  taken off.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn
from torchvision.models import get_model_builder

from backbones.base import Backbone

Tap = Literal["expansion", "block"]

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
INVERTED_RESIDUALS = (
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *(f"efficientnet_b{i}" for i in range(8)),
)
STRIDES = (2, 4, 8, 16, 32)


class TorchvisionPort(Backbone):
    """The part of a torchvision network that gives its maps.

    Args:
        name: of the network's builder in `torchvision.models`.
        network: what that builder made.
        paths: names of the modules of each part: of the stem, then of the stage of each map, or of
            each map but the first where `stem_gives_map`.
        channels: of each map.
        head: name of torchvision's head where the last map is its input; None for a linear one.
        out_indices, in_channels, gradient_checkpointing: see `Backbone`.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        paths: list[list[str]],
        channels: Sequence[int],
        head: str | None,
        *,
        out_indices: Sequence[int] | None,
        in_channels: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(
            channels,
            STRIDES,
            out_indices=out_indices,
            in_channels=in_channels,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.architecture = name
        self.paths = paths[: self.num_stages + 1]
        whole = self.out_indices[-1] == len(channels) - 1
        self.head_name = head if whole else None
        kept = {path for part in self.paths for path in part}
        self.left_out = tuple(f"{path}." for path in _keep_only(network, kept))
        for child_name, child in network.named_children():
            self.add_module(child_name, child)
        if in_channels != 3:
            self._replace_first_conv(in_channels)

    def parts(self) -> list[list[nn.Module]]:
        return [[self.get_submodule(path) for path in part] for part in self.paths]

    def make_head(self, num_classes: int) -> nn.Module:
        """torchvision's own head with `num_classes` outputs, where the last map is its input."""
        if self.head_name is None:
            return super().make_head(num_classes)
        network = get_model_builder(self.architecture)(weights=None, num_classes=num_classes)
        return network.get_submodule(self.head_name)

    def _replace_first_conv(self, in_channels: int) -> None:
        path, old = next((p, m) for p, m in self.named_modules() if isinstance(m, nn.Conv2d))
        new = nn.Conv2d(
            in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            bias=old.bias is not None,
        )
        nn.init.kaiming_normal_(new.weight, mode="fan_out")  # as torchvision starts all of these
        parent, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent), name, new)


class ResNet(TorchvisionPort):
    """ResNet, ResNeXt or Wide ResNet: maps after the stem's ReLU and each of the four stages.

    Args:
        name: one of `RESNETS`.
        out_indices, in_channels, gradient_checkpointing: see `Backbone`.
    """

    stem_gives_map = True

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        network = get_model_builder(name)(weights=None)
        stages = [["maxpool", "layer1"], ["layer2"], ["layer3"], ["layer4"]]
        ends = (network.conv1, network.layer1, network.layer2, network.layer3, network.layer4)
        super().__init__(
            name,
            network,
            [["conv1", "bn1", "relu"], *stages],
            # A stage's last convolution but for a shortcut's, which keeps the channels.
            [_out_channels(end) for end in ends],
            None,  # torchvision's is a plain linear layer as well
            out_indices=out_indices,
            in_channels=in_channels,
            gradient_checkpointing=gradient_checkpointing,
        )


class InvertedResidualNet(TorchvisionPort):
    """MobileNetV2, MobileNetV3 or EfficientNet, a stem and five stages.

    Args:
        name: one of `INVERTED_RESIDUALS`.
        tap: which map stands for a stride, see the module's docstring.
        out_indices, in_channels, gradient_checkpointing: see `Backbone`.

    Raises:
        ValueError: another `tap`.
    """

    def __init__(
        self,
        name: str,
        *,
        tap: Tap = "expansion",
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        if tap not in get_args(Tap):
            raise ValueError(f"tap={tap!r} must be one of {get_args(Tap)}")
        network = get_model_builder(name)(weights=None)
        paths = _inverted_residual_paths(network, tap)
        channels = []
        for i in range(1, len(paths)):  # a stage without modules gives the map before it
            last = next(part[-1] for part in paths[i::-1] if part)
            channels.append(_out_channels(network.get_submodule(last)))
        super().__init__(
            name,
            network,
            paths,
            channels,
            "classifier" if tap == "expansion" else None,
            out_indices=out_indices,
            in_channels=in_channels,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.tap = tap


def _inverted_residual_paths(network: nn.Module, tap: Tap) -> list[list[str]]:
    """Names of the modules of the stem and of the five stages, in the order of execution."""
    paths = [["features.0"], []]
    for block in _block_paths(network):
        layers = _layers_path(network, block)
        strided = [_is_strided(layer) for layer in network.get_submodule(layers)]
        if not any(strided):
            paths[-1].append(block)
        elif tap == "block":
            paths.append([block])
        else:  # a strided block has no shortcut, so its layers are all that it does
            names = [f"{layers}.{i}" for i in range(len(strided))]
            cut = strided.index(True)
            paths[-1] += names[:cut]
            paths.append(names[cut:])
    if tap == "expansion":
        paths[-1].append(f"features.{len(network.features) - 1}")
    return paths


def _block_paths(network: nn.Module) -> list[str]:
    """Names of the inverted residuals; EfficientNet holds them in a sequence per stage."""
    paths = []
    for i in range(1, len(network.features) - 1):
        child = network.features[i]
        within = [f".{k}" for k in range(len(child))] if isinstance(child, nn.Sequential) else [""]
        paths += [f"features.{i}{k}" for k in within]
    return paths


def _layers_path(network: nn.Module, block: str) -> str:
    """Name of an inverted residual's sequence of layers: "conv" in MobileNetV2, else "block"."""
    return f"{block}.{'conv' if hasattr(network.get_submodule(block), 'conv') else 'block'}"


def _is_strided(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in layer.modules())


def _out_channels(module: nn.Module) -> int:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def _keep_only(module: nn.Module, kept: set[str], prefix: str = "") -> list[str]:
    """Deletes every submodule that is neither one of `kept` nor above one; returns their names."""
    deleted = []
    for name, child in list(module.named_children()):
        path = prefix + name
        if path in kept:
            continue
        if any(other.startswith(f"{path}.") for other in kept):
            deleted += _keep_only(child, kept, f"{path}.")
        else:
            delattr(module, name)
            deleted.append(path)
    return deleted
