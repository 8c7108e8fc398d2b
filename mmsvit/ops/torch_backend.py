"""The backend ``torch``: PyTorch's own operations and layers. Runs everywhere, also in exports.

Layers are called as modules, so that whatever replaces, patches or watches them takes part.

Tokens are ``(N, H, W, C)``. They are cut into cells of ``h x w`` tokens, one
super token a cell, padded with zeros at the bottom and the right. ``Gh x Gw``
is the grid of cells.

Sums over a cell do not fit into half precision, so everything is computed in
float32 at least (float64 stays float64), whatever autocast says.

Where a graph of PyTorch's own operations is wanted, these functions are used
without :mod:`.custom_ops` around them; then the gradient is PyTorch's own, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .modes import is_tracing, needs_grad, without_autocast

NEIGHBOURS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
"""Rows and columns from a cell to its nine neighbours, in the order of the association."""

EPS = 1e-12
"""What is added to the mass of a super token before dividing by it."""


def _pad(tokens: Tensor, bottom: int, right: int) -> Tensor:
    """Add rows and columns of zeros to (N, H, W, C), or crop as many if they are negative."""
    if not is_tracing() and bottom == right == 0:
        return tokens
    # A slice would not do for cropping: exporters lose track of the size of one whose end may or
    # may not be beyond the map's.
    return F.pad(tokens, (0, 0, 0, right, 0, bottom))


def split_into_cells(tokens: Tensor, super_token_size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(N, H, W, C) -> (N, Gh, Gw, h*w, C) in ``dtype``, zero-padded."""
    n, height, width, channels = tokens.shape
    h, w = super_token_size
    grid_h, grid_w = (height + h - 1) // h, (width + w - 1) // w
    tokens = _pad(tokens, grid_h * h - height, grid_w * w - width)
    cells = tokens.reshape(n, grid_h, h, grid_w, w, channels).transpose(2, 3)
    # Naming the memory format makes one copy of the change of dtype and of layout.
    cells = cells.to(dtype, memory_format=torch.contiguous_format)
    return cells.reshape(n, grid_h, grid_w, h * w, channels)


