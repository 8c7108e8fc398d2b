"""Which backend computes the operations of a block: the only place that chooses.

A backend is a module ``NAME_backend.py`` beside this one, with the functions ``sample``,
``aggregate`` and ``distribute`` as :mod:`.custom_ops` describes them, and ``conv_ffn``,
``add_depthwise_conv``, ``gelu_affine`` and ``channels_first`` as :mod:`.layers` does. Layers that
other backends than ``torch`` get are standard (:func:`.standard_layers.is_standard`).
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Collection, Sequence
from types import ModuleType

import torch
from mmengine.logging import print_log
from torch import Tensor

from . import proofs, torch_backend
from .modes import is_tracing, under_autocast
from .proofs import Kernel

BACKENDS = ('auto', 'torch', 'cpu', 'triton')
VARIABLE = 'MMSVIT_OPS_BACKEND'
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def named_backend() -> str:
    """What ``MMSVIT_OPS_BACKEND`` names, ``'auto'`` if nothing."""
    return os.environ.get(VARIABLE) or 'auto'


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of any device."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a backend from computing on ``device`` in ``dtype``; None if nothing does."""
    if name == 'cpu' and device.type != 'cpu':
        return f'the tensors are on {device.type}'
    if name != 'triton':
        return None
    if device.type != 'cuda' and not is_interpreted():
        return f'Triton needs a CUDA device, and the tensors are on {device.type}'
    if dtype not in TRITON_DTYPES:
        return f'the Triton kernels compute in float32, float16 and bfloat16, not in {dtype}'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        gpu = torch.cuda.get_device_name(device)
        return f'the Triton kernels need compute capability 8.0 or more, and {gpu} has less'
    try:
        from . import triton_backend

        if not is_interpreted():
            triton_backend.check_driver()
    except Exception as error:  # Whatever a missing package, compiler or header raises.
        return f'Triton does not work here ({type(error).__name__}: {error})'
    return None


@functools.cache
def _choose(
    wanted: str, source: str, device: torch.device, dtype: torch.dtype, kernel: Kernel | None
) -> tuple[str, str]:
    if wanted not in BACKENDS:
        raise ValueError(f'{source}={wanted!r} is unknown; use one of {", ".join(BACKENDS)}')
    if wanted != 'auto':
        obstacle = _why_not(wanted, device, dtype)
        if obstacle:
            raise RuntimeError(
                f'{source}={wanted}, but {obstacle}; use auto, which takes a backend that can run'
            )
        choice = wanted, f'{source}={wanted} asks for it'
    elif device.type == 'cpu':
        choice = 'cpu', 'the tensors are on cpu'
    elif device.type != 'cuda':
        choice = 'torch', f'the tensors are on {device.type}'
    elif obstacle := _why_not('triton', device, dtype):
        choice = 'torch', obstacle
    elif kernel is None:
        choice = 'torch', 'no Triton kernel computes it'
    else:
        proven, reason = proofs.verdict(kernel, device)
        choice = ('triton' if proven else 'torch'), f'{kernel}: {reason}'
    print_log('backend {}: {}'.format(*choice), logger='current', level=logging.DEBUG)
    return choice


def fix_choice(chosen: Collection[str] | None) -> None:
    """See :func:`mmsvit.ops.proofs.fix`; choices that were made are made again."""
    proofs.fix(chosen)
    _choose.cache_clear()


def choose_backend(
    device: torch.device, dtype: torch.dtype, backend: str = 'auto', kernel: Kernel | None = None
) -> tuple[str, str]:
    """Choose the backend for tensors of ``dtype`` on ``device``.

    - ``'torch'``: PyTorch's own operations and layers, on any device.
    - ``'cpu'``: a few rows of the map at a time, so that intermediate results stay in the CPU's cache.
    - ``'triton'``: fused kernels for super token sampling, the FFN between its linear layers
      and the position embedding, for CUDA GPUs of compute capability 8.0 or more; with
      ``TRITON_INTERPRET=1`` on any device, slowly.
    - ``'auto'``: what the environment variable ``MMSVIT_OPS_BACKEND`` names. If that is unset or
      ``'auto'``: ``'cpu'`` for CPU tensors, ``'triton'`` for CUDA tensors where a record proves
      ``kernel`` on this GPU (:mod:`.proofs`), and ``'torch'`` otherwise.

    While PyTorch records a graph (torch.compile, export, tracing) or transforms a function
    (``torch.func``), layers are always ``'torch'``. Each choice is logged once, at DEBUG.

    Returns:
        ``'torch'``, ``'cpu'`` or ``'triton'``, and the reason in words.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    if backend != 'auto':
        return _choose(backend, 'backend', device, dtype, None)
    return _choose(named_backend(), VARIABLE, device, dtype, kernel)


def backend_for(
    x: Tensor,
    backend: str,
    operation: str | None = None,
    channels: int = 0,
    cell: Sequence[int] = (1, 1),
) -> ModuleType:
    """The module of the backend that :func:`choose_backend` chooses.

    Args:
        x: Says device and dtype.
        backend: See :func:`choose_backend`.
        operation: What is computed, if kernels of Triton's do that; see :class:`.proofs.Kernel`,
            for the other arguments, too.
        channels: Of the map.
        cell: Of ``sample``.
    """
    if is_tracing():
        return torch_backend
    kernel = None
    if x.is_cuda and operation is not None:
        halved = operation == 'conv_ffn' and under_autocast(x.device)
        dtype = torch.get_autocast_dtype('cuda') if halved else x.dtype
        kernel = Kernel(operation, dtype, channels, (cell[0], cell[1]))
    name, _ = choose_backend(x.device, x.dtype, backend, kernel)
    # Imported when chosen: Triton is not installed everywhere.
    return importlib.import_module(f'.{name}_backend', __package__)
