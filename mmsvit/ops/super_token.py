"""Public super token operations, their gradients, and the choice of who computes them.

The association is a constant to autograd (as in the published model), so
``aggregate`` and ``distribute`` are linear maps, and each is the other's
adjoint: the backward pass of one is the forward pass of the other.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import torch_backend


def select_backend(device: torch.device | str) -> tuple[ModuleType, str]:
    """Choose the module that computes the operations on ``device``.

    The only place that chooses.

    Returns:
        The backend module (with ``associate``, ``aggregate`` and ``distribute``)
        and the reason for the choice, for people to read.
    """
    return torch_backend, f'plain PyTorch, the only implementation for {torch.device(device).type}'


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, association, tokens, cell_size):
        ctx.save_for_backward(association)
        ctx.cell_size, ctx.token_shape = cell_size, tokens.shape[1:3]
        ctx.token_dtype = tokens.dtype
        backend, _ = select_backend(tokens.device)
        return backend.aggregate(association, tokens, cell_size)

    @staticmethod
    def backward(ctx, grad):
        (association,) = ctx.saved_tensors
        grad = _Distribute.apply(association, grad, ctx.cell_size, ctx.token_shape)
        return None, grad.to(ctx.token_dtype), None


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, association, super_tokens, cell_size, token_shape):
        ctx.save_for_backward(association)
        ctx.cell_size, ctx.super_token_dtype = cell_size, super_tokens.dtype
        backend, _ = select_backend(super_tokens.device)
        tokens = backend.distribute(association, super_tokens, cell_size, token_shape)
        return tokens.to(super_tokens.dtype)

    @staticmethod
    def backward(ctx, grad):
        (association,) = ctx.saved_tensors
        grad = _Aggregate.apply(association, grad, ctx.cell_size)
        return None, grad.to(ctx.super_token_dtype), None, None


@torch.no_grad()
def associate(
    tokens: Tensor, cell_size: tuple[int, int], num_iters: int = 1
) -> tuple[Tensor, Tensor]:
    """Soft assignment of every token to the 3x3 super tokens around its cell (paper, Sec. 3.2).

    Super tokens start as the mean of each cell of ``cell_size`` tokens; the
    association is the softmax over nine of ``token . super token * C**-0.5``.
    A neighbour outside the grid is a zero vector: it takes its share of the
    softmax, and what it takes is lost. Tokens are padded with zeros at the
    bottom and the right to whole cells, and the padding takes part in all of it.

    No gradient flows through the result.

    Args:
        tokens: ``(N, H, W, C)``, any floating dtype.
        cell_size: Height and width of a cell in tokens.
        num_iters: How often super tokens and association are estimated.

    Returns:
        The association, ``(N, Gh, Gw, h*w, 9)`` with ``Gh = ceil(H/h)`` and
        ``Gw = ceil(W/w)``, and its sum for each super token, ``(N, Gh, Gw, 1)``;
        both in float32, or float64 for float64 tokens.
    """
    backend, _ = select_backend(tokens.device)
    return backend.associate(tokens, cell_size, num_iters)


def aggregate(association: Tensor, tokens: Tensor, cell_size: tuple[int, int]) -> Tensor:
    """Sum tokens into super tokens, weighted by the association. Adjoint of :func:`distribute`.

    Args:
        association: ``(N, Gh, Gw, h*w, 9)`` from :func:`associate`; a constant.
        tokens: ``(N, H, W, C)``, any floating dtype.
        cell_size: The cell size that the association was made with.

    Returns:
        ``(N, Gh, Gw, C)`` in the association's dtype: sums over a cell can
        exceed what half precision holds.
    """
    return _Aggregate.apply(association, tokens, cell_size)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    cell_size: tuple[int, int],
    token_shape: tuple[int, int],
) -> Tensor:
    """Give each token the association-weighted sum of its nine super tokens.

    Adjoint of :func:`aggregate`.

    Args:
        association: ``(N, Gh, Gw, h*w, 9)`` from :func:`associate`; a constant.
        super_tokens: ``(N, Gh, Gw, C)``, any floating dtype.
        cell_size: The cell size that the association was made with.
        token_shape: Height and width ``(H, W)`` of the token map to return.

    Returns:
        ``(N, H, W, C)`` in the dtype of ``super_tokens``.
    """
    return _Distribute.apply(association, super_tokens, cell_size, tuple(token_shape))
