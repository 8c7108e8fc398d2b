"""Which super token a pixel belongs to, and where attention looks: against the layer itself."""

from __future__ import annotations

import pytest
import torch
from conftest import small_arch
from torch import nn

from mmsvit import SViT
from mmsvit.models.super_token_attention import PooledAttention, SuperTokenAttention
from mmsvit.visualization.super_token_maps import SuperTokenMap, SuperTokenRecorder

HEADS, CHANNELS = 2, 8


class OneLayer(nn.Module):
    """As much of a backbone as the recorder looks at: one block, without a stem."""

    def __init__(self, attention: SuperTokenAttention) -> None:
        super().__init__()
        block = nn.Module()
        block.attn = attention
        stage = nn.Module()
        stage.blocks = nn.ModuleList([block])
        self.stages = nn.ModuleList([stage])

    def forward(self, x):
        return self.stages[0].blocks[0].attn(x)


def record(attention: SuperTokenAttention, tokens: torch.Tensor) -> tuple[SuperTokenMap, ...]:
    """The map and the output of a layer for one token map."""
    layer = OneLayer(attention)
    with SuperTokenRecorder(layer, [0]) as recorder, torch.no_grad():
        output = layer(tokens)
    ((stage_map,),) = recorder.maps()
    return stage_map, output


def transparent(kind: type = SuperTokenAttention, cell=(4, 3)) -> SuperTokenAttention:
    """A layer whose output is the weighted mean of its input: values and output unchanged."""
    torch.manual_seed(0)
    attention = kind(CHANNELS, HEADS, cell)
    width = CHANNELS // HEADS
    with torch.no_grad():
        weight = attention.attend.qkv.weight.view(HEADS, 3, width, CHANNELS)
        weight[:, :2] *= 3  # Attention that is far from uniform.
        weight[:, 2] = torch.eye(CHANNELS).view(HEADS, width, CHANNELS)
        attention.attend.qkv.bias.view(HEADS, 3, width)[:, 2] = 0
        nn.init.eye_(attention.attend.proj.weight)
        nn.init.zeros_(attention.attend.proj.bias)
    return attention


