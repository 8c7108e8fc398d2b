"""CUDA tensors without data, forward and backward, on a machine that has no GPU.

PyTorch's fake tensors know shape, dtype, strides and device. On the device ``cuda`` they need
some answers of a driver, which :func:`prepare_process` gives in its place. There is no way
back: call it in a process that does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.amp import common
from torch.nn import functional

from ..ops import backend, standard_layers

# In the table of virtual functions of the hooks that libtorch asks about CUDA, bool(int8).
_HAS_PRIMARY_CONTEXT = 4
_ANSWER = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)
_no_context = _ANSWER(lambda hooks, device: False)


def _answer_for_the_driver() -> None:
    """Say that no device has a context, which is what autograd's engine asks before it runs."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks()).value
    assert table is not None
    slot = table + _HAS_PRIMARY_CONTEXT * ctypes.sizeof(ctypes.c_void_p)
    page = slot & ~0xFFF
    read_and_write = 3
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), 0x2000, read_and_write) != 0:
        raise OSError('the system does not let a process change its own tables')
    address = ctypes.cast(_no_context, ctypes.c_void_p).value
    ctypes.c_void_p.from_address(slot).value = address


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention as CUDA chooses it, flash first; without a driver PyTorch cannot choose."""
    if torch.is_autocast_enabled('cuda'):
        dtype = torch.get_autocast_dtype('cuda')
        query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast('cuda', enabled=False):
        if query.dtype in (torch.float16, torch.bfloat16):
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, scale=scale
            )[0]
        train = torch.is_grad_enabled() and query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, train, dropout_p, scale=scale
        )[0]


def prepare_process() -> None:
    """Let this process compute with fake CUDA tensors.

    Raises:
        RuntimeError: This version of PyTorch works otherwise.
    """
    os.environ.pop('TRITON_INTERPRET', None)  # Kernels are launched, not interpreted.
    torch.autograd.set_multithreading_enabled(False)
    functional.scaled_dot_product_attention = _attend  # type: ignore[assignment]
    # torch.autocast turns itself off where there is no GPU.
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore
    backend._why_not = lambda name, device, dtype: None
    backend.fix_choice([])  # auto is plain PyTorch, as on a GPU of which nothing is known.
    standard_layers.PLAIN.add(FakeTensor)
    try:
        if not torch.cuda.is_available():
            _answer_for_the_driver()
        with FakeTensorMode():
            x = torch.ones(2, 2, device='cuda', requires_grad=True)
            (x * x).sum().backward()
    except (AttributeError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f'PyTorch {torch.__version__} does not train fake CUDA tensors on this machine '
            f'({error}); counting was written for 2.11 on Linux'
        ) from error


def move_to_fake_cuda(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all weights and buffers of a model by CUDA tensors without data, of the same strides."""
    with mode:
        for module in model.modules():
            places: tuple[dict, ...] = (module._parameters, module._buffers)
            for tensors in places:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = _without_data(tensor)


def _without_data(x: Tensor) -> Tensor:
    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='cuda')
    return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
