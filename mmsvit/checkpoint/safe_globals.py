"""What a checkpoint may hold beside tensors and plain Python data, and who rebuilds it.

torch's weights-only mode calls whatever is allowed, with arguments out of the file. numpy's own
functions must not be called so: ``numpy.ndarray`` makes arrays of Python objects, or over memory
that the file does not bring. Their names therefore lead to stand-ins, which rebuild numeric arrays
from bytes of the right number and nothing else.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


def _refuse(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f'{what} is not allowed in a checkpoint')


class _DType:
    """In place of ``numpy.dtype``."""

    dtype: np.dtype

    def __init__(self, code: str, align: object = False, copy: object = True) -> None:
        if code not in DTYPES:
            raise _refuse(f'numpy.dtype({code!r})')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Take the byte order; there is nothing else to the state of a numeric dtype."""
        _, order, *rest = state
        if order not in ('<', '>', '=', '|') or rest[:6] != [None, None, None, -1, -1, 0]:
            raise _refuse(f'the numpy.dtype {state!r}'[:200])
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """In place of ``numpy.ndarray``: empty until its state is set."""

    def __new__(cls, *args: object, **kwargs: object) -> _Array:
        raise _refuse('numpy.ndarray()')

    def __setstate__(self, state: tuple) -> None:
        """Take shape and bytes."""
        _, shape, dtype, is_fortran, data = state
        if type(dtype) is not _DType or type(data) is not bytes:
            raise _refuse('a numpy.ndarray of other things than numbers')
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise _refuse(f'a numpy.ndarray of shape {shape!r}'[:200])
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise _refuse(f'a numpy.ndarray of shape {shape!r} with {len(data)} bytes'[:200])
        checked: Any = (1, shape, dtype.dtype, bool(is_fortran), data)
        super().__setstate__(checked)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as numpy's own, which any reader knows."""
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct(kind: type, shape: tuple, typecode: bytes) -> _Array:
    if kind is not _Array:
        raise _refuse(f'_reconstruct({kind!r})'[:200])
    return np.ndarray.__new__(_Array, (0,), 'b')


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    if type(dtype) is not _DType or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise _refuse('a numpy scalar that is no number')
    return np.frombuffer(data, dtype.dtype)[0]


def _history_buffer_method(owner: type, name: str) -> Callable:
    """In place of ``getattr``, which MMEngine's log history pickles for its own methods."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise _refuse(f'getattr({owner!r}, {name!r})'[:200])
    return getattr(owner, name)


def _empty_bytes() -> bytes:
    """In place of ``bytes``, which pickle calls for an array without elements."""
    return b''


# numpy 2 renamed the module; files of either generation are read.
STAND_INS: dict[str, Callable] = {
    'builtins.bytes': _empty_bytes,
    'builtins.getattr': _history_buffer_method,
    'numpy.dtype': _DType,
    'numpy.ndarray': _Array,
    **{f'numpy.{core}.multiarray._reconstruct': _reconstruct for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
}


def _name_of(allowed: Callable | tuple[Callable, str]) -> str:
    if isinstance(allowed, tuple):
        return allowed[1]
    return f'{allowed.__module__}.{getattr(allowed, "__qualname__", allowed)}'


def allow_runner_checkpoints() -> None:
    """Let torch's weights-only mode read what MMEngine's runner saves, in this process.

    Since torch 2.6 that mode is the default, and OpenMMLab's own MMEngine relies on the
    default: without this it cannot read its own checkpoints. What a program has allowed itself
    (``torch.serialization.add_safe_globals``) stays allowed, but for numpy's functions.
    """
    others = [
        allowed
        for allowed in torch.serialization.get_safe_globals()
        if _name_of(allowed) not in STAND_INS
    ]
    torch.serialization.clear_safe_globals()
    ours = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    torch.serialization.add_safe_globals([*others, argparse.Namespace, HistoryBuffer, *ours])
