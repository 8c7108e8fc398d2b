"""Super token sampling in plain PyTorch: runs everywhere, and is what others are tested against.

Tokens are ``(N, H, W, C)``. They are cut into cells of ``h x w`` tokens, one
super token a cell, padded with zeros at the bottom and the right. ``Gh x Gw``
is the grid of cells.

Sums over a cell do not fit into half precision, so everything is computed in
float32 at least (float64 stays float64), whatever autocast says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _split_into_cells(tokens: Tensor, cell_size: tuple[int, int]) -> Tensor:
    """(N, H, W, C) -> (N, Gh, Gw, h*w, C), zero-padded."""
    n, height, width, channels = tokens.shape
    h, w = cell_size
    pad_bottom, pad_right = -height % h, -width % w
    if pad_bottom or pad_right:
        tokens = F.pad(tokens, (0, 0, 0, pad_right, 0, pad_bottom))
    grid_h, grid_w = (height + pad_bottom) // h, (width + pad_right) // w
    cells = tokens.reshape(n, grid_h, h, grid_w, w, channels).transpose(2, 3)
    return cells.reshape(n, grid_h, grid_w, h * w, channels)


def _join_cells(cells: Tensor, cell_size: tuple[int, int], token_shape: tuple[int, int]) -> Tensor:
    """(N, Gh, Gw, h*w, C) -> (N, H, W, C): the inverse, with the padding cropped."""
    n, grid_h, grid_w, _, channels = cells.shape
    h, w = cell_size
    tokens = cells.reshape(n, grid_h, grid_w, h, w, channels).transpose(2, 3)
    tokens = tokens.reshape(n, grid_h * h, grid_w * w, channels)
    return tokens[:, : token_shape[0], : token_shape[1]].contiguous()


def _gather_neighbours(super_tokens: Tensor) -> Tensor:
    """(N, Gh, Gw, C) -> (N, Gh, Gw, 9, C), row by row; zeros outside the grid."""
    _, grid_h, grid_w, _ = super_tokens.shape
    padded = F.pad(super_tokens, (0, 0, 1, 1, 1, 1))
    return torch.stack(
        [padded[:, i : i + grid_h, j : j + grid_w] for i in range(3) for j in range(3)], dim=3
    )


def _scatter_neighbours(parts: Tensor) -> Tensor:
    """(N, Gh, Gw, 9, C) -> (N, Gh, Gw, C): the adjoint; what leaves the grid is dropped."""
    n, grid_h, grid_w, _, channels = parts.shape
    padded = parts.new_zeros(n, grid_h + 2, grid_w + 2, channels)
    for k in range(9):
        i, j = divmod(k, 3)
        padded[:, i : i + grid_h, j : j + grid_w] += parts[:, :, :, k]
    return padded[:, 1:-1, 1:-1].contiguous()


def associate(tokens: Tensor, cell_size: tuple[int, int], num_iters: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(tokens.device.type, enabled=False):
        cells = _split_into_cells(tokens.to(_accumulation_dtype(tokens)), cell_size)
        scale = tokens.shape[-1] ** -0.5
        super_tokens = cells.mean(dim=3)
        for iteration in range(num_iters):
            neighbours = _gather_neighbours(super_tokens)
            association = (cells @ neighbours.transpose(-1, -2) * scale).softmax(dim=-1)
            mass = _scatter_neighbours(association.sum(dim=3).unsqueeze(-1))
            if iteration < num_iters - 1:
                sums = _scatter_neighbours(association.transpose(-1, -2) @ cells)
                super_tokens = sums / (mass + 1e-12)
    return association, mass


def aggregate(association: Tensor, tokens: Tensor, cell_size: tuple[int, int]) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        cells = _split_into_cells(tokens.to(association.dtype), cell_size)
        return _scatter_neighbours(association.transpose(-1, -2) @ cells)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    cell_size: tuple[int, int],
    token_shape: tuple[int, int],
) -> Tensor:
    with torch.autocast(super_tokens.device.type, enabled=False):
        neighbours = _gather_neighbours(super_tokens.to(association.dtype))
        return _join_cells(association @ neighbours, cell_size, token_shape)
