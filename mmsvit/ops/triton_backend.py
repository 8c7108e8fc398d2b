"""Super token sampling in Triton, for CUDA devices.

Bytes are what it costs, so the kernels count them. With one pass being all
tokens once, from or to the device's memory:

====================================  ==================================================
mean of each cell                     reads one pass
association and aggregation, fused    reads one pass, writes the association
distribution                          reads the association, writes one pass
their gradients, in the other order   the association and one pass each
====================================  ==================================================

The association is nine float32 for each token. A *strip*, one or more cells
side by side, is worked on in tiles of tokens, a program each. Tokens of a strip
of s cells belong to 3 x (s + 2) super tokens, so a tile is two small matrix
products: its super tokens by its tokens, which gives the logits, and, after the
softmax, association by tokens, which gives the tile's part of each super token.
A second kernel adds up the parts that belong to a super token, always in the
same order. Nothing is added atomically: the same input gives the same bits.
The parts are float32, 3 x (s + 2) x C for a tile; between the two kernels they
mostly stay in the L2 cache. Beyond 256 channels a tile is read a second time,
from the cache, by the program that has just read it.

Tokens beyond the edge of the map are zeros that nobody stores, and neighbours
beyond the edge of the grid are zeros that get their share of the softmax.

Channels and cell are compiled into a kernel, the sizes of the map are not: one
compilation does for all images.

Products accumulate in float32 and take one factor in float32: halves multiply
it in two summands, each in their own type, so that tensor cores are used and
16 bits of it and more count; float32 uses no tf32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from .backend import is_interpreted


@triton.jit
def _product(weights, x):
    """The matrix product of float32 ``weights`` and ``x`` of any dtype, in float32."""
    if x.dtype == tl.float32:
        result = tl.dot(weights, x, input_precision='ieee')
    else:
        high = weights.to(x.dtype)
        low = (weights - high.to(tl.float32)).to(x.dtype)
        result = tl.dot(high, x, tl.dot(low, x))
    return result


@triton.jit
def _locate_tokens(
    strip,
    tile,
    row,
    height,
    width,
    grid_w,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    STRIP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """For each token of a tile: its cell in the strip, whether that exists, place in it and in the map.

    The last of them says whether the token exists: others are padding.
    """
    number = tile * TOKENS + tl.arange(0, TOKENS)
    cell = number // (CELL_H * CELL_W)
    in_grid = (cell < STRIP) & (strip * STRIP + cell < grid_w)
    place = number % (CELL_H * CELL_W)
    y = row * CELL_H + place // CELL_W
    x = (strip * STRIP + cell) * CELL_W + place % CELL_W
    return cell, in_grid, place, y * width + x, in_grid & (y < height) & (x < width)


@triton.jit
def _locate_neighbours(strip, row, grid_h, grid_w, STRIP: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """For each super token around a strip: row and column there, place in the grid, and whether it exists."""
    number = tl.arange(0, NEIGHBOURS)
    i, j = number // (STRIP + 2), number % (STRIP + 2)
    y, x = row - 1 + i, strip * STRIP - 1 + j
    exists = (i < 3) & (y >= 0) & (y < grid_h) & (x >= 0) & (x < grid_w)
    return i, j, y * grid_w + x, exists


@triton.jit
def _load_rows(start, row, exists, channel, CHANNELS: tl.constexpr):
    """Some channels of some rows of ``CHANNELS``; zeros where a row or a channel does not exist."""
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(start + row[:, None] * CHANNELS + channel[None, :], mask, 0.0)


@triton.jit
def _store_rows(start, row, exists, channel, values, CHANNELS: tl.constexpr):
    mask = exists[:, None] & (channel < CHANNELS)[None, :]
    tl.store(start + row[:, None] * CHANNELS + channel[None, :], values, mask)


@triton.jit(do_not_specialize=['height', 'width'])
def _mean_kernel(
    tokens,
    means,
    height,
    width,
    CHANNELS: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of one cell, padding included."""
    column, row, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    grid_w, grid_h = tl.num_programs(0), tl.num_programs(1)
    tokens += n * height * width * CHANNELS
    means += ((n * grid_h + row) * grid_w + column) * CHANNELS
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for tile in range(tl.cdiv(CELL_H * CELL_W, TOKENS)):
            _, _, _, token, exists = _locate_tokens(
                column, tile, row, height, width, grid_w, CELL_H, CELL_W, 1, TOKENS
            )
            total += _load_rows(tokens, token, exists, channel, CHANNELS).to(tl.float32)
        mean = tl.sum(total, axis=0) / (CELL_H * CELL_W)
        tl.store(means + channel, mean, channel < CHANNELS)


