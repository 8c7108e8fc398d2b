"""The public super token operations: what they compute, for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import custom_ops, torch_backend
from .modes import wants_own_operators


def _check_map(tensor: Tensor, name: str, shape: str) -> None:
    if tensor.ndim != 4 or not tensor.is_floating_point():
        raise ValueError(
            f'{name} must be floating point of shape {shape}, found {tensor.dtype} of shape '
            f'{tuple(tensor.shape)}'
        )


def sample(
    tokens: Tensor, super_token_size: tuple[int, int], num_iters: int = 1, backend: str = 'auto'
) -> tuple[Tensor, Tensor]:
    """Sample super tokens and associate every token with the nine around it (paper, Sec. 3.2).

    Super tokens start as the mean of each cell of ``super_token_size`` tokens; the
    association is the softmax over nine of ``token . super token * C**-0.5``;
    a super token becomes the mean of its tokens, weighted by the association.
    A neighbour outside the grid is a zero vector: it takes its share of the
    softmax, and what it takes is lost. Tokens are padded with zeros at the
    bottom and the right to whole cells, and the padding takes part in all of it.

    The association and its sums are constants to autograd, as in the published
    model: the super tokens are a linear function of the tokens.

    Args:
        tokens: ``(N, H, W, C)``, any floating dtype.
        super_token_size: Height and width of a cell in tokens.
        num_iters: How often association and super tokens are estimated.
        backend: See :func:`choose_backend`.

    Returns:
        The super tokens, ``(N, Gh, Gw, C)`` in the dtype of ``tokens`` with
        ``Gh = ceil(H/h)`` and ``Gw = ceil(W/w)``, and the association,
        ``(N, Gh, Gw, 9, h*w)`` in float32, or float64 for float64 tokens: for
        each cell, its neighbours row by row, and its tokens row by row.

    Raises:
        ValueError: An argument is not as described, or no such backend.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    _check_map(tokens, 'tokens', '(N, H, W, C)')
    if len(super_token_size) != 2 or min(super_token_size) < 1 or num_iters < 1:
        raise ValueError(
            'super_token_size must be two whole numbers of 1 or more and num_iters 1 or more, found '
            f'{super_token_size} and {num_iters}'
        )
    if wants_own_operators():
        return torch_backend.sample(tokens, super_token_size, num_iters)[:2]
    return custom_ops.call(custom_ops.sample, tokens, super_token_size, num_iters, backend)[:2]


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    super_token_size: tuple[int, int],
    token_shape: Sequence[int],
    backend: str = 'auto',
) -> Tensor:
    """Give each token the sum of its nine super tokens, weighted by the association.

    Args:
        association: ``(N, Gh, Gw, 9, h*w)`` from :func:`sample`, float32 or float64; a constant.
        super_tokens: ``(N, Gh, Gw, C)``, any floating dtype.
        super_token_size: The cell size that the association was made with.
        token_shape: Height and width ``(H, W)`` of the token map to return.
        backend: See :func:`choose_backend`.

    Returns:
        ``(N, H, W, C)`` in the dtype of ``super_tokens``.

    Raises:
        ValueError: An argument is not as described, the shapes do not belong together, or no such
            backend.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    _check_map(super_tokens, 'super tokens', '(N, Gh, Gw, C)')
    if association.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f'the association must be float32 or float64, as sample gives it, found {association.dtype}'
        )
    (height, width), (h, w) = token_shape, super_token_size
    n, grid_h, grid_w, _ = super_tokens.shape
    expected = (n, (height + h - 1) // h, (width + w - 1) // w, 9, h * w)
    if tuple(association.shape) != expected or tuple(expected[1:3]) != (grid_h, grid_w):
        raise ValueError(
            f'{height}x{width} tokens in cells of {h}x{w} need an association of shape {expected} '
            f'and as many super tokens, found {tuple(association.shape)} and super tokens of shape '
            f'{tuple(super_tokens.shape)}'
        )
    arguments = (association, super_tokens, None, super_token_size, token_shape)
    if wants_own_operators():
        return torch_backend.distribute(*arguments)
    return custom_ops.call(custom_ops.distribute, *arguments, backend)
