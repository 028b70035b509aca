"""VoVNet against the paper's table, the authors' pool and direct sums; timm: test_weights.py."""

import pytest
import torch
from torch.nn.functional import hardsigmoid, max_pool2d

import backbones
from backbones.vovnet import OSABlock, TrailingMaxPool


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ese", [False, True])
def test_osa_block_concatenates_once(residual, ese):
    block = OSABlock(16, 8, 16, depth=3, act="relu", residual=residual, ese=ese).eval()
    x = torch.randn(2, 16, 9, 7)
    a = block.convs[0](x)
    b = block.convs[1](a)
    c = block.convs[2](b)
    expected = block.out_conv(torch.cat((x, a, b, c), dim=1))
    if ese:
        gate = hardsigmoid(
            expected.mean((2, 3)) @ block.ese.fc.weight.flatten(1).T + block.ese.fc.bias
        )
        expected = expected * gate[:, :, None, None]
    torch.testing.assert_close(block(x), expected + x if residual else expected)


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (8, 5), (1, 1), (3, 9)])
def test_trailing_pool_is_the_authors_and_rounds_up(size):
    x = -torch.rand(2, 3, *size)  # negative, so that a pad of zeros would win
    found = TrailingMaxPool()(x)
    assert found.shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    for i in range(found.shape[-2]):
        for j in range(found.shape[-1]):
            window = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            assert torch.equal(found[:, :, i, j], window.amax((2, 3)))
    if size[0] % 2 == 0 and size[1] % 2 == 0:
        assert torch.equal(found, max_pool2d(x, 3, 2, ceil_mode=True))
        graph = str(torch.export.export(TrailingMaxPool(), (x,)).graph)
        assert "aten.pad" not in graph  # which would copy the map


def test_trailing_pool_is_one_graph_for_even_and_odd_sizes():
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free},)
    program = torch.export.export(
        TrailingMaxPool(), (torch.randn(2, 3, 8, 6),), dynamic_shapes=shapes
    ).module()
    for size in ((8, 10), (9, 13), (6, 7)):
        x = torch.randn(3, 3, *size)
        assert torch.equal(program(x), TrailingMaxPool()(x))


@pytest.mark.parametrize(
    ("options", "residuals", "gates"),
    [
        ({}, 2, 6),
        ({"ese": "last"}, 2, 4),
        ({"ese": False}, 2, 0),
        ({"residual": False}, 0, 6),
        ({"residual": False, "ese": False}, 0, 0),
    ],
)
def test_versions(options, residuals, gates):
    """VoVNet-39 has 1, 1, 2, 2 blocks: the second of a stage can add its input."""
    net = backbones.create("vovnet39", width=0.125, **options)
    blocks = [m for m in net.modules() if isinstance(m, OSABlock)]
    assert len(blocks) == 6
    assert sum(block.residual for block in blocks) == residuals
    assert sum(block.ese is not None for block in blocks) == gates
    if options.get("ese") == "last":
        assert [b.ese is not None for b in blocks] == [True, True, False, True, False, True]


def test_stems():
    paper = backbones.create("vovnet39")
    authors = backbones.create("vovnet39", stem_stride=4)
    assert paper.channels == (128, 256, 512, 768, 1024)  # VoVNet, table 1
    assert authors.channels == (64, 256, 512, 768, 1024)
    count = sum(p.numel() for p in paper.parameters())
    assert count == sum(p.numel() for p in authors.parameters())


@torch.no_grad()
def test_vision_toolboxs_slim_stage_has_a_residual():
    """Its 128 channels are the stem's; the authors' first block has none, also if they agree."""
    net = backbones.create("vovnet19_slim", slim_channels=128)
    assert net.channels == (128, 128, 256, 384, 512)
    assert [stage.blocks[0].residual for stage in net.stages] == [True, False, False, False]
    net = backbones.create("vovnet19_slim", width=0.125)  # 16 and 16 channels
    assert not net.stages[0].blocks[0].residual
    with pytest.raises(ValueError, match=r"slim_channels=128 must be one of \(112,\)"):
        backbones.create("vovnet39", slim_channels=128)