def _join_cells(
    cells: Tensor, super_token_size: Sequence[int], token_shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """(N, Gh, Gw, h*w, C) -> (N, H, W, C) in ``dtype``: the inverse, with the padding cropped."""
    n, grid_h, grid_w, _, channels = cells.shape
    h, w = super_token_size
    tokens = cells.reshape(n, grid_h, grid_w, h, w, channels).transpose(2, 3)
    tokens = tokens.to(dtype, memory_format=torch.contiguous_format)
    tokens = tokens.reshape(n, grid_h * h, grid_w * w, channels)
    return _pad(tokens, token_shape[0] - grid_h * h, token_shape[1] - grid_w * w)


def _moved(padded: Tensor, by: int, dim: int) -> Tensor:
    """What is ``by`` steps away from each place, of a map with a border of one in ``dim``."""
    return padded[(slice(None),) * dim + (slice(1 + by, by - 1 or None),)]


def gather_neighbours(super_tokens: Tensor) -> Tensor:
    """(N, Gh, Gw, C) -> (N, Gh, Gw, 9, C); zeros outside the grid."""
    padded = F.pad(super_tokens, (0, 0, 1, 1, 1, 1))
    rows = [_moved(padded, i, dim=1) for i in (-1, 0, 1)]
    return torch.stack([_moved(row, j, dim=2) for row in rows for j in (-1, 0, 1)], dim=3)


def scatter_neighbours(parts: Tensor) -> Tensor:
    """(N, Gh, Gw, 9, C) -> (N, Gh, Gw, C): the adjoint; what leaves the grid is dropped."""
    if is_tracing():  # Exporters make a scatter of every write in place.
        # First the columns, then the rows: six pieces, not nine.
        padded = F.pad(parts.unflatten(3, (3, 3)), (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
        left, middle, right = (_moved(padded, -j, dim=2)[..., j + 1, :] for j in (-1, 0, 1))
        padded = left + middle + right
        upper, middle, lower = (_moved(padded, -i, dim=1)[..., i + 1, :] for i in (-1, 0, 1))
        return upper + middle + lower
    n, grid_h, grid_w, _, channels = parts.shape
    total = parts.new_zeros(n, grid_h + 2, grid_w + 2, channels)
    for (i, j), part in zip(NEIGHBOURS, parts.unbind(dim=3)):
        _moved(_moved(total, i, dim=1), j, dim=2).add_(part)
    return total[:, 1:-1, 1:-1].contiguous()


def _associate(cells: Tensor, super_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The association ``(N, Gh, Gw, 9, h*w)`` and what each super token gets ``(N, Gh, Gw, 1)``."""
    neighbours = gather_neighbours(super_tokens * cells.shape[-1] ** -0.5)
    association = (neighbours @ cells.transpose(-1, -2)).softmax(dim=3)
    return association, scatter_neighbours(association.sum(dim=4, keepdim=True))


def sample(
    tokens: Tensor, super_token_size: Sequence[int], num_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmsvit.ops.custom_ops.sample`."""
    with without_autocast(tokens.device):
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        cells = split_into_cells(tokens, super_token_size, dtype)
        constant = cells.detach()
        super_tokens = constant.mean(dim=3)
        for _ in range(num_iters - 1):
            association, mass = _associate(constant, super_tokens)
            super_tokens = scatter_neighbours(association @ constant) / (mass + EPS)
        association, mass = _associate(constant, super_tokens)
        super_tokens = scatter_neighbours(association @ cells) / (mass + EPS)
        return super_tokens.to(tokens.dtype), association, mass


def aggregate(
    association: Tensor, tokens: Tensor, mass: Tensor | None, super_token_size: Sequence[int]
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.aggregate`."""
    with without_autocast(tokens.device):
        cells = split_into_cells(tokens, super_token_size, association.dtype)
        sums = scatter_neighbours(association @ cells)
        return (sums if mass is None else sums / (mass + EPS)).to(tokens.dtype)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    token_shape: Sequence[int],
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.distribute`."""
    dtype = super_tokens.dtype
    with without_autocast(super_tokens.device):
        super_tokens = super_tokens.to(association.dtype)
        if mass is not None:
            super_tokens = super_tokens / (mass + EPS)
        cells = association.transpose(-1, -2) @ gather_neighbours(super_tokens)
        return _join_cells(cells, super_token_size, token_shape, dtype)


def add_residual(branch: Tensor, x: Tensor, in_place: bool) -> Tensor:
    """``x + branch``, into the memory of ``branch`` where that is allowed and has the dtype."""
    return branch.add_(x) if in_place and branch.dtype == x.dtype else x + branch


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that takes (N, C, H, W) to ``x`` of (N, H, W, C), without a copy."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def add_depthwise_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """See :func:`mmsvit.ops.add_depthwise_conv`."""
    return x + channels_last(conv, x)


def conv_ffn(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module,
    dwconv: nn.Module | None,
    fc2: nn.Module,
    drop: nn.Module,
    residual: bool,
    recompute: bool,
    add_conv: Callable[[Tensor, nn.Module], Tensor] = add_depthwise_conv,
) -> Tensor:
    """See :func:`mmsvit.ops.conv_ffn`; ``add_conv`` adds what ``dwconv`` gives."""
    if recompute and torch.is_grad_enabled():
        layers = fc1, act, dwconv, fc2, drop, residual, False, add_conv
        return checkpoint(conv_ffn, x, *layers, use_reentrant=False)
    hidden = drop(act(fc1(x)))
    if dwconv is not None:
        hidden = add_conv(hidden, dwconv)
    output = drop(fc2(hidden))
    if not residual:
        return output
    return add_residual(output, x, in_place=not needs_grad(output))


def gelu_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See :func:`mmsvit.ops.gelu_affine`."""
    if needs_grad(x) or is_tracing():
        return torch.addcmul(shift, F.gelu(x), scale).to(x.dtype)
    torch.ops.aten.gelu_(x)
    return torch.addcmul(shift, x, scale, out=x)


def channels_first(x: Tensor) -> Tensor:
    """See :func:`mmsvit.ops.channels_first`."""
    return x.permute(0, 3, 1, 2).contiguous()
