"""Super token sampling as mathematics, apart from the model."""

from __future__ import annotations

import pytest
import torch

from mmsvit.ops import aggregate, associate, distribute

# Token map and cell: divided and not, one row, one cell, cells beyond the map, not square.
SHAPES = [
    ((8, 8), (4, 4)),
    ((5, 25), (4, 4)),
    ((84, 19), (8, 8)),
    ((1, 7), (1, 3)),
    ((3, 3), (8, 8)),
    ((6, 10), (2, 5)),
]


def make_tokens(shape, channels=6, n=2, dtype=torch.float64):
    return torch.randn(n, *shape, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def loop_reference(tokens, cell, num_iters):
    """Super tokens and what is sent back by loops over tokens, straight from the paper."""
    n, height, width, channels = tokens.shape
    h, w = cell
    grid_h, grid_w = -(-height // h), -(-width // w)
    padded = tokens.new_zeros(n, grid_h * h, grid_w * w, channels)
    padded[:, :height, :width] = tokens
    cells = padded.reshape(n, grid_h, h, grid_w, w, channels)
    supers = cells.mean(dim=(2, 4))
    back = torch.zeros_like(padded)
    for _ in range(num_iters):
        sums, mass = torch.zeros_like(supers), supers.new_zeros(n, grid_h, grid_w, 1)
        weights = {}
        for y in range(grid_h * h):
            for x in range(grid_w * w):
                around = [(y // h + i, x // w + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                inside = [0 <= a < grid_h and 0 <= b < grid_w for a, b in around]
                logits = [
                    (padded[:, y, x] * supers[:, a, b]).sum(-1) * channels**-0.5
                    if ok
                    else supers.new_zeros(n)
                    for (a, b), ok in zip(around, inside)
                ]
                q = torch.stack(logits, -1).softmax(-1)
                weights[y, x] = [(ab, q[:, k]) for k, ab in enumerate(around) if inside[k]]
        for (y, x), shares in weights.items():
            for (a, b), share in shares:
                sums[:, a, b] += share[:, None] * padded[:, y, x]
                mass[:, a, b] += share[:, None]
        supers = sums / (mass + 1e-12)
    for (y, x), shares in weights.items():
        for (a, b), share in shares:
            back[:, y, x] += share[:, None] * supers[:, a, b]
    return supers, back[:, :height, :width]


@pytest.mark.parametrize('num_iters', [1, 2])
@pytest.mark.parametrize(('shape', 'cell'), SHAPES)
def test_against_loops(shape, cell, num_iters):
    tokens = make_tokens(shape)
    association, mass = associate(tokens, cell, num_iters)
    supers = aggregate(association, tokens, cell) / (mass + 1e-12)
    expected_supers, expected_tokens = loop_reference(tokens, cell, num_iters)
    torch.testing.assert_close(supers, expected_supers)
    torch.testing.assert_close(distribute(association, supers, cell, shape), expected_tokens)


@pytest.mark.parametrize(('shape', 'cell'), SHAPES)
def test_association_is_a_distribution_without_gradient(shape, cell):
    association, mass = associate(make_tokens(shape).requires_grad_(), cell)
    assert not association.requires_grad and not mass.requires_grad
    torch.testing.assert_close(association.sum(-1), torch.ones_like(association[..., 0]))


@pytest.mark.parametrize(('shape', 'cell'), SHAPES)
def test_aggregate_and_distribute_are_adjoint(shape, cell):
    tokens = make_tokens(shape)
    association, mass = associate(tokens, cell)
    supers = torch.randn(*mass.shape[:3], 6, dtype=torch.float64)
    left = (aggregate(association, tokens, cell) * supers).sum()
    right = (tokens * distribute(association, supers, cell, shape)).sum()
    assert abs(left - right) <= 1e-10


def test_gradients_of_both_orders():
    shape, cell = (3, 5), (2, 2)
    association, mass = associate(make_tokens(shape, 3, 1), cell)
    tokens = make_tokens(shape, 3, 1).requires_grad_()
    supers = torch.randn(*mass.shape[:3], 3, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda t: aggregate(association, t, cell), tokens)
        assert check(lambda s: distribute(association, s, cell, shape), supers)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    shape, cell = (16, 24), (8, 8)
    tokens = (make_tokens(shape, 64) * 1e4).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    association, mass = associate(tokens, cell, num_iters=2)
    assert association.dtype == torch.float32
    supers = (aggregate(association, tokens, cell) / (mass + 1e-12)).to(dtype)
    back = distribute(association, supers, cell, shape)
    back.mean().backward()
    assert back.dtype == dtype and tokens.grad.dtype == dtype
    for tensor in (association, mass, supers, back, tokens.grad):
        assert torch.isfinite(tensor).all()


def test_layout_of_the_input_does_not_matter():
    tokens = make_tokens((9, 14), dtype=torch.float32)
    scattered = tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not scattered.is_contiguous()
    for one, other in zip(associate(tokens, (4, 4)), associate(scattered, (4, 4))):
        torch.testing.assert_close(one, other)
