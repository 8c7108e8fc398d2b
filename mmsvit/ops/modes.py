"""How PyTorch is running right now: recording a graph, under autocast, for gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def is_tracing() -> bool:
    """Whether nothing may be written in place or depend on sizes.

    A graph is being recorded (torch.compile, export, tracing), or a function transform runs.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed()


def wants_own_operators() -> bool:
    """Whether only PyTorch's own operators will do.

    ONNX and TorchScript know no others; ``torch.func`` and forward-mode differentiation would pass
    the registered gradients by.
    """
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch.jit.is_tracing() or _is_transformed()


def operators_are_seen(*tensors: Tensor) -> bool:
    """Whether a compiler, a dispatch mode (FLOPs, fake tensors) or a subclass sees operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not all(type(tensor) in (Tensor, Parameter) for tensor in tensors)
    )


def _is_transformed() -> bool:
    """Whether ``torch.func``, ``make_fx`` or forward-mode differentiation is at work."""
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of them, so that none may be overwritten."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses dtypes on ``device``; never on the meta device."""
    return device.type != 'meta' and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off on ``device``."""
    if under_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
