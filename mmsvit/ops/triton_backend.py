"""The backend ``triton``: super token sampling for CUDA GPUs; :mod:`.triton_conv_ffn` is the rest.

Bytes are what it costs, so the kernels count them. With one pass being all
tokens once, from or to the device's memory:

====================================  ==================================================
mean of each cell                     reads one pass
association and aggregation, fused    reads one pass, writes the association
distribution                          reads the association, writes one pass
their gradients, in the other order   the association and one pass each
====================================  ==================================================

The association is nine float32 for each token. The grid is cut into *patches* of
one or more cells, whose tokens are worked on in tiles, a program each. Tokens of
a x b cells belong to (a + 2) x (b + 2) super tokens, so a tile is two small matrix
products: its super tokens by its tokens, which gives the logits, and, after the
softmax, association by tokens, which gives the tile's part of each super token.
A second kernel adds up the parts that belong to a super token, always in the
same order. Nothing is added atomically: the same input gives the same bits.
The parts are float32, (a + 2) x (b + 2) x C for a tile; between the two kernels
they mostly stay in the L2 cache. Beyond 128 channels a tile is read a second
time, from the cache, by the program that has just read it.

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

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from .torch_backend import EPS, channels_first, gelu_affine
from .triton_conv_ffn import add_depthwise_conv, conv_ffn, launchable

_EPS = tl.constexpr(EPS)  # Kernels read no other globals.


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
    number,
    patch_y,
    patch_x,
    height,
    width,
    grid_h,
    grid_w,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
):
    """For each token, by its number in a patch, where it is.

    Row and column of its cell in the patch, the number of its cell in the grid and whether
    that exists, its number in the cell, its number in the map and whether it exists there:
    others are padding.
    """
    cell = tl.minimum(number // (CELL_H * CELL_W), PATCH_H * PATCH_W - 1)
    place = number % (CELL_H * CELL_W)
    i, j = cell // PATCH_W, cell % PATCH_W
    cell_y, cell_x = patch_y * PATCH_H + i, patch_x * PATCH_W + j
    in_grid = (number < PATCH_H * PATCH_W * CELL_H * CELL_W) & (cell_y < grid_h) & (cell_x < grid_w)
    y, x = cell_y * CELL_H + place // CELL_W, cell_x * CELL_W + place % CELL_W
    in_map = in_grid & (y < height) & (x < width)
    return i, j, cell_y * grid_w + cell_x, in_grid, place, y * width + x, in_map


@triton.jit
def _locate_neighbours(
    patch_y,
    patch_x,
    grid_h,
    grid_w,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """For each super token around a patch: row and column there, number in the grid, if it exists."""
    number = tl.arange(0, NEIGHBOURS)
    i, j = number // (PATCH_W + 2), number % (PATCH_W + 2)
    y, x = patch_y * PATCH_H - 1 + i, patch_x * PATCH_W - 1 + j
    exists = (i < PATCH_H + 2) & (y >= 0) & (y < grid_h) & (x >= 0) & (x < grid_w)
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
    x, y, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    grid_w, grid_h = tl.num_programs(0), tl.num_programs(1)
    tokens += n * height * width * CHANNELS
    means += ((n * grid_h + y) * grid_w + x) * CHANNELS
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for tile in range(tl.cdiv(CELL_H * CELL_W, TOKENS)):
            number = tile * TOKENS + tl.arange(0, TOKENS)
            _, _, _, _, _, token, exists = _locate_tokens(
                number, y, x, height, width, grid_h, grid_w, CELL_H, CELL_W, 1, 1
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
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
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
    patch_x, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    patch_y, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens += n * height * width * CHANNELS
    super_tokens += n * grid_h * grid_w * CHANNELS
    association += n * grid_h * grid_w * 9 * CELL
    program = (n * tl.num_programs(1) + patch_y) * tl.num_programs(0) + tl.program_id(0)
    parts += program * (PATCH_H + 2) * (PATCH_W + 2) * CHANNELS
    mass_parts += program * (PATCH_H + 2) * (PATCH_W + 2)

    number = tile * TOKENS + tl.arange(0, TOKENS)
    cell_i, cell_j, cell, in_grid, place, token, token_exists = _locate_tokens(
        number, patch_y, patch_x, height, width, grid_h, grid_w, CELL_H, CELL_W, PATCH_H, PATCH_W
    )
    i, j, neighbour, neighbour_exists = _locate_neighbours(
        patch_y, patch_x, grid_h, grid_w, PATCH_H, PATCH_W, NEIGHBOURS
    )
    # Which of the patch's neighbours are among a token's own nine, and which of these they are.
    down, right = i[:, None] - cell_i[None, :], j[:, None] - cell_j[None, :]
    around = (down >= 0) & (down < 3) & (right >= 0) & (right < 3)
    association += (cell[None, :] * 9 + 3 * down + right) * CELL + place[None, :]
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


@triton.jit(do_not_specialize=['patches_h', 'patches_w'])
def _gather_kernel(
    parts,
    mass_parts,
    super_tokens,
    mass,
    patches_h,
    patches_w,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
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
    # The patches around, and which of their neighbours this super token is.
    number = tl.arange(0, 16)
    patch_y, patch_x = y // PATCH_H - 1 + number // 3, x // PATCH_W - 1 + number % 3
    i, j = y - patch_y * PATCH_H + 1, x - patch_x * PATCH_W + 1
    exists = (number < 9) & (i >= 0) & (i < PATCH_H + 2) & (j >= 0) & (j < PATCH_W + 2)
    exists &= (patch_y >= 0) & (patch_y < patches_h) & (patch_x >= 0) & (patch_x < patches_w)
    AROUND: tl.constexpr = (PATCH_H + 2) * (PATCH_W + 2)
    patch = (n * patches_h + patch_y) * patches_w + patch_x
    part = patch * TILES * AROUND + i * (PATCH_W + 2) + j
    if SUM_MASS:
        masses = tl.zeros((16,), tl.float32)
        for tile in range(TILES):
            masses += tl.load(mass_parts + part + tile * AROUND, exists, 0.0)
        own_mass = tl.sum(masses, axis=0)
        tl.store(mass + this, own_mass)
    elif DIVIDE:
        own_mass = tl.load(mass + this)
    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        sums = tl.zeros((16, BLOCK), tl.float32)
        for tile in range(TILES):
            sums += _load_rows(parts, part + tile * AROUND, exists, channel, CHANNELS)
        total = tl.sum(sums, axis=0)
        if DIVIDE:
            total = total / (own_mass + _EPS)
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
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """One tile of tokens from the super tokens; ``DIVIDE``: from these over their mass."""
    CELL: tl.constexpr = CELL_H * CELL_W
    patch_x, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    patch_y, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens += n * height * width * CHANNELS
    super_tokens += n * grid_h * grid_w * CHANNELS
    mass += n * grid_h * grid_w
    association += n * grid_h * grid_w * 9 * CELL

    number = tile * TOKENS + tl.arange(0, TOKENS)
    cell_i, cell_j, cell, in_grid, place, token, token_exists = _locate_tokens(
        number, patch_y, patch_x, height, width, grid_h, grid_w, CELL_H, CELL_W, PATCH_H, PATCH_W
    )
    i, j, neighbour, neighbour_exists = _locate_neighbours(
        patch_y, patch_x, grid_h, grid_w, PATCH_H, PATCH_W, NEIGHBOURS
    )
    down, right = i[None, :] - cell_i[:, None], j[None, :] - cell_j[:, None]
    around = (down >= 0) & (down < 3) & (right >= 0) & (right < 3)
    weights = tl.load(
        association + (cell[:, None] * 9 + 3 * down + right) * CELL + place[:, None],
        around & in_grid[:, None] & neighbour_exists[None, :],
        0.0,
    )
    if DIVIDE:
        # A weight is at most its super token's mass. The factor of 64, which comes off again,
        # keeps what is divided by a large mass from the small numbers that float16 rounds off.
        weights *= 64 / (tl.load(mass + neighbour, neighbour_exists, 1.0) + _EPS)[None, :]
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


def _tiling(super_token_size: Sequence[int], channels: int, element_size: int) -> dict[str, int]:
    """How programs share the tokens: what is compiled into the kernels.

    Tiles of up to 32 KB: large enough to load at full width, small enough for registers.
    """
    cell = super_token_size[0] * super_token_size[1]
    # More than 128 channels at once would take so many registers that few programs run together.
    block = (
        max(next_power_of_2(channels), 16) if channels <= 128 else 64 if channels <= 256 else 128
    )
    most = 32 if 128 < channels <= 256 else 8192 // block
    # Patches that fill the smallest product, of 16 super tokens, or the next one of 32.
    candidates = [(2, 2), (1, 2)]
    if cell <= 8 and block <= 128:
        candidates.insert(0, (2, 4))
    patch_h, patch_w = next((p for p in candidates if p[0] * p[1] * cell <= most), (1, 1))
    in_patch = patch_h * patch_w * cell
    tokens = min(max(next_power_of_2(in_patch), 16), most)
    return dict(
        CHANNELS=channels,
        CELL_H=super_token_size[0],
        CELL_W=super_token_size[1],
        PATCH_H=patch_h,  # in cells
        PATCH_W=patch_w,
        TILES=cdiv(in_patch, tokens),  # programs for a patch
        TOKENS=tokens,  # for a program, a power of 2
        NEIGHBOURS=next_power_of_2((patch_h + 2) * (patch_w + 2)),  # super tokens around a patch
        BLOCK=block,  # channels at a time, a power of 2
        num_warps=8 if tokens * block * element_size > 16384 else 4,
    )


def _sum_tokens(
    tokens: Tensor,
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    means: Tensor | None = None,
    store: bool = False,
) -> None:
    """Write into ``super_tokens`` the sums of tokens by association, over ``mass`` if that is given.

    Given ``means``, first associate the tokens with these, which also writes ``mass``,
    and the association if it is to be stored.
    """
    n, height, width, channels = tokens.shape
    _, grid_h, grid_w, _, _ = association.shape
    tiling = _tiling(super_token_size, channels, tokens.element_size())
    patch_h, patch_w, tiles = (tiling[name] for name in ('PATCH_H', 'PATCH_W', 'TILES'))
    patches_h, patches_w = cdiv(grid_h, patch_h), cdiv(grid_w, patch_w)
    all_parts = n, patches_h, patches_w, tiles, (patch_h + 2) * (patch_w + 2)
    parts = association.new_empty(*all_parts, channels)
    mass_parts = association.new_empty(all_parts)
    _aggregate_kernel[(patches_w * tiles, patches_h, n)](
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
        ASSOCIATE=means is not None,
        STORE=store,
        **tiling,
    )
    _gather_kernel[(grid_w, grid_h, n)](
        parts,
        mass_parts,
        super_tokens,
        mass_parts if mass is None else mass,
        patches_h,
        patches_w,
        CHANNELS=channels,
        PATCH_H=patch_h,
        PATCH_W=patch_w,
        TILES=tiles,
        BLOCK=tiling['BLOCK'],
        SUM_MASS=means is not None,
        DIVIDE=mass is not None,
        num_warps=max(tiling['BLOCK'] // 64, 1),
    )


def sample(
    tokens: Tensor, super_token_size: Sequence[int], num_iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmsvit.ops.custom_ops.sample`."""
    dtype, tokens = tokens.dtype, launchable(tokens)
    n, height, width, channels = tokens.shape
    h, w = super_token_size
    grid_h, grid_w = cdiv(height, h), cdiv(width, w)
    means = tokens.new_empty(n, grid_h, grid_w, channels, dtype=torch.float32)
    mass = tokens.new_empty(n, grid_h, grid_w, 1, dtype=torch.float32)
    association = tokens.new_empty(n, grid_h, grid_w, 9, h * w, dtype=torch.float32)
    super_tokens = torch.empty_like(means, dtype=tokens.dtype)
    tiling = _tiling(super_token_size, channels, tokens.element_size())
    mean_tokens, block = min(next_power_of_2(h * w), tiling['TOKENS']), tiling['BLOCK']
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
            BLOCK=block,
            num_warps=min(max(mean_tokens * block // 1024, 1), 8),
        )
        for _ in range(num_iters - 1):
            _sum_tokens(tokens, association, means, mass, super_token_size, means)
        _sum_tokens(tokens, association, super_tokens, mass, super_token_size, means, store=True)
    return super_tokens.to(dtype), association, mass


def aggregate(
    association: Tensor, tokens: Tensor, mass: Tensor | None, super_token_size: Sequence[int]
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.aggregate`."""
    dtype, tokens = tokens.dtype, launchable(tokens)
    super_tokens = tokens.new_empty(*association.shape[:3], tokens.shape[3])
    with torch.cuda.device_of(tokens):
        _sum_tokens(tokens, association.contiguous(), super_tokens, mass, super_token_size)
    return super_tokens.to(dtype)


def distribute(
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    token_shape: Sequence[int],
) -> Tensor:
    """See :func:`mmsvit.ops.custom_ops.distribute`."""
    dtype, super_tokens = super_tokens.dtype, launchable(super_tokens)
    n, grid_h, grid_w, channels = super_tokens.shape
    height, width = token_shape
    tokens = super_tokens.new_empty(n, height, width, channels)
    tiling = _tiling(super_token_size, channels, tokens.element_size())
    patches_h, patches_w = cdiv(grid_h, tiling['PATCH_H']), cdiv(grid_w, tiling['PATCH_W'])
    grid = patches_w * tiling['TILES'], patches_h, n
    with torch.cuda.device_of(tokens):
        _distribute_kernel[grid](
            association.contiguous(),
            super_tokens,
            association if mass is None else mass,
            tokens,
            height,
            width,
            grid_h,
            grid_w,
            DIVIDE=mass is not None,
            **tiling,
        )
    return tokens.to(dtype)
