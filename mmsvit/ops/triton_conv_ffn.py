"""The convolutional FFN on a CUDA GPU: what stands between its two linear layers is one kernel.

The hidden map is four times as wide as the tokens, and its bytes are what the FFN costs. Layer by
layer it is written and read nine times in training, and saved three times. Here one kernel
reads what ``fc1`` gives and writes what ``fc2`` takes: bias, GELU, depthwise 3x3 convolution and
the identity. Its backward reads that map and the gradient, and writes a gradient. One wide map is
saved, or none (``recompute``). Without bias and GELU, the kernels are the position embedding's.

A program walks down *strips* of the map, for a block of channels: a few rows, one or two columns
wide. What it has read stays in registers until the rows below are known, so rows are read
once but for one above a strip and one below it; columns beside a strip are its neighbour's,
mostly of the same program. Strips are numbered through columns, rows and images: maps of any
size leave no program idle. Channels are compiled into a kernel, sizes are not.

Everything is computed in float32. Gradients of kernels and biases are summed by each program in
registers, and then over programs by another kernel, always in the same order: nothing is
added atomically, and the same input gives the same bits.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from triton import JITFunction, cdiv

from .modes import needs_grad, under_autocast, without_autocast
from .torch_backend import add_residual

# Rows of a strip, at most. More of them read fewer rows twice, and make fewer programs.
ROWS_FORWARD, ROWS_BACKWARD = 16, 32
# Gradients of a channel's parameters: nine of the kernel, and one bias.
SUMS = 10
_SUMS = tl.constexpr(SUMS)


@triton.jit
def _locate_strips(
    strips,
    height,
    width,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Channels of this program, and its strips.

    Of channels, whether they exist; of strips, if they exist, the number of the token in row 0 of
    the image, the first row, the first column. Last, from where numbers of tokens count.
    """
    blocks = (CHANNELS + BLOCK - 1) // BLOCK
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    strip = tl.program_id(0) // blocks * STRIPS + tl.arange(0, STRIPS)
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, rows)
    column = strip % across * COLUMNS
    first = strip // across % down * rows
    image = strip // (across * down)
    # Numbers from the first image of the program fit into 32 bits.
    origin = tl.program_id(0) // blocks * STRIPS // (across * down)
    start = (image - origin) * height * width + column
    offset = origin.to(tl.int64) * height * width * CHANNELS
    return channel, channel < CHANNELS, strip < strips, start, first, column, offset


@triton.jit
def _load(x, token, exists, channel, has_channel, CHANNELS: tl.constexpr):
    """Some channels of some tokens; zeros where they do not exist."""
    mask = exists[:, None] & has_channel[None, :]
    return tl.load(x + token[:, None] * CHANNELS + channel[None, :], mask, 0.0)


@triton.jit
def _load_kernel(kernel, number: tl.constexpr, channel, has_channel):
    """One of nine weights for each channel, with the identity in the middle, as a row."""
    weight = tl.load(kernel + channel * 9 + number, has_channel, 0.0).to(tl.float32)
    return (weight + 1 if number == 4 else weight)[None, :]


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _load_hidden(
    x, token, exists, channel, has_channel, bias1, CHANNELS: tl.constexpr, GELU: tl.constexpr
):
    """What is convolved, in float32: with ``GELU``, that of ``x + bias1``."""
    hidden = _load(x, token, exists, channel, has_channel, CHANNELS).to(tl.float32)
    if GELU:
        hidden += bias1
        hidden = tl.where(exists[:, None], hidden * _normal_cdf(hidden), 0.0)
    return hidden


