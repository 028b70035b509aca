"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3).

After Lavin and Gray (arXiv:1509.09308, section 4.3). The image is cut into tiles of 6 x 6 pixels
that overlap by two. Linear maps take a tile to 36 values (B), a kernel to 36 as well (G), and their
products to the 4 x 4 outputs in the tile's middle (A): 36 multiplications per pair of channels
where 16 outputs of 9 take 144. Over all channels the products are a 1x1 convolution of 36 groups,
which oneDNN is fast at.

It is the same function as the direct convolution. Of one layer the rounding errors of float32 are
about ten times larger; of a whole network's maps they are not (tests/test_winograd.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

OUT, IN = 4, 6  # pixels along a tile: of the output, of the input
VALUES = IN * IN
GEOMETRY = ((0, 0), (1, 1), (1, 1), VALUES)  # padding, stride, dilation and groups of the products

# Of the interpolation points 0, 1, -1, 2, -2 (and infinity).
A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

# With fewer channels the transforms take longer than the products save; with fewer tiles the
# kernels, four times as large, are read for too little (two cores of an AMD EPYC, AVX2).
LEAST_CHANNELS, LEAST_TILES = 128, 48
PART = 160  # tiles at a time: few enough for their values to stay in a cache


def suits(conv: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether it is a convolution of this kind, and faster so for images `[N, C, H, W]`."""
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (
        geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and shape[0] * _tiles(shape[2]) * _tiles(shape[3]) >= LEAST_TILES
    )


def _tiles(pixels: int) -> int:
    return -(-pixels // OUT)


def _part(shape: torch.Size) -> int:
    """How many images of a shape are taken at a time, for parts of about `PART` tiles."""
    tiles = shape[0] * _tiles(shape[2]) * _tiles(shape[3])
    return -(-shape[0] // max(1, round(tiles / PART)))


def values_shape(shape: torch.Size) -> tuple[int, int, int, int]:
    """Of the values that `convolve` multiplies at a time, for images of a shape."""
    return (1, VALUES * shape[1], _part(shape) * _tiles(shape[2]) * _tiles(shape[3]), 1)


def kernels(weight: Tensor) -> Tensor:
    """Weights `[C_out, C_in, 3, 3]` for the products: `[36 * C_out, C_in, 1, 1]`."""
    g = torch.tensor(G, dtype=torch.float64, device=weight.device)
    values = torch.einsum("xi,ocij,yj->xyoc", g, weight.double(), g)
    return values.flatten(0, 2)[:, :, None, None].to(weight.dtype)


def biases(bias: Tensor | None) -> Tensor | None:
    """A bias `[C_out]` for the products, `[36 * C_out]`: on the value that all outputs hold."""
    if bias is None:
        return None
    place = torch.zeros(VALUES, dtype=bias.dtype, device=bias.device)
    place[IN + 1] = 1
    return (place[:, None] * bias).flatten()


def convolve(x: Tensor, out_channels: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """The convolution of images `[N, C, H, W]`, as `[N, out_channels, H, W]` in channels_last.

    Args:
        multiply: the 1x1 convolution of 36 groups by `kernels` and `biases`, from values
            `[1, 36 * C, tiles, 1]` to `[1, 36 * out_channels, tiles, 1]`, both in channels_last.
    """
    to_values, to_outputs = _square(B, x), _square(A, x)
    y = x.new_empty((len(x), *x.shape[2:], out_channels))
    part = _part(x.shape)
    for first in range(0, len(x), part):
        # The last part is as large as the others, some of whose images it takes again: for fewer,
        # kernels would be brought in another order, which takes several times as long.
        here = slice(min(first, len(x) - part), first + part)
        _join(multiply(_cut(x[here], to_values)), to_outputs, y[here])
    return y.permute(0, 3, 1, 2)


def _cut(x: Tensor, to_values: Tensor) -> Tensor:
    """Images to their tiles' values."""
    height, width = x.shape[2:]
    rows, columns = _tiles(height), _tiles(width)
    more = (0, 0, 1, OUT * columns + 1 - width, 1, OUT * rows + 1 - height)
    x = functional.pad(x.permute(0, 2, 3, 1), more).contiguous()
    image, row, column, channel = x.stride()
    tiles = x.as_strided(
        (len(x), rows, columns, IN, IN, x.shape[3]),
        (image, OUT * row, OUT * column, row, column, channel),
    )
    values = to_values @ tiles.reshape(-1, VALUES, x.shape[3])
    return values.reshape(1, -1, 1, VALUES * x.shape[3]).permute(0, 3, 1, 2)


def _join(products: Tensor, to_outputs: Tensor, y: Tensor) -> None:
    """The products of images to their outputs, in the place of `y` `[N, H, W, C]`."""
    images, height, width, channels = y.shape
    rows, columns = _tiles(height), _tiles(width)
    outputs = to_outputs @ products.permute(0, 2, 3, 1).reshape(-1, VALUES, channels)
    outputs = outputs.view(images, rows, columns, OUT, OUT, channels).transpose(2, 3)
    if (height, width) == (OUT * rows, OUT * columns):  # no tile reaches over the edge
        y.view(outputs.shape).copy_(outputs)
    else:
        outputs = outputs.reshape(images, OUT * rows, OUT * columns, channels)
        y.copy_(outputs[:, :height, :width])


def _square(matrix: tuple, like: Tensor) -> Tensor:
    """Of a map along a line, that of a square."""
    line = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(line, line)
