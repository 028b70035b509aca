"""Layers that more than one backbone family uses."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from numbers import Real

from torch import Tensor, nn

from backbones.base import validate_choice

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    # Darknet's slope (activations.h: 0.1 x), not PyTorch's default of 0.01.
    "leaky_relu": partial(nn.LeakyReLU, 0.1, inplace=True),
    # PyTorch's default slope, with which timm's Darknets were trained.
    "leaky_relu_0.01": partial(nn.LeakyReLU, 0.01, inplace=True),
    "mish": partial(nn.Mish, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
    "hardswish": partial(nn.Hardswish, inplace=True),
    "gelu": nn.GELU,
}

# Initial weight of the last BatchNorm in each residual block of Darknet, CSPDarknet and VoVNet.
# Their branches end in an activation, so their means add up over the blocks, and with PyTorch's
# default of 1 Darknet-53 diverges at ordinary learning rates (docs/results.md). With 0, as timm
# starts its Darknets (after arXiv:1706.02677), a branch that ends in ReLU never gets a gradient.
LAST_NORM = 0.2


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch normalisation, activation.

    Maps `[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]` for odd
    kernel sizes. Weights are initialised as He et al. do, normal with fan-out (arXiv:1502.01852),
    like torchvision's ResNet.

    Args:
        act: a key of `ACTIVATIONS`; anything else raises ValueError.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        act: str = "relu",
    ) -> None:
        validate_choice("act", act, tuple(ACTIVATIONS))
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(
            OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels), act=ACTIVATIONS[act]())
        )


class EffectiveSqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from its mean over all pixels. Keeps `[N, C, H, W]`.

    One fully connected layer without reduction, then a hard sigmoid: eSE of CenterMask
    (arXiv:1911.06667).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((-2, -1), keepdim=True)))


def scale_channels(channels: int, width: float) -> int:
    """`channels * width` rounded to the nearest multiple of 8, at least 8; width 1 changes nothing.

    Raises ValueError unless `width` is above 0 and at most 16.
    """
    if not isinstance(width, Real) or isinstance(width, bool) or not 0 < width <= 16:
        raise ValueError(f"width={width!r} must be a number above 0, at most 16")
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)
