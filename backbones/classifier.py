"""A backbone with a classification head."""

from torch import Tensor, nn

from backbones.base import Backbone, validate_count


class Classifier(nn.Module):
    """The coarsest feature map of `backbone`, averaged over its pixels, then a head.

    The head is one linear layer, or for torchvision's networks torchvision's own with its dropout.

    Args:
        backbone: any backbone; its last feature map is used.
        num_classes: at least 1.

    Shape:
        images `[N, C, H, W]` to logits `[N, num_classes]`.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        validate_count("num_classes", num_classes)
        self.backbone = backbone
        self.head = backbone.make_head(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((-2, -1)))
