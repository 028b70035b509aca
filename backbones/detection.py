"""A backbone under torchvision's detectors: a feature pyramid on its maps, RetinaNet, Faster R-CNN.

Sources: the pyramid, arXiv:1612.03144; RetinaNet, arXiv:1708.02002; Faster R-CNN,
arXiv:1506.01497; all as in torchvision.models.detection. RetinaNet's head has GroupNorm, as in
torchvision's `retinanet_resnet50_fpn_v2`. Anchors are proportional to the strides as in the papers,
so a detector on finer maps finds smaller objects. Class 0 is the background in both detectors, and
object classes start at 1.
"""

import inspect
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from backbones.base import Backbone, validate_count

# ImageNet's, of RGB values 0 to 1; images of other channels take their means over the colours.
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """A feature pyramid on a backbone's maps, which torchvision's detectors take as a backbone.

    Args:
        backbone: its `out_indices` pick the maps; their strides must double.
        out_channels: channels of every level.
        extra_blocks: torchvision's block for levels coarser than the last map.

    Shape:
        images `[N, C, H, W]` to an ordered dict of `[N, out_channels, h, w]`, fine to coarse: "0",
        "1", ... for the backbone's maps, then those of `extra_blocks` under their own names.
    """

    def __init__(
        self, backbone: Backbone, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None
    ) -> None:
        super().__init__()
        if any(after != 2 * before for before, after in pairwise(backbone.strides)):
            raise ValueError(
                f"strides {backbone.strides} skip one; a pyramid needs neighbours, such as "
                "out_indices=(2, 3, 4)"
            )
        validate_count("out_channels", out_channels)
        self.backbone, self.strides, self.out_channels = backbone, backbone.strides, out_channels
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
        num_classes: number of object classes, at least 1, without the background; labels count
            from 1.
        out_channels: channels of the pyramid and the head, a multiple of 32 (GroupNorm's groups).
        options: arguments of torchvision's RetinaNet, such as `min_size` and `max_size`, to
            which images are resized (default: 800 and 1333 pixels), or `image_mean` and
            `image_std`, one number per channel of values 0 to 1.

    Raises:
        ValueError: a bad value; strides that skip one; a mean or deviation of another length.
    """
    validate_count("num_classes", num_classes)
    validate_count("out_channels", out_channels)
    if out_channels % 32:
        raise ValueError(f"out_channels={out_channels} must be a multiple of 32")
    pyramid = Pyramid(net, out_channels, LastLevelP6P7(net.channels[-1], out_channels))
    levels = (*net.strides, 2 * net.strides[-1], 4 * net.strides[-1])
    # The paper's: 4 pixels of a level, and two sizes between it and the next.
    sizes = tuple(tuple(int(4 * stride * 2 ** (k / 3)) for k in range(3)) for stride in levels)
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(levels))
    per_location = anchors.num_anchors_per_location()[0]
    norm = partial(nn.GroupNorm, 32)
    head = RetinaNetHead(out_channels, per_location, num_classes + 1, norm_layer=norm)
    options = {"anchor_generator": anchors, "head": head} | _complete(RetinaNet, net, options)
    return RetinaNet(pyramid, num_classes + 1, **options)


def faster_rcnn(
    net: Backbone, num_classes: int, *, out_channels: int = 256, **options: Any
) -> FasterRCNN:
    """torchvision's Faster R-CNN on a backbone's maps and, for proposals, one coarser level.

    Arguments and errors are those of `retinanet`, with torchvision's options of FasterRCNN and any
    number of `out_channels`. `create(name, out_indices=(1, 2, 3, 4))` has the paper's strides.
    """
    validate_count("num_classes", num_classes)
    pyramid = Pyramid(net, out_channels, LastLevelMaxPool())
    levels = (*net.strides, 2 * net.strides[-1])
    sizes = tuple((8 * stride,) for stride in levels)  # the paper's: 32 pixels at stride 4
    pool = MultiScaleRoIAlign([str(k) for k in range(len(net.strides))], 7, 2)
    # torchvision would estimate these from the first batch of images.
    pool.scales = [1 / stride for stride in net.strides]
    first, last = (stride.bit_length() - 1 for stride in (net.strides[0], net.strides[-1]))
    pool.map_levels = LevelMapper(first, last)
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(levels))
    fixed = {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
    options = fixed | _complete(FasterRCNN, net, options)
    return FasterRCNN(pyramid, num_classes + 1, **options)


def _complete(detector: type, net: Backbone, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the mean and deviation of `net`'s weights, by default those of ImageNet."""
    classes = (detector, GeneralizedRCNNTransform)
    accepted = [name for each in classes for name in inspect.signature(each).parameters]
    accepted = sorted({*accepted} - {"backbone", "num_classes", "kwargs"})
    for name in options.keys() - accepted:  # torchvision would ignore it
        raise ValueError(f"{detector.__name__} takes no {name!r}; it takes {', '.join(accepted)}")
    mean_rgb, std_rgb = MEAN_RGB, STD_RGB
    if net.preprocessing:
        mean_rgb, std_rgb = net.preprocessing.mean, net.preprocessing.std
    for name, rgb in (("image_mean", mean_rgb), ("image_std", std_rgb)):
        default = rgb if net.in_channels == 3 else (sum(rgb) / 3,) * net.in_channels
        options = options | {name: options.get(name) or default}
        if len(options[name]) != net.in_channels:
            raise ValueError(
                f"{name}={options[name]} needs {net.in_channels} numbers, one per image channel"
            )
    return options
