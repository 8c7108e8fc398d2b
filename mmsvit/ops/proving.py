"""Compare one Triton kernel with float64, and with PyTorch's speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import add_depthwise_conv, conv_ffn, distribute, sample
from .proofs import Kernel

Size = tuple[int, int, int]
# Images, height and width: less than a cell, one row, one column, sizes that nothing divides.
RAGGED: tuple[Size, ...] = ((2, 1, 7), (1, 9, 1), (1, 5, 25), (1, 38, 19))
ROUNDS = 10


def prove(kernel: Kernel, sizes: Sequence[Size], device: torch.device) -> str | None:
    """Run a kernel, forward and backward, beside plain PyTorch and float64.

    An output or gradient may be off by twice as much as PyTorch's in the same dtype; run twice, it must
    be the same bits. Halves run with weights in float32, as under autocast, and with their own.

    Args:
        kernel: Which.
        sizes: Images, height and width of each map.
        device: Where; of type ``cuda``, or any under Triton's interpreter.

    Returns:
        What is wrong with it; None if nothing is.
    """
    own = kernel.dtype if kernel.operation != 'sample' else torch.float32
    for weights in {torch.float32, own}:
        for size in sizes:
            problem = _compare(kernel, size, weights, device)
            if problem:
                return f'{problem}, {size[0]} maps of {size[1]}x{size[2]}, weights in {weights}'
    return None


def _compare(kernel: Kernel, size: Size, weights: torch.dtype, device: torch.device) -> str | None:
    trial = Trial(kernel, size, weights, device, 'triton')
    found, again = results(trial), results(trial)
    if not all(map(torch.equal, found, again)):
        return 'two runs differ'
    plain = results(trial._replace(backend='torch'))
    exact = results(trial._replace(backend='torch', computed_in=torch.float64))
    for place, (one, other, truth) in enumerate(zip(found, plain, exact)):
        slack = torch.finfo(kernel.dtype).eps * truth.abs().max()
        error = (one.double() - truth).abs().max()
        limit = 2 * (other.double() - truth).abs().max() + slack
        if not error <= limit:  # a NaN is in no order
            return f'result {place} is off by {error:.3g}, where {limit:.3g} is allowed'
    return None


class Trial(NamedTuple):
    """One way to compute what a kernel does.

    Attributes:
        kernel: Which.
        size: Images, height and width of the map.
        weights: The dtype of the weights.
        device: Where.
        backend: Which computes it.
        computed_in: A dtype for the same numbers, in place of the kernel's and the weights'.
    """

    kernel: Kernel
    size: Size
    weights: torch.dtype
    device: torch.device
    backend: str
    computed_in: torch.dtype | None = None


def results(trial: Trial) -> list[Tensor]:
    """Outputs, and gradients of the map and all weights."""
    step, inputs = _prepare(trial)
    outputs = step()
    factors = [
        _random(output.shape, 9, trial.device).to(trial.kernel.dtype).to(output)
        for output in outputs
    ]
    return [
        *(output.detach() for output in outputs),
        *torch.autograd.grad(outputs, inputs, factors),
    ]


def _prepare(trial: Trial) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """What computes the outputs, and the tensors that gradients are asked for."""
    kernel, size, weights, device, backend, computed_in = trial
    channels, cell = kernel.channels, kernel.cell
    torch.manual_seed(0)

    def leaf(channels: int) -> Tensor:
        x = _random((*size, channels), 1, device).to(kernel.dtype)
        return x.to(computed_in or kernel.dtype).requires_grad_()

    if kernel.operation == 'sample':
        x = leaf(channels)

        def sampled() -> list[Tensor]:
            # Two iterations run all kernels of one.
            super_tokens, association = sample(x, cell, 2, backend)
            return [super_tokens, distribute(association, super_tokens, cell, size[1:], backend)]

        return sampled, [x]
    layers: nn.Module
    if kernel.operation == 'conv_ffn':
        dims = max(channels // 4, 1)
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        fc1, fc2 = nn.Linear(dims, channels), nn.Linear(channels, dims)
        layers = nn.ModuleList((fc1, nn.GELU(), conv, fc2, nn.Dropout(0.0)))
    else:
        dims = channels
        layers = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    layers = layers.to(weights).to(device, computed_in or weights)
    x = leaf(dims)
    halved = computed_in is None and kernel.dtype != weights

    def computed() -> list[Tensor]:
        with torch.autocast(device.type, kernel.dtype) if halved else nullcontext():
            if isinstance(layers, nn.ModuleList):
                fc1, act, conv, fc2, drop = layers
                return [conv_ffn(x, fc1, act, conv, fc2, drop, backend=backend)]
            return [add_depthwise_conv(x, layers, backend)]

    return computed, [x, *layers.parameters()]


def _random(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def speedup(kernel: Kernel, size: Size, device: torch.device) -> float:
    """How many times as fast as plain PyTorch a kernel is, forward and backward together.

    Args:
        kernel: Which; halves run as under autocast.
        size: Images, height and width of the map.
        device: Of type ``cuda``.
    """
    times: dict[str, list[float]] = {'torch': [], 'triton': []}
    steps = {
        backend: _prepare(Trial(kernel, size, torch.float32, device, backend)) for backend in times
    }
    for round_ in range(ROUNDS + 3):
        for backend, (step, inputs) in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            outputs = step()
            torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
            end.record()
            end.synchronize()
            if round_ >= 3:  # The first ones compile and warm up.
                times[backend].append(begin.elapsed_time(end))
    return statistics.median(times['torch']) / statistics.median(times['triton'])
