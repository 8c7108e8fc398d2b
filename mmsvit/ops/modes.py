"""How PyTorch is running right now: recording a graph, under autocast, for gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_tracing() -> bool:
    """Whether a graph is being recorded, for inputs of any size: torch.compile, export, tracing."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exporting() -> bool:
    """Whether the graph may hold PyTorch's own operators only: ONNX or TorchScript."""
    return torch.jit.is_tracing() or (
        torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()
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
