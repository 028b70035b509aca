"""torchvision's ResNet, ResNeXt, Wide ResNet, MobileNetV2/V3 and EfficientNet as backbones.

Papers: ResNet (arXiv:1512.03385), ResNeXt (arXiv:1611.05431), Wide ResNet (arXiv:1605.07146),
MobileNetV2 (arXiv:1801.04381), MobileNetV3 (arXiv:1905.02244), EfficientNet (arXiv:1905.11946).

These are torchvision's own modules under torchvision's own names, so its checkpoints load as they
are. Each feature map is the last output before the next stride; modules after the last one are
removed.

ResNets return the stem's output (after its ReLU) at stride 2 and the outputs of their four stages.
For networks of inverted residuals `tap` chooses the feature map at each stride:

- "expansion": the output of the 1x1 expansion in the block that has the next stride, and for the
  last stride that of the final 1x1 convolution. MobileNetV2 (section 6.2) and MobileNetV3 (section
  6.3) feed these to a detector: many channels. A block without an expansion (the first of
  MobileNetV3-Small) gives its input. Strided blocks run layer by layer: hooks on their layers are
  called, hooks on the blocks are not.
- "block": the output of the last block at each stride: few channels. The final 1x1 convolution is
  removed.
"""

from typing import Any, Literal, get_args

from torch import nn
from torchvision.models import get_model_builder

from backbones.base import Backbone, validate_choice

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
    """The part of a torchvision network that computes its feature maps.

    Args:
        name: the network's builder in `torchvision.models`.
        network: what that builder returned.
        paths: names of the modules of the stem, then of each stage.
        head: name of torchvision's head if it takes the last feature map; None for a linear head.
        options: `out_indices`, `in_channels`, `gradient_checkpointing` of `Backbone`.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        paths: list[list[str]],
        head: str | None = None,
        **options: Any,
    ) -> None:
        channels = _channels(network, paths)[len(paths) - len(STRIDES) :]
        super().__init__(channels, STRIDES, **options)
        self.architecture = name
        self.paths = paths[: self.num_stages + 1]
        self.head_name = head if self.strides[-1] == STRIDES[-1] else None
        self.left_out = _keep_only(network, [path for part in self.paths for path in part])
        for child_name, child in network.named_children():
            self.add_module(child_name, child)
        if self.in_channels != 3:
            self._replace_first_conv()

    def parts(self) -> list[list[nn.Module]]:
        return [[self.get_submodule(path) for path in part] for part in self.paths]

    def make_head(self, num_classes: int) -> nn.Module:
        """torchvision's own head with `num_classes` outputs if it takes the last feature map."""
        if self.head_name is None:
            return super().make_head(num_classes)
        network = get_model_builder(self.architecture)(weights=None, num_classes=num_classes)
        return network.get_submodule(self.head_name)

    def _replace_first_conv(self) -> None:
        path, old = next((p, m) for p, m in self.named_modules() if isinstance(m, nn.Conv2d))
        sizes = (old.kernel_size, old.stride, old.padding)
        new = nn.Conv2d(self.in_channels, old.out_channels, *sizes, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out")  # torchvision's initialisation
        self.set_submodule(path, new)


class ResNet(TorchvisionPort):
    """ResNet, ResNeXt or Wide ResNet: feature maps after the stem's ReLU and the four stages.

    `name` is one of `RESNETS`, `options` are those of `Backbone`.
    """

    stem_gives_map = True

    def __init__(self, name: str, **options: Any) -> None:
        network = get_model_builder(name)(weights=None)
        stages = ("conv1 bn1 relu", "maxpool layer1", "layer2", "layer3", "layer4")
        super().__init__(name, network, [stage.split() for stage in stages], **options)


class InvertedResidualNet(TorchvisionPort):
    """MobileNetV2, MobileNetV3 or EfficientNet: a stem and five stages.

    Args:
        name: one of `INVERTED_RESIDUALS`.
        tap: the feature map at each stride, see the module's docstring.
        options: `out_indices`, `in_channels`, `gradient_checkpointing` of `Backbone`.
    """

    def __init__(self, name: str, *, tap: Tap = "expansion", **options: Any) -> None:
        validate_choice("tap", tap, get_args(Tap))
        network = get_model_builder(name)(weights=None)
        paths = _inverted_residual_paths(network, tap)
        head = "classifier" if tap == "expansion" else None
        super().__init__(name, network, paths, head, **options)
        self.tap = tap


def _inverted_residual_paths(network: nn.Module, tap: Tap) -> list[list[str]]:
    """Names of the modules of the stem and of the five stages, in the order of execution."""
    paths = [["features.0"], []]
    for path, block in network.named_modules():
        if not hasattr(block, "use_res_connect"):  # all inverted residuals have it
            continue
        # The sequence of layers is called "conv" in MobileNetV2, "block" in the others.
        name, layers = next(each for each in block.named_children() if each[0] in ("conv", "block"))
        strided = [_is_strided(layer) for layer in layers]
        if not any(strided):
            paths[-1].append(path)
        elif tap == "block":
            paths.append([path])
        else:  # a strided block has no shortcut, so its layers are all that it computes
            names = [f"{path}.{name}.{i}" for i in range(len(strided))]
            cut = strided.index(True)
            paths[-1] += names[:cut]
            paths.append(names[cut:])
    if tap == "expansion":
        paths[-1].append(f"features.{len(network.features) - 1}")
    return paths


def _is_strided(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in layer.modules())


def _channels(network: nn.Module, paths: list[list[str]]) -> list[int]:
    """Output channels of the stem and of each stage, those of its last convolution."""
    channels: list[int] = []
    for part in paths:
        modules = [m for path in part for m in network.get_submodule(path).modules()]
        convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        channels.append(convs[-1].out_channels if convs else channels[-1])
    return channels


def _keep_only(network: nn.Module, kept: list[str]) -> tuple[str, ...]:
    """Deletes the submodules outside of `kept`; returns their names, each with a dot at its end."""
    deleted: list[str] = []
    for path, _ in list(network.named_modules())[1:]:
        related = (f"{path}.".startswith(f"{k}.") or k.startswith(f"{path}.") for k in kept)
        if not any(related) and not path.startswith(tuple(deleted)):
            parent, _, name = path.rpartition(".")
            delattr(network.get_submodule(parent), name)
            deleted.append(f"{path}.")
    return tuple(deleted)
