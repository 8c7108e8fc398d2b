"""What a GPU will have to do: kernel launches, bytes moved, bytes saved. Counted, not measured.

A model runs once over fake CUDA tensors, and each of PyTorch's operations is counted by rules:

- A launch reads each tensor that it is given once and writes each result once, whatever a cache
  saves. Views and allocations are free.
- A convolution adds its bias in a launch of its own, and converts a weight that has another memory
  format than its input. Backward it is a launch for each gradient, with a copy of a gradient that
  has another memory format.
- Backward, attention is three launches, normalisation two.
- A Triton kernel is one launch.

Whether that is what a GPU does, only a profiler on one can say. Ratios between models mean more
than the numbers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import JITFunction

from ..ops import custom_ops
from .candidates import Candidate
from .fake_cuda import move_to_fake_cuda, prepare_process
from .memory import describe
from .workloads import Case, apply_flags, autocast_of

_FREE = {
    'aten::_unsafe_view', 'aten::_reshape_alias', 'aten::lift_fresh', 'aten::empty',
    'aten::empty_like', 'aten::empty_strided', 'aten::new_empty', 'aten::new_empty_strided',
    'aten::set_', 'aten::resize_',
}  # fmt: skip
_FILLING = {
    'zeros', 'zeros_like', 'new_zeros', 'zero_', 'ones', 'ones_like', 'new_ones', 'full',
    'full_like', 'new_full', 'fill_', 'arange', 'scalar_tensor', 'bernoulli_',
}  # fmt: skip
_WAITING = {
    '_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal', 'masked_select', '_unique2',
    'unique_dim',
}  # fmt: skip
_BLOCK_BYTES = 512  # What PyTorch's allocator rounds up to.


@dataclass
class Counts:
    """What one run of a model takes.

    Attributes:
        launches: Kernel launches.
        bytes_moved: Bytes read and written.
        bytes_saved: Bytes of what is saved for the backward pass, without weights.
        peak_bytes: Most bytes at once, without weights and inputs.
        launches_of: Launches of each operation.
        bytes_of: Bytes that each operation moves.
        host_syncs: Operations for which the host waits, by name.
        cpu_tensors: Operations whose result is on the CPU, by name.
        error: Why there are no counts; None if there are.
    """

    launches: int = 0
    bytes_moved: int = 0
    bytes_saved: int = 0
    peak_bytes: int = 0
    launches_of: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    host_syncs: Counter[str] = field(default_factory=Counter)
    cpu_tensors: Counter[str] = field(default_factory=Counter)
    error: str | None = None


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the elements that exist; of an expanded dimension that is one."""
    total = 0
    for tensor in {id(t): t for t in tensors if t is not None}.values():
        number = tensor.element_size()
        for size, stride in zip(tensor.shape, tensor.stride()):
            number *= size if stride else min(size, 1)
        total += number
    return total


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _cost_of_convolution(args: tuple, out: Tensor) -> tuple[int, int]:
    x, weight, bias, *_, groups = args[:9]
    launches, moved = 1, _bytes([x, weight, out])
    if bias is not None:
        launches, moved = launches + 1, moved + 2 * _bytes([out]) + _bytes([bias])
    depthwise = groups > 1 and weight.shape[1] == 1
    converted = _is_channels_last(x) and not _is_channels_last(weight)
    if converted and not depthwise and weight[0, 0].numel() > 1:
        launches, moved = launches + 1, moved + 2 * _bytes([weight])
    return launches, moved


def _cost_of_convolution_backward(args: tuple, out: tuple) -> tuple[int, int]:
    grad, x, weight = args[:3]
    launches = moved = 0
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    if channels_last and grad.is_contiguous() and grad.shape[1] > 1 and grad[0, 0].numel() > 1:
        launches, moved = 1, 2 * _bytes([grad])
    for result, other in zip(out, (weight, x, None)):
        if result is not None:
            launches, moved = launches + 1, moved + _bytes([grad, other, result])
    return launches, moved


def _cost(name: str, args: tuple, kwargs: dict, out: Any) -> tuple[int, int]:
    """Launches and bytes of an operation."""
    if name == 'convolution':
        return _cost_of_convolution(args, out)
    if name == 'convolution_backward':
        return _cost_of_convolution_backward(args, out)
    if name == 'copy_':
        return 1, _bytes([args[0]]) + _bytes([args[1]])
    if name in _FILLING:
        return 1, _bytes(_tensors(out))
    launches = 1
    if name.endswith('_attention_backward'):
        launches = 3
    elif name.endswith('_norm_backward'):
        launches = 2
    return launches, _bytes(_tensors((args, kwargs))) + _bytes(_tensors(out))