@triton.jit(do_not_specialize=['height', 'width', 'grid_h', 'grid_w'])
def _aggregate_kernel(
    tokens,
    super_tokens,
    association,
    parts,
    mass_parts,
    height,
    width,
    grid_h,
    grid_w,
    scale,
    CHANNELS: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    STRIP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    ASSOCIATE: tl.constexpr,
    STORE: tl.constexpr,
):
    """One tile's part of its super tokens.

    ``ASSOCIATE``: associate the tokens with the super tokens first, give the mass, too,
    and ``STORE`` the association or not; without it, the association is read.
    """
    CELL: tl.constexpr = CELL_H * CELL_W
    ONE_BLOCK: tl.constexpr = CHANNELS <= BLOCK
    strip, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    row, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens += n * height * width * CHANNELS
    super_tokens += n * grid_h * grid_w * CHANNELS
    association += ((n * grid_h + row) * grid_w + strip * STRIP) * 9 * CELL
    program = (n * grid_h + row) * tl.num_programs(0) + tl.program_id(0)
    parts += program * 3 * (STRIP + 2) * CHANNELS
    mass_parts += program * 3 * (STRIP + 2)

    cell, in_grid, place, token, token_exists = _locate_tokens(
        strip, tile, row, height, width, grid_w, CELL_H, CELL_W, STRIP, TOKENS
    )
    i, j, neighbour, neighbour_exists = _locate_neighbours(
        strip, row, grid_h, grid_w, STRIP, NEIGHBOURS
    )
    # Which of the strip's neighbours are among a token's own nine, and which of these they are.
    step = j[:, None] - tl.minimum(cell, STRIP - 1)[None, :]
    around = (i < 3)[:, None] & (step >= 0) & (step < 3)
    ninth = cell[None, :] * 9 + 3 * i[:, None] + step
    association += ninth * CELL + place[None, :]
    stored = around & in_grid[None, :]

    if ASSOCIATE:
        if ONE_BLOCK:
            channel = tl.arange(0, BLOCK)
            x = _load_rows(tokens, token, token_exists, channel, CHANNELS)
            s = _load_rows(super_tokens, neighbour, neighbour_exists, channel, CHANNELS)
            logits = _product(s, tl.trans(x))
        else:
            logits = tl.zeros((NEIGHBOURS, TOKENS), tl.float32)
            for start in range(0, CHANNELS, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                x = _load_rows(tokens, token, token_exists, channel, CHANNELS)
                s = _load_rows(super_tokens, neighbour, neighbour_exists, channel, CHANNELS)
                logits += _product(s, tl.trans(x))
        logits = tl.where(around, logits * scale, float('-inf'))
        weights = tl.exp(logits - tl.max(logits, axis=0)[None, :])
        weights = weights / tl.sum(weights, axis=0)[None, :]
        weights = tl.where(in_grid[None, :], weights, 0.0)
        if STORE:
            tl.store(association, weights, stored)
        tl.store(mass_parts + tl.arange(0, NEIGHBOURS), tl.sum(weights, axis=1), neighbour_exists)
    else:
        weights = tl.load(association, stored, 0.0)

    if ASSOCIATE and ONE_BLOCK:
        part = _product(weights, x)
        _store_rows(parts, tl.arange(0, NEIGHBOURS), neighbour_exists, channel, part, CHANNELS)
    else:
        for start in range(0, CHANNELS, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            x = _load_rows(tokens, token, token_exists, channel, CHANNELS)
            part = _product(weights, x)
            _store_rows(parts, tl.arange(0, NEIGHBOURS), neighbour_exists, channel, part, CHANNELS)


@triton.jit(do_not_specialize=['strips'])
def _gather_kernel(
    parts,
    mass_parts,
    super_tokens,
    mass,
    strips,
    CHANNELS: tl.constexpr,
    STRIP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_MASS: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """One super token: the sum of its parts, by default; ``DIVIDE``: over its mass.

    ``SUM_MASS``: sum up the mass as well and give it; otherwise it is read.
    """
    x, y, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    grid_w, grid_h = tl.num_programs(0), tl.num_programs(1)
    this = (n * grid_h + y) * grid_w + x
    # The strips around, and which of their neighbours this super token is.
    number = tl.arange(0, 16)
    other, strip = y - 1 + number // 3, x // STRIP - 1 + number % 3
    i, j = y - other + 1, x - strip * STRIP + 1
    exists = (number < 9) & (other >= 0) & (other < grid_h) & (strip >= 0) & (strip < strips)
    exists &= (j >= 0) & (j < STRIP + 2)
    part = ((n * grid_h + other) * strips + strip) * TILES * 3 * (STRIP + 2) + i * (STRIP + 2) + j
    if SUM_MASS:
        masses = tl.zeros((16,), tl.float32)
        for tile in range(TILES):
            masses += tl.load(mass_parts + part + tile * 3 * (STRIP + 2), exists, 0.0)
        own_mass = tl.sum(masses, axis=0)
        tl.store(mass + this, own_mass)
    elif DIVIDE:
        own_mass = tl.load(mass + this)
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        sums = tl.zeros((16, BLOCK), tl.float32)
        for tile in range(TILES):
            row = part + tile * 3 * (STRIP + 2)
            sums += _load_rows(parts, row, exists, channel, CHANNELS)
        total = tl.sum(sums, axis=0)
        if DIVIDE:
            total = total / (own_mass + 1e-12)
        tl.store(super_tokens + this * CHANNELS + channel, total, channel < CHANNELS)


@triton.jit(do_not_specialize=['height', 'width', 'grid_h', 'grid_w'])
def _distribute_kernel(
    association,
    super_tokens,
    mass,
    tokens,
    height,
    width,
    grid_h,
    grid_w,
    CHANNELS: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    STRIP: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """One tile of tokens from the super tokens; ``DIVIDE``: from these over their mass."""
    CELL: tl.constexpr = CELL_H * CELL_W
    strip, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    row, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens += n * height * width * CHANNELS
    super_tokens += n * grid_h * grid_w * CHANNELS
    mass += n * grid_h * grid_w
    association += ((n * grid_h + row) * grid_w + strip * STRIP) * 9 * CELL

    cell, in_grid, place, token, token_exists = _locate_tokens(
        strip, tile, row, height, width, grid_w, CELL_H, CELL_W, STRIP, TOKENS
    )
    i, j, neighbour, neighbour_exists = _locate_neighbours(
        strip, row, grid_h, grid_w, STRIP, NEIGHBOURS
    )
    step = j[None, :] - cell[:, None]
    ninth = cell[:, None] * 9 + 3 * i[None, :] + step
    weights = tl.load(
        association + ninth * CELL + place[:, None],
        in_grid[:, None] & neighbour_exists[None, :] & (step >= 0) & (step < 3),
        0.0,
    )
    if DIVIDE:
        # A weight is at most its super token's mass. The factor of 64, which comes off again,
        # keeps what is divided by a large mass from the small numbers that float16 rounds off.
        weights *= 64 / (tl.load(mass + neighbour, neighbour_exists, 1.0) + 1e-12)[None, :]
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        s = _load_rows(super_tokens, neighbour, neighbour_exists, channel, CHANNELS)
        x = _product(weights, s)
        if DIVIDE:
            x /= 64
        _store_rows(tokens, token, token_exists, channel, x, CHANNELS)


def check_driver() -> None:
    """Raise what keeps Triton from launching kernels: no GPU, C compiler or Python headers."""
    triton.runtime.driver.active.get_current_target()


class Tiling(NamedTuple):
    """How programs share the tokens of a row of cells."""

    strip: int
    """Cells side by side that make a strip."""
    tiles: int
    """Programs for a strip."""
    tokens: int
    """Tokens for a program, a power of 2."""
    neighbours: int
    """Super tokens around a strip, rounded up to a power of 2."""
    block: int
    """Channels at a time, a power of 2."""
    num_warps: int

    @classmethod
    def of(cls, cell_size: Sequence[int], channels: int, element_size: int) -> Tiling:
        """Tiles of up to 32 KB: large enough to load at full width, small enough for registers."""
        cell = cell_size[0] * cell_size[1]
        block = max(next_power_of_2(channels), 16) if channels <= 256 else 128
        most = 8192 // block
        # 3 x (2 + 2) super tokens fit into a product's least size, 16, as 3 x (1 + 2) do;
        # cells of a few tokens need longer strips to fill a tile.
        strip = 8 if cell <= 8 and block <= 128 else 2 if 2 * cell <= most else 1
        tokens = min(max(next_power_of_2(strip * cell), 16), most)
        return cls(
            strip=strip,
            tiles=cdiv(strip * cell, tokens),
            tokens=tokens,
            neighbours=next_power_of_2(3 * (strip + 2)),
            block=block,
            num_warps=8 if tokens * block * element_size > 16384 else 4,
        )


def _launchable(tensor: Tensor) -> Tensor:
    """``tensor`` as the kernels want it."""
    # Triton's interpreter multiplies bfloat16 wrongly, and rounds to it by truncation.
    if is_interpreted() and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous()


def _sum_tokens(
    tokens: Tensor,
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    cell_size: Sequence[int],
    means: Tensor | None = None,
    store: bool = False,
) -> None:
    """Write into ``super_tokens`` the sums of tokens by association, over ``mass`` if that is given.

    Given ``means``, first associate the tokens with these, which also writes ``mass``,
    and the association if it is to be stored.
    """
    n, height, width, channels = tokens.shape
    _, grid_h, grid_w, _, _ = association.shape
    tiling = Tiling.of(cell_size, channels, tokens.element_size())
    strips = cdiv(grid_w, tiling.strip)
    around = 3 * (tiling.strip + 2)
    parts = association.new_empty(n, grid_h, strips, tiling.tiles, around, channels)
    mass_parts = association.new_empty(n, grid_h, strips, tiling.tiles, around)
    _aggregate_kernel[(strips * tiling.tiles, grid_h, n)](
        tokens,
        tokens if means is None else means,
        association,
        parts,
        mass_parts,
        height,
        width,
        grid_h,
        grid_w,
        channels**-0.5,
        CHANNELS=channels,
        CELL_H=cell_size[0],
        CELL_W=cell_size[1],
        STRIP=tiling.strip,
        TILES=tiling.tiles,
        TOKENS=tiling.tokens,
        NEIGHBOURS=tiling.neighbours,
        BLOCK=tiling.block,
        ASSOCIATE=means is not None,
        STORE=store,
        num_warps=tiling.num_warps,
    )
    _gather_kernel[(grid_w, grid_h, n)](
        parts,
        mass_parts,
        super_tokens,
        mass_parts if mass is None else mass,
        strips,
        CHANNELS=channels,
        STRIP=tiling.strip,
        TILES=tiling.tiles,
        BLOCK=tiling.block,
        SUM_MASS=means is not None,
        DIVIDE=mass is not None,
        num_warps=max(tiling.block // 64, 1),
    )


def sample(
    tokens: Tensor, cell_size: Sequence[int], num_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmsvit.ops.custom_ops.sample`."""
    dtype, tokens = tokens.dtype, _launchable(tokens)
    n, height, width, channels = tokens.shape
    h, w = cell_size
    grid_h, grid_w = cdiv(height, h), cdiv(width, w)
    means = tokens.new_empty(n, grid_h, grid_w, channels, dtype=torch.float32)
    mass = tokens.new_empty(n, grid_h, grid_w, 1, dtype=torch.float32)
    association = tokens.new_empty(n, grid_h, grid_w, 9, h * w, dtype=torch.float32)
    super_tokens = torch.empty_like(means, dtype=tokens.dtype)
    tiling = Tiling.of(cell_size, channels, tokens.element_size())
    mean_tokens = min(next_power_of_2(h * w), tiling.tokens)
    with torch.cuda.device_of(tokens):
        _mean_kernel[(grid_w, grid_h, n)](
            tokens,
            means,
            height,
            width,
            CHANNELS=channels,
            CELL_H=h,
            CELL_W=w,
            TOKENS=mean_tokens,
            BLOCK=tiling.block,
            num_warps=min(max(mean_tokens * tiling.block // 1024, 1), 8),
        )
        for _ in range(num_iters - 1):
            _sum_tokens(tokens, association, means, mass, cell_size, means)
        _sum_tokens(tokens, association, super_tokens, mass, cell_size, means, store=True)
    return super_tokens.to(dtype), association, mass


def aggregate(
    association: Tensor, tokens: Tensor, mass: Tensor | None, cell_size: Sequence[int]
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.aggregate`."""
    dtype, tokens = tokens.dtype, _launchable(tokens)
    super_tokens = tokens.new_empty(*association.shape[:3], tokens.shape[3])
    with torch.cuda.device_of(tokens):
        _sum_tokens(tokens, association.contiguous(), super_tokens, mass, cell_size)
    return super_tokens.to(dtype)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    cell_size: Sequence[int],
    token_shape: Sequence[int],
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.distribute`."""
    dtype, super_tokens = super_tokens.dtype, _launchable(super_tokens)
    n, grid_h, grid_w, channels = super_tokens.shape
    height, width = token_shape
    tokens = super_tokens.new_empty(n, height, width, channels)
    tiling = Tiling.of(cell_size, channels, tokens.element_size())
    with torch.cuda.device_of(tokens):
        _distribute_kernel[(cdiv(grid_w, tiling.strip) * tiling.tiles, grid_h, n)](
            association.contiguous(),
            super_tokens,
            association if mass is None else mass,
            tokens,
            height,
            width,
            grid_h,
            grid_w,
            CHANNELS=channels,
            CELL_H=cell_size[0],
            CELL_W=cell_size[1],
            STRIP=tiling.strip,
            TILES=tiling.tiles,
            TOKENS=tiling.tokens,
            NEIGHBOURS=tiling.neighbours,
            BLOCK=tiling.block,
            DIVIDE=mass is not None,
            num_warps=tiling.num_warps,
        )
    return tokens.to(dtype)
