"""Peak memory: on CUDA from its own counters, on the CPU from a separate process.

Both measure one run after a first one, which does all initialisation.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from .candidates import Candidate
from .workloads import Case, build_workload

M_MMAP_THRESHOLD = -3  # In glibc's malloc.h.


class RunFailedError(Exception):
    """The error of another process, as text."""


def cuda_run_bytes(run: Callable[[], object]) -> int:
    """Bytes that ``run`` allocates at its peak, on top of earlier ones."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_run_bytes(candidate: Candidate, case: Case, threads: int) -> int | None:
    """Bytes by which a run raises the resident memory of a fresh process.

    Returns:
        None where the system does not tell (other than Linux).

    Raises:
        RunFailedError: The run failed, or the system killed its process.
    """
    if not Path('/proc/self/status').is_file():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        try:
            found = pool.submit(_measure_here, candidate, case, threads).result()
        except BrokenProcessPool:
            raise RunFailedError(
                'its process died; without a message, it probably ran out of memory'
            ) from None
    if isinstance(found, str):
        raise RunFailedError(found)
    return found


def _measure_here(candidate: Candidate, case: Case, threads: int) -> int | str:
    """Bytes, or the error as text: not every exception can be pickled."""
    torch.set_num_threads(threads)
    _keep_tensors_apart()
    try:
        workload = build_workload(candidate, case)
        workload.run()
        workload.model.zero_grad(set_to_none=True)
        return _resident_increase(workload.run)
    except Exception as error:  # Any error is the result.
        return describe(error)


def _keep_tensors_apart() -> None:
    """Give each large allocation its own pages, which the system gets back when they are freed.

    Otherwise they depend on earlier allocations, and equal runs differ by megabytes.
    """
    with contextlib.suppress(AttributeError):  # A C library without it.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def _resident_increase(run: Callable[[], object]) -> int:
    gc.collect()
    with contextlib.suppress(AttributeError):  # A C library without it.
        ctypes.CDLL(None).malloc_trim(0)  # Return freed memory, or reusing it would not count.
    with contextlib.suppress(OSError):  # Without permission, the peak is the process's.
        Path('/proc/self/clear_refs').write_text('5')  # Resets the peak, see `man 5 proc`.
    before = _status_bytes('VmRSS')
    run()
    return max(0, _status_bytes('VmHWM') - before)


def _status_bytes(field: str) -> int:
    """A figure of this process. The peak of ``getrusage`` would include the parent's."""
    match = re.search(rf'^{field}:\s*(\d+) kB', Path('/proc/self/status').read_text(), re.M)
    if match is None:
        raise OSError(f'/proc/self/status has no {field}')
    return int(match[1]) * 1024


def describe(error: Exception) -> str:
    """An exception in one line."""
    line = str(error).strip().partition('\n')[0]
    return line if isinstance(error, RunFailedError) else f'{type(error).__name__}: {line}'