@triton.jit(do_not_specialize=['strips', 'height', 'width', 'rows'])
def _forward_kernel(
    x,
    bias1,
    kernel,
    bias,
    output,
    strips,
    height,
    width,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIPS: tl.constexpr,
    GELU: tl.constexpr,
):
    """``h + conv(h)`` of ``h = x``, or with ``GELU`` of ``h = gelu(x + bias1)``.

    Strips are two columns wide: each GELU is computed twice, not three times.
    """
    channel, has_channel, exists, start, first, column, offset = _locate_strips(
        strips, height, width, rows, CHANNELS, BLOCK, STRIPS, 2
    )
    x += offset
    output += offset
    k0 = _load_kernel(kernel, 0, channel, has_channel)
    k1 = _load_kernel(kernel, 1, channel, has_channel)
    k2 = _load_kernel(kernel, 2, channel, has_channel)
    k3 = _load_kernel(kernel, 3, channel, has_channel)
    k4 = _load_kernel(kernel, 4, channel, has_channel)
    k5 = _load_kernel(kernel, 5, channel, has_channel)
    k6 = _load_kernel(kernel, 6, channel, has_channel)
    k7 = _load_kernel(kernel, 7, channel, has_channel)
    k8 = _load_kernel(kernel, 8, channel, has_channel)
    shift = tl.load(bias + channel, has_channel, 0.0).to(tl.float32)[None, :]
    b1 = shift
    if GELU:
        b1 = tl.load(bias1 + channel, has_channel, 0.0).to(tl.float32)[None, :]
    # Sums of the row above the one that is read, which lacks only this one, and of this one.
    above_l = tl.zeros((STRIPS, BLOCK), tl.float32)
    above_r = tl.zeros((STRIPS, BLOCK), tl.float32)
    this_l = tl.zeros((STRIPS, BLOCK), tl.float32)
    this_r = tl.zeros((STRIPS, BLOCK), tl.float32)
    for step in range(rows + 2):
        row = first + step - 1
        token = start + row * width
        inside = exists & (row >= 0) & (row < height)
        h0 = _load_hidden(
            x, token - 1, inside & (column > 0), channel, has_channel, b1, CHANNELS, GELU
        )
        h1 = _load_hidden(x, token, inside, channel, has_channel, b1, CHANNELS, GELU)
        h2 = _load_hidden(
            x, token + 1, inside & (column + 1 < width), channel, has_channel, b1, CHANNELS, GELU
        )
        h3 = _load_hidden(
            x, token + 2, inside & (column + 2 < width), channel, has_channel, b1, CHANNELS, GELU
        )
        above_l += k6 * h0 + k7 * h1 + k8 * h2
        above_r += k6 * h1 + k7 * h2 + k8 * h3
        stored = exists & (step >= 2) & (row <= height)
        place = output + (token - width)[:, None] * CHANNELS + channel[None, :]
        tl.store(place, above_l, stored[:, None] & has_channel[None, :])
        stored &= column + 1 < width
        tl.store(place + CHANNELS, above_r, stored[:, None] & has_channel[None, :])
        above_l = this_l + (k3 * h0 + k4 * h1 + k5 * h2)
        above_r = this_r + (k3 * h1 + k4 * h2 + k5 * h3)
        this_l = shift + (k0 * h0 + k1 * h1 + k2 * h2)
        this_r = shift + (k0 * h1 + k1 * h2 + k2 * h3)


@triton.jit
def _store_sum(sums, number: tl.constexpr, values, channel, has_channel, CHANNELS: tl.constexpr):
    tl.store(sums + number * CHANNELS + channel, tl.sum(values, axis=0), has_channel)


