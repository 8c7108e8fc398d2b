"""Who computes the super token operations: the only place that chooses.

``MMSVIT_OPS_BACKEND=auto|torch|triton`` in the environment says what ``'auto'``
as an argument means.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
from mmengine.logging import print_log

BACKENDS = ('auto', 'torch', 'triton')
VARIABLE = 'MMSVIT_OPS_BACKEND'
# So far the Triton kernels have run in Triton's interpreter and been compiled for GPUs, but not
# run on one. They wait to be asked for by name until they have.
PROVEN_ON_CUDA = False
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on tensors of any device."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps Triton from computing on ``device`` in ``dtype``; None if nothing does."""
    if device.type != 'cuda' and not is_interpreted():
        return f'Triton needs a CUDA device, and the tensors are on {device.type}'
    if dtype not in TRITON_DTYPES:
        return f'the Triton kernels compute in float32, float16 and bfloat16, not in {dtype}'
    if device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f'the Triton kernels need compute capability 8.0 or more, and {name} has less'
    try:
        from . import triton_backend

        if not is_interpreted():
            triton_backend.check_driver()
    except Exception as error:  # Whatever a missing package, compiler or header raises.
        return f'Triton does not work here ({type(error).__name__}: {error})'
    return None


@functools.cache
def _choose(wanted: str, source: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if wanted not in BACKENDS:
        raise ValueError(f'{source}={wanted!r} is unknown; use one of {", ".join(BACKENDS)}')
    if wanted == 'torch':
        choice = 'torch', f'{source}=torch asks for it'
    elif wanted == 'auto' and device.type != 'cuda':
        choice = 'torch', f'the tensors are on {device.type}'
    elif wanted == 'auto' and not PROVEN_ON_CUDA:
        choice = (
            'torch',
            f'the Triton kernels have not been tested on a GPU; {VARIABLE}=triton tries',
        )
    else:
        obstacle = _why_not_triton(device, dtype)
        if obstacle and wanted == 'triton':
            raise RuntimeError(
                f'{source}=triton, but {obstacle}; use auto, which takes torch where Triton '
                'cannot run'
            )
        choice = ('torch', obstacle) if obstacle else ('triton', f'{dtype} on {device.type}')
    print_log(
        'super token operations by {}: {}'.format(*choice), logger='current', level=logging.DEBUG
    )
    return choice


def choose_backend(
    device: torch.device, dtype: torch.dtype, backend: str = 'auto'
) -> tuple[str, str]:
    """Choose the backend for tensors of ``dtype`` on ``device``.

    ``'auto'`` is what the environment variable ``MMSVIT_OPS_BACKEND`` says; if that
    is unset or ``'auto'``, it is Triton for CUDA tensors where Triton works (once it
    is :data:`PROVEN_ON_CUDA`), and PyTorch for all others. By name, Triton also runs in its interpreter
    (``TRITON_INTERPRET=1``), slowly and on any device. Each choice is logged once,
    at DEBUG.

    Returns:
        ``'torch'`` or ``'triton'``, and the reason, for people to read.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: Triton was asked for by name and cannot run here.
    """
    if backend != 'auto':
        return _choose(backend, 'backend', device, dtype)
    return _choose(os.environ.get(VARIABLE, 'auto'), VARIABLE, device, dtype)
