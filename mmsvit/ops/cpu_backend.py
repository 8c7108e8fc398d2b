"""The backend ``cpu``: a few rows at a time, so that intermediate results stay in the cache.

It computes what :mod:`.torch_backend` does, into preallocated memory, and therefore without
PyTorch's own gradients: those of sampling are in :mod:`.custom_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_backend
from .cpu_cache import rows_in_cache
from .cpu_conv_ffn import add_depthwise_conv, conv_ffn
from .modes import needs_grad, without_autocast
from .torch_backend import EPS, NEIGHBOURS, split_into_cells


def _pieces(
    tokens_shape: Sequence[int], super_token_size: Sequence[int], itemsize: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of the grid to work on together, the same with a row on each side, rows of tokens.

    The second is for maps with a border of one.
    """
    n, height, width, channels = tokens_shape
    h, w = super_token_size
    grid_h, grid_w = (height + h - 1) // h, (width + w - 1) // w
    # Of each cell there are its tokens, and its nine neighbours or what these get.
    step = rows_in_cache(n * grid_w * (h * w + 9) * channels * itemsize)
    step = math.ceil(grid_h / max(1, round(grid_h / step)))
    for first in range(0, grid_h, step):
        last = min(first + step, grid_h)
        yield slice(first, last), slice(first, last + 2), slice(first * h, min(last * h, height))


# F.pad adds the zero vectors outside the grid: (N, Gh, Gw, C) -> (N, Gh + 2, Gw + 2, C).
_BORDER = (0, 0, 1, 1, 1, 1)


def _gather_neighbours(padded: Tensor) -> Tensor:
    """(N, Gh + 2, Gw + 2, C) -> (N, Gh, Gw, 9, C)."""
    windows = padded.unfold(2, 3, 1).unfold(1, 3, 1)
    return windows.permute(0, 1, 2, 5, 4, 3).flatten(3, 4)


def _scatter_neighbours(parts: Tensor, padded: Tensor) -> None:
    """Add (N, Gh, Gw, 9, C) to (N, Gh + 2, Gw + 2, C): the adjoint."""
    _, grid_h, grid_w, _, _ = parts.shape
    for (i, j), part in zip(NEIGHBOURS, parts.unbind(dim=3)):
        padded[:, 1 + i : 1 + i + grid_h, 1 + j : 1 + j + grid_w] += part


def _join_cells(cells: Tensor, super_token_size: Sequence[int], tokens: Tensor) -> None:
    """Write (N, Gh, Gw, h*w, C) into (N, H, W, C), without the padding."""
    n, grid_h, grid_w, _, channels = cells.shape
    h, w = super_token_size
    cells = cells.reshape(n, grid_h, grid_w, h, w, channels).transpose(2, 3)
    if tokens.shape[1:3] == (grid_h * h, grid_w * w):
        tokens.unflatten(2, (grid_w, w)).unflatten(1, (grid_h, h)).copy_(cells)
    else:
        cells = cells.reshape(n, grid_h * h, grid_w * w, channels)
        tokens.copy_(cells[:, : tokens.shape[1], : tokens.shape[2]])


def sample(
    tokens: Tensor, super_token_size: Sequence[int], num_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmsvit.ops.custom_ops.sample`."""
    with without_autocast(tokens.device):
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        pieces = list(_pieces(tokens.shape, super_token_size, dtype.itemsize))
        maps, (h, w) = tokens.to(dtype).permute(0, 3, 1, 2), super_token_size
        means = F.avg_pool2d(maps, (h, w), ceil_mode=True, divisor_override=h * w)
        super_tokens = means.permute(0, 2, 3, 1)
        for _ in range(num_iters):
            padded = F.pad(super_tokens * tokens.shape[3] ** -0.5, _BORDER)
            sums, masses = torch.zeros_like(padded), torch.zeros_like(padded[..., :1])
            parts = []
            for _, halo, rows in pieces:
                cells = split_into_cells(tokens[:, rows], super_token_size, dtype)
                part = _gather_neighbours(padded[:, halo]) @ cells.transpose(-1, -2)
                part = part.softmax(dim=3)
                _scatter_neighbours(part @ cells, sums[:, halo])
                parts.append(part)
            association = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            _scatter_neighbours(association.sum(dim=4, keepdim=True), masses)
            mass = masses[:, 1:-1, 1:-1].contiguous()
            super_tokens = sums[:, 1:-1, 1:-1] / (mass + EPS)
        return super_tokens.to(tokens.dtype), association, mass


def aggregate(
    association: Tensor, tokens: Tensor, mass: Tensor | None, super_token_size: Sequence[int]
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.aggregate`."""
    dtype = association.dtype
    n, grid_h, grid_w = association.shape[:3]
    with without_autocast(tokens.device):
        sums = association.new_zeros(n, grid_h + 2, grid_w + 2, tokens.shape[3])
        for grid_rows, halo, rows in _pieces(tokens.shape, super_token_size, dtype.itemsize):
            cells = split_into_cells(tokens[:, rows], super_token_size, dtype)
            _scatter_neighbours(association[:, grid_rows] @ cells, sums[:, halo])
        sums = sums[:, 1:-1, 1:-1]
        sums = sums.clone() if mass is None else sums / (mass + EPS)
        return sums.to(tokens.dtype)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    token_shape: Sequence[int],
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.distribute`."""
    dtype = association.dtype
    with without_autocast(super_tokens.device):
        tokens = super_tokens.new_empty(super_tokens.shape[0], *token_shape, super_tokens.shape[3])
        super_tokens = super_tokens.to(dtype)
        if mass is not None:
            super_tokens = super_tokens / (mass + EPS)
        padded = F.pad(super_tokens, _BORDER)
        for grid_rows, halo, rows in _pieces(tokens.shape, super_token_size, dtype.itemsize):
            neighbours = _gather_neighbours(padded[:, halo])
            cells = association[:, grid_rows].transpose(-1, -2) @ neighbours
            _join_cells(cells, super_token_size, tokens[:, rows])
        return tokens


def gelu_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See :func:`mmsvit.ops.gelu_affine`."""
    if needs_grad(x) or not x.is_contiguous():
        return torch_backend.gelu_affine(x, scale, shift)
    for pixels in x.flatten(0, 2).split(rows_in_cache(x.shape[3] * x.element_size())):
        torch_backend.gelu_affine(pixels, scale, shift)
    return x


def channels_first(x: Tensor) -> Tensor:
    """See :func:`mmsvit.ops.channels_first`."""
    if needs_grad(x):
        return torch_backend.channels_first(x)
    n, height, width, channels = x.shape
    output = x.new_empty(n, channels, height, width)
    # PyTorch's copy reads with strides from all over the map. Pieces read one part of it, and
    # write to a place of its own for each channel: an eighth of the cache does best.
    pixels = rows_in_cache(8 * channels * x.element_size())
    for image, out in zip(x.flatten(1, 2), output.flatten(2)):
        for source, target in zip(image.split(pixels), out.split(pixels, dim=1)):
            target.copy_(source.t())
    return output
