"""Records of which Triton kernels are right and fast on a GPU; ``python -m mmsvit.prove_gpu`` writes them.

A kernel that is wrong, or that faults, takes a whole training process with it. So ``auto`` takes
Triton's only where a record says that this very kernel, with these channels and this dtype, was
compared with float64 on this GPU, by this driver, torch, Triton and source. Without a record PyTorch
computes: it is never wrong, only slower.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.logging import print_log

from ..compat.gpu import driver_version

VARIABLE = 'MMSVIT_PROOFS'
SHIPPED = Path(__file__).parent / 'proofs'
SOURCES = ('triton_backend.py', 'triton_conv_ffn.py')
LEAST_SPEEDUP = 1.1


class Kernel(NamedTuple):
    """What is compiled into kernels, so that one proof does not hold for another.

    Attributes:
        operation: A function of :mod:`mmsvit.ops`: ``'sample'``, with ``distribute`` as its part,
            ``'conv_ffn'`` or ``'add_depthwise_conv'``.
        dtype: Of the map.
        channels: Of the map that the kernels read; of ``conv_ffn`` those between its linear layers.
        cell: Height and width of a super token; of other operations (1, 1).
    """

    operation: str
    dtype: torch.dtype
    channels: int
    cell: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        """As records name it."""
        cell = f' cells of {self.cell[0]}x{self.cell[1]}' if self.operation == 'sample' else ''
        dtype = str(self.dtype).removeprefix('torch.')
        return f'{self.operation} {self.channels} channels{cell} {dtype}'


def folder() -> Path:
    """Where the records of this machine are: ``MMSVIT_PROOFS``, or mmsvit's cache folder."""
    named = os.environ.get(VARIABLE)
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return Path(named) if named else cache / 'mmsvit' / 'proofs'


@functools.cache
def environment(device: torch.device) -> dict[str, str] | None:
    """All that a record holds for, beside the kernel; None where there are no kernels to run."""
    if device.type != 'cuda':
        return None
    try:
        import triton
    except ImportError:
        return None
    return dict(
        gpu=torch.cuda.get_device_name(device),
        capability='{}.{}'.format(*torch.cuda.get_device_capability(device)),
        # Its release branch, within which kernels are compiled alike.
        driver=(driver_version() or 'unknown').split('.')[0],
        **versions(triton.__version__),
    )


def versions(triton_version: str) -> dict[str, str]:
    """The part of :func:`environment` that does not depend on the GPU."""
    source = b''.join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    return dict(
        torch=torch.__version__,
        triton=triton_version,
        kernels=hashlib.sha256(source).hexdigest()[:16],
    )


def file_name(environment: dict[str, str]) -> str:
    """The name of the file with the records of an environment."""
    key = json.dumps(environment, sort_keys=True)
    gpu = re.sub(r'\W+', '-', environment['gpu'])
    return f'{gpu}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json'


def read(file: Path, environment: dict[str, str]) -> dict[str, dict]:
    """The entries of a file by the names of kernels; none if it is of elsewhere, damaged or not there."""
    try:
        content = json.loads(file.read_text())
        if content['environment'] != environment:
            return {}
        kernels: dict[str, dict] = content['kernels']
        for entry in kernels.values():
            if not isinstance(entry['proven'], bool) or not (
                entry['speedup'] is None or isinstance(entry['speedup'], (int, float))
            ):
                raise TypeError(f'an entry is {entry}')
        return kernels
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print_log(
            f'The records of proven kernels in {file} cannot be read ({type(error).__name__}: '
            f'{error}), and count for nothing; python -m mmsvit.prove_gpu writes them anew.',
            logger='current',
            level=logging.WARNING,
        )
        return {}


@functools.cache
def records(device: torch.device) -> dict[str, dict]:
    """What is known of kernels on a device, by their names: those of this machine before shipped ones."""
    here = environment(device)
    if here is None:
        return {}
    name = file_name(here)
    return {**read(SHIPPED / name, here), **read(folder() / name, here)}


_fixed: frozenset[str] | None = None


def fix(chosen: Collection[str] | None) -> None:
    """Let these kernels be Triton's and no other, whatever the records say; None ends that.

    All ranks of a run, and its resumption, then compute alike.
    """
    global _fixed
    _fixed = None if chosen is None else frozenset(chosen)


def verdict(kernel: Kernel, device: torch.device) -> tuple[bool, str]:
    """Whether ``auto`` takes Triton's kernel, and why, in words."""
    name = str(kernel)
    if _fixed is not None:
        return name in _fixed, 'the run began so'
    found = records(device).get(name)
    if found is None:
        return False, 'no record proves it here'
    if not found['proven']:
        return False, f'it failed here: {found.get("problem")}'
    speedup = found['speedup']
    if speedup is None:
        return False, 'it is right here, but was not timed'
    if speedup < LEAST_SPEEDUP:
        return False, f'it is right here, but {speedup:.2f} times as fast as PyTorch'
    return True, f'proven here, {speedup:.2f} times as fast as PyTorch'
