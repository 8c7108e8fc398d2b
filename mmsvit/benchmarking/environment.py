"""The machine and software of a measurement."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional

import mmsvit

LIBRARIES = ('torchvision', 'triton', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain')
VARIABLES = ('MMSVIT_OPS_BACKEND', 'TRITON_INTERPRET', 'OMP_NUM_THREADS', 'PYTORCH_CUDA_ALLOC_CONF')


def describe_environment() -> dict[str, str]:
    """Hardware, versions and settings that times depend on, by name.

    Call it with the settings of the measurement, such as the threads, in place.
    """
    found = {
        'date': datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        'mmsvit': _mmsvit_version(),
        'CPU': f'{_cpu_name()}, {os.cpu_count()} cores seen, {torch.get_num_threads()} threads used',
        'GPU': _gpu_name(),
        'system': f'{platform.system()} {platform.machine()}, Python {platform.python_version()}',
        'torch': f'{torch.__version__}, CUDA {torch.version.cuda}, '
        f'cuDNN {torch.backends.cudnn.version()}',
    }
    found.update({name: _version(name) for name in LIBRARIES})
    found['float32 on CUDA'] = (
        f'tf32 in matrix products {_on(torch.backends.cuda.matmul.allow_tf32)}, in convolutions '
        f'{_on(torch.backends.cudnn.allow_tf32)}; cuDNN benchmark '
        f'{_on(torch.backends.cudnn.benchmark)}'
    )
    found['variables'] = ', '.join(f'{v}={os.environ[v]}' for v in VARIABLES if v in os.environ)
    return found


def measure_rates(device: str) -> dict[str, str]:
    """What this machine reaches in a matrix product and in attention, to compare machines by.

    Attention's share of a model depends on it: on one CPU it runs at the rate of matrix products,
    on another at half of it.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
    """
    size, (heads, tokens, channels) = 2048, (5, 4200, 64)  # Stage 3 of SViT-S at 800x1344.
    a = torch.randn(size, size, device=device)
    q = torch.randn(1, heads, tokens, channels, device=device)
    attend = functional.scaled_dot_product_attention
    found = {}
    for name, run, flops in (
        (f'float32 product of {size}x{size}', lambda: a @ a, 2 * size**3),
        (
            f'float32 attention, {heads} heads of {tokens} tokens',
            lambda: attend(q, q, q),
            4 * heads * tokens**2 * channels,
        ),
    ):
        rate = flops / median(_seconds(run, device) for _ in range(5))
        found[name] = f'{rate / 1e9:.0f} GFLOP/s'
    return found


def _seconds(run: Callable[[], object], device: str) -> float:
    def wait() -> None:
        if device == 'cuda':
            torch.cuda.synchronize()

    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def _on(value: bool) -> str:
    return 'on' if value else 'off'


def _version(library: str) -> str:
    try:
        return importlib.import_module(library).__version__
    except ImportError:
        return 'not installed'


def _mmsvit_version() -> str:
    """The version, with the commit if this is a checkout."""
    folder = Path(mmsvit.__file__).parent
    try:
        # Our files must be tracked: the environment may lie in another checkout.
        _git(folder, 'ls-files', '--error-unmatch', '__init__.py')
        commit = _git(folder, 'rev-parse', '--short=12', 'HEAD')
        changed = _git(folder, 'status', '--porcelain', '--untracked-files=no', '.')
    except (OSError, subprocess.CalledProcessError):
        return mmsvit.__version__
    return f'{mmsvit.__version__}, commit {commit}' + (' with changes' if changed else '')


def _git(folder: Path, *arguments: str) -> str:
    command = ['git', '-C', str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    """The model of the CPU, of which ``platform`` knows only the family on Linux."""
    info = Path('/proc/cpuinfo')
    match = re.search(r'^model name\s*:\s*(.+)', info.read_text(), re.M) if info.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()


def _gpu_name() -> str:
    if not torch.cuda.is_available():
        return 'none'
    properties = torch.cuda.get_device_properties(0)
    return f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB'
