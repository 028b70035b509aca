"""A backbone with a classification head."""

from torch import Tensor, nn

from backbones.base import Backbone, is_integer


class Classifier(nn.Module):
    """The coarsest map of `backbone`, averaged over its pixels, through a head.

    The head is one linear layer, or torchvision's own, dropout included, for its networks.

    Args:
        backbone: any backbone; its last map is used.
        num_classes: at least 1.

    Shape:
        images `[N, C, H, W]` to logits `[N, num_classes]`.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            kind = type(backbone).__name__
            raise ValueError(f"backbone is a {kind}; give a Backbone, such as create's")
        if not is_integer(num_classes) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be an integer of at least 1")
        self.backbone = backbone
        self.head = backbone.make_head(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[-1].mean((-2, -1)))