@pytest.mark.parametrize(
    ('kind', 'cell'),
    [(SuperTokenAttention, (4, 3)), (PooledAttention, (4, 3)), (SuperTokenAttention, (1, 1))],
)
def test_weights_are_those_of_the_layer(kind, cell):
    tokens = torch.randn(1, 9, 14, CHANNELS, generator=torch.Generator().manual_seed(1))
    stage_map, output = record(transparent(kind, cell), tokens)
    padded = -(-9 // cell[0]) * cell[0] * -(-14 // cell[1]) * cell[1]
    for row, column in ((0, 0), (4, 7), (8, 13)):
        for head in range(HEADS):
            point = (4 * row, 4 * column)
            weights = stage_map.attention_from(point, head=head) / padded
            mean = (weights[..., None] * tokens[0]).sum(dim=(0, 1))
            channels = slice(head * CHANNELS // HEADS, (head + 1) * CHANNELS // HEADS)
            torch.testing.assert_close(
                mean[channels], output[0, row, column, channels], rtol=1e-4, atol=1e-5
            )
    heads = [stage_map.attention_from((16, 28), head=head) for head in range(HEADS)]
    torch.testing.assert_close(stage_map.attention_from((16, 28)), sum(heads) / HEADS)


def test_attention_of_a_super_token_is_that_of_its_pixels():
    # Tokens of two colours so far apart that each belongs to one super token alone.
    tokens = torch.zeros(1, 8, 12, CHANNELS)
    tokens[:, :, 6:, 0], tokens[:, :, :6, 1] = 60, 60
    stage_map, _ = record(transparent(cell=(4, 3)), tokens)
    hard = stage_map.attention_from((8, 8), of='super_token')
    assert not torch.allclose(hard, stage_map.attention_from((8, 36), of='super_token'))
    share = stage_map._share_of_token(2, 2)
    assert share.sum() <= 1 + 1e-5 and share.argmax() == stage_map.hard_assignment((32, 48))[8, 8]


def test_hard_assignment_on_the_tokens_is_the_largest_share():
    tokens = torch.randn(1, 9, 14, CHANNELS, generator=torch.Generator().manual_seed(2))
    stage_map, _ = record(SuperTokenAttention(CHANNELS, HEADS, (4, 3), 2), tokens)
    rows, columns = stage_map.grid
    expected = torch.zeros(9, 14, dtype=torch.int64)
    for y in range(9):
        for x in range(14):
            best = -1.0
            for i in range(9):
                row, column = y // 4 + i // 3 - 1, x // 3 + i % 3 - 1
                share = stage_map.association[y // 4, x // 3, i, y % 4 * 3 + x % 3].item()
                if 0 <= row < rows and 0 <= column < columns and share > best:
                    best, expected[y, x] = share, row * columns + column
    # Token i is centred on pixel 4 i.
    assert torch.equal(stage_map.hard_assignment((36, 56))[::4, ::4], expected)
    # The middle one of three by three is where the pixel was.
    finer = stage_map.hard_assignment((108, 168), (36, 56))
    assert torch.equal(finer[1::3, 1::3], stage_map.hard_assignment((36, 56)))


@pytest.mark.parametrize('cell', [(2, 2), (4, 3), (1, 1), (8, 8)])
def test_pixels_between_tokens_have_super_tokens_near_them(cell):
    tokens = torch.randn(1, 11, 10, CHANNELS, generator=torch.Generator().manual_seed(3))
    stage_map, _ = record(SuperTokenAttention(CHANNELS, HEADS, cell), tokens)
    labels = stage_map.hard_assignment((44, 40), smooth=True)
    rows, columns = labels // stage_map.grid[1], labels % stage_map.grid[1]
    own_rows = (torch.arange(44) / 4 / cell[0])[:, None]
    own_columns = torch.arange(40) / 4 / cell[1]
    assert ((rows + 0.5 - own_rows).abs() <= 2.5).all()
    assert ((columns + 0.5 - own_columns).abs() <= 2.5).all()


def test_borders_follow_the_colours_of_the_tokens():
    tokens = torch.zeros(1, 16, 16, CHANNELS)
    disc = (torch.arange(16)[:, None] - 7) ** 2 + (torch.arange(16) - 7) ** 2 <= 30
    tokens[0, disc, 0], tokens[0, ~disc, 1] = 9.0, 9.0
    stage_map, _ = record(SuperTokenAttention(CHANNELS, HEADS, (8, 8)), tokens)
    labels = stage_map.hard_assignment((64, 64))[::4, ::4]
    assert not set(labels[disc].tolist()) & set(labels[~disc].tolist())


def test_wrong_points_and_heads_are_refused():
    stage_map, _ = record(
        SuperTokenAttention(CHANNELS, HEADS, (2, 2)), torch.randn(1, 4, 6, CHANNELS)
    )
    with pytest.raises(ValueError, match='head must be from 0 to 1'):
        stage_map.attention_from((0, 0), head=2)
    with pytest.raises(ValueError, match='outside the 4x6 tokens'):
        stage_map.attention_from((0, 27))
    with pytest.raises(ValueError, match="'pixel' or 'super_token'"):
        stage_map.attention_from((0, 0), of='cell')


@pytest.mark.parametrize('with_cp', [False, True])
def test_recorder_sees_a_training_step_and_leaves_nothing_behind(with_cp):
    torch.manual_seed(0)
    backbone = SViT(small_arch(), with_cp=with_cp).train()
    images = torch.randn(3, 3, 66, 50)
    with SuperTokenRecorder(backbone, max_images=2) as recorder:
        sum(output.sum() for output in backbone(images)).backward()
    maps = recorder.maps()
    assert [[(m.stage, m.block, m.num_blocks) for m in image] for image in maps] == [
        [(0, 0, 1), (1, 1, 2)]
    ] * 2
    assert torch.equal(recorder.images, images[:2])
    assert maps[0][1].token_shape == (9, 7) and maps[0][1].grid == (5, 3)
    assert not any(m._forward_pre_hooks for m in backbone.modules())
    one = SViT(small_arch()).eval()
    with SuperTokenRecorder(one, stages=[2, 0], block=0) as recorder, torch.no_grad():
        one(images)
    assert [m.stage for m in recorder.maps()[0]] == [0, 2]


def test_recorder_refuses_what_is_not_there():
    backbone = SViT(small_arch())
    with pytest.raises(ValueError, match='there is no stage 5'):
        SuperTokenRecorder(backbone, [4])
    with pytest.raises(ValueError, match='there is no block 3 in stage 2'):
        SuperTokenRecorder(backbone, [1], block=2)
    with pytest.raises(RuntimeError, match='no forward pass'):
        SuperTokenRecorder(backbone).maps()