def _as_cuda_gives_it(name: str, args: tuple, out: Any) -> Any:
    """``out`` with the memory format that cuDNN gives, which fake tensors do not know."""
    if name == 'convolution' and _is_channels_last(args[0]):
        return torch.empty_like(out, memory_format=torch.channels_last)
    if name not in ('convolution_backward', 'native_layer_norm_backward') or out[0] is None:
        return out
    layout = torch.contiguous_format
    if name == 'convolution_backward':
        if not any(map(_is_channels_last, args[1:3])):
            return out
        layout = torch.channels_last
    return torch.empty_like(out[0], memory_format=layout), *out[1:]


class Recorder(TorchDispatchMode):
    """Counts every operation that runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self._bytes_now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split('::')
        if namespace == 'mmsvit':  # Eager mode calls what computes it.
            with self:
                return getattr(custom_ops, f'_compute_{name}')(*args, **kwargs)
        if name in _WAITING:
            self.counts.host_syncs[name] += 1  # And mostly fails: there is no number to wait for.
        out = func(*args, **kwargs)
        counted = not (func.is_view or func._schema.name in _FREE or namespace in ('prim', 'prims'))
        if counted:
            self.add(name, *_cost(name, args, kwargs, out))
            out = _as_cuda_gives_it(name, args, out)
        for tensor in _tensors(out):
            if tensor.device.type == 'cuda':
                self._watch(tensor)
            elif counted:
                self.counts.cpu_tensors[name] += 1
        return out

    def add(self, name: str, launches: int, moved: int) -> None:
        """Count an operation."""
        self.counts.launches += launches
        self.counts.bytes_moved += moved
        self.counts.launches_of[name] += launches
        self.counts.bytes_of[name] += moved

    def __enter__(self) -> Recorder:
        # In its process, for good: there is no GPU to launch a Triton kernel on.
        JITFunction.run = lambda kernel, *args, grid, warmup, **constants: self.add(
            kernel.__name__, 1, _bytes(_tensors(args))
        )
        super().__enter__()
        return self

    def _watch(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES

        def free(_: weakref.ref) -> None:
            self._bytes_now -= self._alive.pop(key)[0]

        self._alive[key] = size, weakref.ref(storage, free)
        self._bytes_now += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._bytes_now)


def _build(candidate: Candidate, case: Case) -> nn.Module:
    """The model as detectors train it, or in inference."""
    training = candidate.trained_as if case.trains else {}
    model = MODELS.build(candidate.backbone | training)
    model.train(case.trains)
    apply_flags(model, candidate)
    return model if case.trains else model.to(getattr(torch, case.dtype))


def count_model(candidate: Candidate, case: Case) -> Counts:
    """Run a candidate once over fake CUDA tensors, in a process prepared for them.

    Args:
        candidate: The model.
        case: ``train``, with autocast to its dtype; or ``backbone``, with weights and images
            in its dtype.

    Raises:
        ValueError: The candidate has ``compile`` or ``graph``, whose kernels exist on a GPU only.
    """
    if candidate.flags & {'compile', 'graph'}:
        raise ValueError('+compile and +graph cannot be counted without a GPU')
    mode = FakeTensorMode()
    model = _build(candidate, case)
    move_to_fake_cuda(model, mode)
    dtype = getattr(torch, case.dtype)
    recorder = Recorder()
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes(), tensor  # Kept, so that no number returns.
        return tensor

    with mode:
        images = torch.empty(
            case.batch, 3, *case.shape, device='cuda', dtype=None if case.trains else dtype
        )
        with recorder:
            if not case.trains:
                with torch.no_grad():
                    model(images)
                return recorder.counts
            with saved_tensors_hooks(note, lambda tensor: tensor), autocast_of(case):
                outputs = [output for output in model(images) if output.requires_grad]
            recorder.counts.bytes_saved = sum(size for size, _ in saved.values())
            saved.clear()
            gradients = [torch.empty_like(output) for output in outputs]
            torch.autograd.backward(outputs, gradients)
    return recorder.counts


def _count_here(candidate: Candidate, case: Case) -> Counts:
    try:
        prepare_process()
        return count_model(candidate, case)
    except Exception as error:  # Any error is the result.
        return Counts(error=describe(error))


def count_case(candidate: Candidate, case: Case) -> Counts:
    """:func:`count_model` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        try:
            return pool.submit(_count_here, candidate, case).result()
        except BrokenProcessPool:
            return Counts(error='its process died without a message')