@triton.jit(do_not_specialize=['strips', 'height', 'width', 'rows'])
def _backward_kernel(
    grad,
    x,
    bias1,
    kernel,
    x_grad,
    sums,
    strips,
    height,
    width,
    rows,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIPS: tl.constexpr,
    GELU: tl.constexpr,
    SUM: tl.constexpr,
):
    """The gradient of ``x``; ``SUM``: and this program's part of those of the parameters."""
    channel, has_channel, exists, start, first, column, offset = _locate_strips(
        strips, height, width, rows, CHANNELS, BLOCK, STRIPS, 1
    )
    grad += offset
    x += offset
    x_grad += offset
    k0 = _load_kernel(kernel, 0, channel, has_channel)
    k1 = _load_kernel(kernel, 1, channel, has_channel)
    k2 = _load_kernel(kernel, 2, channel, has_channel)
    k3 = _load_kernel(kernel, 3, channel, has_channel)
    k4 = _load_kernel(kernel, 4, channel, has_channel)
    k5 = _load_kernel(kernel, 5, channel, has_channel)
    k6 = _load_kernel(kernel, 6, channel, has_channel)
    k7 = _load_kernel(kernel, 7, channel, has_channel)
    k8 = _load_kernel(kernel, 8, channel, has_channel)
    b1 = k0
    if GELU:
        b1 = tl.load(bias1 + channel, has_channel, 0.0).to(tl.float32)[None, :]
    left, right = exists & (column > 0), exists & (column + 1 < width)
    s0 = tl.zeros((STRIPS, BLOCK), tl.float32)
    s1, s2, s3, s4, s5, s6, s7, s8, s9 = s0, s0, s0, s0, s0, s0, s0, s0, s0
    for step in range(rows):
        row = first + step
        inside = exists & (row < height)
        token = start + row * width
        # Two of three rows were read in the step before. To keep them would take the registers
        # that the sums need: they come from the L1 cache.
        up, middle, down = (row > 0) & (row <= height), row < height, row + 1 < height
        a0 = _load(grad, token - width - 1, up & left, channel, has_channel, CHANNELS)
        a1 = _load(grad, token - width, up & exists, channel, has_channel, CHANNELS)
        a2 = _load(grad, token - width + 1, up & right, channel, has_channel, CHANNELS)
        c0 = _load(grad, token - 1, middle & left, channel, has_channel, CHANNELS)
        c1 = _load(grad, token, inside, channel, has_channel, CHANNELS)
        c2 = _load(grad, token + 1, middle & right, channel, has_channel, CHANNELS)
        d0 = _load(grad, token + width - 1, down & left, channel, has_channel, CHANNELS)
        d1 = _load(grad, token + width, down & exists, channel, has_channel, CHANNELS)
        d2 = _load(grad, token + width + 1, down & right, channel, has_channel, CHANNELS)
        g = k8 * a0.to(tl.float32) + k7 * a1.to(tl.float32) + k6 * a2.to(tl.float32)
        g += k5 * c0.to(tl.float32) + k4 * c1.to(tl.float32) + k3 * c2.to(tl.float32)
        g += k2 * d0.to(tl.float32) + k1 * d1.to(tl.float32) + k0 * d2.to(tl.float32)
        if GELU or SUM:
            h = _load(x, token, inside, channel, has_channel, CHANNELS).to(tl.float32)
        if GELU:
            before = h + b1
            cdf = _normal_cdf(before)
            g *= cdf + before * tl.exp(-0.5 * before * before) * 0.3989422804014327
            h = tl.where(inside[:, None], before * cdf, 0.0)
        place = x_grad + token[:, None] * CHANNELS + channel[None, :]
        tl.store(place, g, inside[:, None] & has_channel[None, :])
        if SUM:
            s0 += h * d2.to(tl.float32)
            s1 += h * d1.to(tl.float32)
            s2 += h * d0.to(tl.float32)
            s3 += h * c2.to(tl.float32)
            s4 += h * c1.to(tl.float32)
            s5 += h * c0.to(tl.float32)
            s6 += h * a2.to(tl.float32)
            s7 += h * a1.to(tl.float32)
            s8 += h * a0.to(tl.float32)
            # Of two biases, that before the GELU; registers are short of holding both.
            s9 += tl.where(inside[:, None], g, 0.0) if GELU else c1.to(tl.float32)
    if SUM:
        blocks = (CHANNELS + BLOCK - 1) // BLOCK
        sums += (tl.program_id(0) // blocks).to(tl.int64) * _SUMS * CHANNELS
        _store_sum(sums, 0, s0, channel, has_channel, CHANNELS)
        _store_sum(sums, 1, s1, channel, has_channel, CHANNELS)
        _store_sum(sums, 2, s2, channel, has_channel, CHANNELS)
        _store_sum(sums, 3, s3, channel, has_channel, CHANNELS)
        _store_sum(sums, 4, s4, channel, has_channel, CHANNELS)
        _store_sum(sums, 5, s5, channel, has_channel, CHANNELS)
        _store_sum(sums, 6, s6, channel, has_channel, CHANNELS)
        _store_sum(sums, 7, s7, channel, has_channel, CHANNELS)
        _store_sum(sums, 8, s8, channel, has_channel, CHANNELS)
        _store_sum(sums, 9, s9, channel, has_channel, CHANNELS)


@triton.jit(do_not_specialize=['parts'])
def _sum_kernel(sums, total, parts, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up all programs' parts of one sum; kernels first in ``total``, nine to a channel."""
    channel, number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    has_channel = channel < CHANNELS
    added = tl.zeros((32, BLOCK), tl.float32)
    for first in range(0, parts, 32):
        part = first + tl.arange(0, 32)
        row = part.to(tl.int64) * _SUMS + number
        added += _load(sums, row, part < parts, channel, has_channel, CHANNELS)
    place = tl.where(number < 9, channel * 9 + number, number * CHANNELS + channel)
    tl.store(total + place, tl.sum(added, axis=0), has_channel)


def launchable(tensor: Tensor) -> Tensor:
    """``tensor`` as the kernels want it."""
    # Triton's interpreter multiplies bfloat16 wrongly, and rounds to it by truncation.
    interpreted = not isinstance(_forward_kernel, JITFunction)
    if interpreted and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous()


def _tiling(x: Tensor, columns: int, most_rows: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Strips, height, width and rows of a strip, and what is compiled into the kernels."""
    n, height, width, channels = x.shape
    down = cdiv(height, most_rows)
    strips = n * down * cdiv(width, columns)
    block = 32 if channels % 64 else 64
    # A thread works on 16 bytes of each strip.
    warps = 4 if x.element_size() == 2 else 8
    compiled = dict(CHANNELS=channels, BLOCK=block, STRIPS=1024 // block, num_warps=warps)
    return (strips, height, width, cdiv(height, down)), compiled


def _convolve(x: Tensor, b1: Tensor | None, kernel: Tensor, bias: Tensor) -> Tensor:
    """``h + conv(h)`` of ``(N, H, W, C)``, with ``h = x``, or ``gelu(x + b1)`` if that is given."""
    dtype, x, kernel, bias = x.dtype, *map(launchable, (x, kernel, bias))
    output = torch.empty_like(x)
    sizes, compiled = _tiling(x, 2, ROWS_FORWARD)
    programs = cdiv(sizes[0], compiled['STRIPS']) * cdiv(x.shape[3], compiled['BLOCK'])
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            x,
            bias if b1 is None else launchable(b1),
            kernel,
            bias,
            output,
            *sizes,
            GELU=b1 is not None,
            **compiled,
        )
    return output.to(dtype)


def _convolve_backward(
    grad: Tensor, x: Tensor, b1: Tensor | None, kernel: Tensor, with_parameters: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``x``, ``kernel``, and ``b1`` if that is given, or else ``bias``."""
    dtype, shape, parameter_dtype = x.dtype, kernel.shape, kernel.dtype
    grad, x, kernel = map(launchable, (grad, x, kernel))
    x_grad, channels = torch.empty_like(x), x.shape[3]
    sizes, compiled = _tiling(x, 1, ROWS_BACKWARD)
    parts, block = cdiv(sizes[0], compiled['STRIPS']), compiled['BLOCK']
    sums = x.new_empty(parts if with_parameters else 0, SUMS, channels, dtype=torch.float32)
    total = x.new_empty(SUMS * channels, dtype=kernel.dtype)
    with torch.cuda.device_of(x):
        _backward_kernel[(parts * cdiv(channels, block),)](
            grad,
            x,
            kernel if b1 is None else launchable(b1),
            kernel,
            x_grad,
            sums,
            *sizes,
            GELU=b1 is not None,
            SUM=with_parameters,
            **compiled,
        )
        if not with_parameters:
            return x_grad.to(dtype), None, None
        _sum_kernel[(cdiv(channels, 32), SUMS)](
            sums, total, parts, CHANNELS=channels, BLOCK=32, num_warps=4
        )
    kernel_grad, bias_grad = total.to(parameter_dtype).split((9 * channels, channels))
    return x_grad.to(dtype), kernel_grad.view(shape), bias_grad


class _AddDepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, bias):
        ctx.save_for_backward(x, kernel)
        return _convolve(x, None, kernel, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, kernel = ctx.saved_tensors
        return _convolve_backward(grad, x, None, kernel, any(ctx.needs_input_grad[1:]))


class _ConvFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recompute, x, w1, b1, kernel, bias, w2, b2):
        before = x @ w1.t()
        ctx.save_for_backward(None if recompute else before, x, w1, b1, kernel, bias, w2)
        return _second(_convolve(before, b1, kernel, bias), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        before, x, w1, b1, kernel, bias, w2 = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        x_grad = w1_grad = b1_grad = kernel_grad = bias_grad = w2_grad = b2_grad = None
        with without_autocast(grad.device):
            if before is None:
                before = x @ w1.t()
            rows = grad.flatten(0, 2)
            if needed[5]:
                w2_grad = rows.t() @ _convolve(before, b1, kernel, bias).flatten(0, 2)
            if needed[4] or needed[6]:
                b2_grad = rows.sum(0, dtype=torch.float32)
                # The sum of the hidden map's gradient is the same product of the output's sum.
                bias_grad = b2_grad @ w2.float()
            if any(needed[:4]):
                before_grad, kernel_grad, b1_grad = _convolve_backward(
                    grad @ w2, before, b1, kernel, needed[2] or needed[3]
                )
                if needed[0]:
                    x_grad = before_grad @ w1
                if needed[1]:
                    w1_grad = before_grad.flatten(0, 2).t() @ x.flatten(0, 2)
        return None, x_grad, w1_grad, b1_grad, kernel_grad, bias_grad, w2_grad, b2_grad


def _second(hidden: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    # Of two dimensions, so that the bias is added by the matrix product.
    return torch.addmm(b2, hidden.flatten(0, 2), w2.t()).unflatten(0, hidden.shape[:3])


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, which every standard layer has."""
    return cast(Tensor, layer.weight), cast(Tensor, layer.bias)


def add_depthwise_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """See :func:`mmsvit.ops.add_depthwise_conv`; under autocast, too, in the precision of ``x``."""
    kernel, bias = _weights(conv)
    if needs_grad(x, kernel, bias):
        return _AddDepthwiseConv.apply(x, kernel, bias)
    return _convolve(x, None, kernel, bias)


def conv_ffn(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module,
    dwconv: nn.Module,
    fc2: nn.Module,
    drop: nn.Module,
    residual: bool,
    recompute: bool,
) -> Tensor:
    """See :func:`mmsvit.ops.conv_ffn`.

    Autocast decides about the matrix products; kernel and biases between them stay as they are.
    """
    (w1, b1), (kernel, bias), (w2, b2) = _weights(fc1), _weights(dwconv), _weights(fc2)
    tokens = x
    if under_autocast(x.device):
        # Once a step: the backward pass has what was cast.
        dtype = torch.get_autocast_dtype(x.device.type)
        tokens, w1, w2, b2 = (tensor.to(dtype) for tensor in (x, w1, w2, b2))
    if needs_grad(tokens, w1, b1, kernel, bias, w2, b2):
        output = _ConvFFN.apply(recompute, tokens, w1, b1, kernel, bias, w2, b2)
    else:
        output = _second(_convolve(tokens @ w1.t(), b1, kernel, bias), w2, b2)
    return add_residual(output, x, in_place=not needs_grad(output)) if residual else output
