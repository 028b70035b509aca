"""A backbone under torchvision's detectors: a feature pyramid on its maps, RetinaNet, Faster R-CNN.

Sources: the pyramid, arXiv:1612.03144; RetinaNet, arXiv:1708.02002; Faster R-CNN,
arXiv:1506.01497; all as torchvision.models.detection has them. RetinaNet's head has GroupNorm, as
in torchvision's `retinanet_resnet50_fpn_v2`. Anchors follow the strides as in the papers, so that a
detector on finer maps finds smaller objects. Of both detectors class 0 is the background, and
objects are 1 and on.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.poolers import LevelMapper

from backbones.base import Backbone, is_integer

# Of ImageNet's RGB values, 0 to 1; other images get their means over the colours.
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """What torchvision's detectors take for a backbone: a feature pyramid on a backbone's maps.

    Args:
        backbone: its `out_indices` pick the maps; strides must double from one to the next.
        out_channels: of every level.
        extra_blocks: of torchvision, for levels coarser than the last map.

    Attributes:
        strides: of the levels that have a map of the backbone.

    Shape:
        images `[N, C, H, W]` to an ordered dict of `[N, out_channels, h, w]`, fine to coarse: "0",
        "1", ... of the backbone's maps, then those of `extra_blocks` by their own names.

    Raises:
        ValueError: it is no backbone, or its strides skip one.
    """

    def __init__(
        self, backbone: Backbone, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        strides = _checked_strides(backbone)
        self.backbone, self.strides, self.out_channels = backbone, strides, out_channels
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), out_channels, extra_blocks)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.backbone(images)
        return self.fpn(OrderedDict((str(k), each) for k, each in enumerate(maps)))


def retinanet(
    net: Backbone, num_classes: int, *, out_channels: int = 256, **options: Any
) -> RetinaNet:
    """torchvision's RetinaNet on a backbone's maps and on two coarser levels, P6 and P7.

    Args:
        net: any backbone, such as `create(name, out_indices=(2, 3, 4))` for the paper's strides.
        num_classes: of objects, at least 1, without the background; labels are 1 to `num_classes`.
        out_channels: of the pyramid and the head, a multiple of 32 (GroupNorm's groups).
        options: of `torchvision.models.detection.RetinaNet`, such as `min_size` and `max_size`, to
            which images are resized (800 and 1333 pixels unless told otherwise), or `image_mean`
            and `image_std`, one number per channel of values 0 to 1.

    Raises:
        ValueError: a bad value; strides that skip; means or deviations of another length.
    """
    _check_counts(num_classes=num_classes, out_channels=out_channels)
    if out_channels % 32:
        raise ValueError(f"out_channels={out_channels} must be a multiple of 32")
    strides = _checked_strides(net)
    pyramid = Pyramid(net, out_channels, LastLevelP6P7(net.channels[-1], out_channels))
    levels = (*strides, 2 * strides[-1], 4 * strides[-1])
    # The paper's: 4 pixels of a level, and two sizes on the way to the next.
    sizes = tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in levels)
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(levels))
    per_place = anchors.num_anchors_per_location()[0]
    norm = partial(nn.GroupNorm, 32)
    head = RetinaNetHead(out_channels, per_place, num_classes + 1, norm_layer=norm)
    defaults = {"anchor_generator": anchors, "head": head}
    return RetinaNet(
        pyramid, num_classes + 1, **(defaults | options | _normalisation(net, options))
    )


def faster_rcnn(
    net: Backbone, num_classes: int, *, out_channels: int = 256, **options: Any
) -> FasterRCNN:
    """torchvision's Faster R-CNN on a backbone's maps and, for proposals, one coarser level.

    Args:
        net: any backbone, such as `create(name, out_indices=(1, 2, 3, 4))` for the paper's strides.
        num_classes: of objects, at least 1, without the background; labels are 1 to `num_classes`.
        out_channels: of the pyramid.
        options: of `torchvision.models.detection.FasterRCNN`; see `retinanet`.

    Raises:
        ValueError: as `retinanet`.
    """
    _check_counts(num_classes=num_classes, out_channels=out_channels)
    pyramid = Pyramid(net, out_channels, LastLevelMaxPool())
    levels = (*pyramid.strides, 2 * pyramid.strides[-1])
    sizes = tuple((8 * stride,) for stride in levels)  # the paper's: 32 pixels at stride 4
    pool = MultiScaleRoIAlign([str(k) for k in range(len(pyramid.strides))], 7, 2)
    # Told, as they are known: torchvision would guess them from the first images that come by.
    pool.scales = [1 / stride for stride in pyramid.strides]
    first, last = (stride.bit_length() - 1 for stride in (levels[0], pyramid.strides[-1]))
    pool.map_levels = LevelMapper(first, last)
    defaults = {
        "rpn_anchor_generator": AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(levels)),
        "box_roi_pool": pool,
    }
    return FasterRCNN(
        pyramid, num_classes + 1, **(defaults | options | _normalisation(net, options))
    )


def _checked_strides(net: Backbone) -> tuple[int, ...]:
    if not isinstance(net, Backbone):
        raise ValueError(f"backbone is a {type(net).__name__}; give a Backbone, such as create's")
    strides = net.strides
    if any(after != 2 * before for before, after in pairwise(strides)):
        raise ValueError(
            f"strides {strides} skip one; a pyramid needs neighbours, such as out_indices=(2, 3, 4)"
        )
    return strides


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def _normalisation(net: Backbone, options: dict[str, Any]) -> dict[str, Sequence[float]]:
    """Mean and deviation per image channel: ImageNet's unless given, which must fit the images."""
    found = {}
    for name, rgb in (("image_mean", MEAN_RGB), ("image_std", STD_RGB)):
        default = rgb if net.in_channels == 3 else (sum(rgb) / 3,) * net.in_channels
        values = options.get(name)
        found[name] = default if values is None else values
        if len(found[name]) != net.in_channels:
            raise ValueError(
                f"{name} has {len(values)} numbers; the backbone takes {net.in_channels} channels"
            )
    return found
