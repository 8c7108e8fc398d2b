"""A GPU that is there and that torch does not see: why, and what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

CPU_VARIABLE = 'MMSVIT_CPU'
DRIVER_FILE = Path('/proc/driver/nvidia/version')  # Where Linux's driver says its version.
# The oldest driver of each CUDA release; within a release, wheels run on all of them.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Version of the NVIDIA driver; empty if only nvidia-smi says there is one; None for none."""
    if file.is_file():
        found = re.search(r'Kernel Module\D*?(\d+(?:\.\d+)+)', file.read_text())
        return found[1] if found else ''
    tool = shutil.which('nvidia-smi')
    if tool is None:
        return None
    command = [tool, '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split('\n')[0].strip() if result.returncode == 0 else None


def unseen_gpu(driver_file: Path = DRIVER_FILE) -> str | None:
    """Why torch does not see the NVIDIA GPU of this machine, and what to do.

    Args:
        driver_file: Where Linux's driver says its version.

    Returns:
        None if torch sees a GPU, if there is none, or if ``MMSVIT_CPU=1`` says that the CPU is meant.
    """
    if os.environ.get(CPU_VARIABLE) == '1' or torch.cuda.is_available():
        return None
    driver = driver_version(driver_file)
    if driver is None:
        return None
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    if visible is not None and visible.strip() in ('', '-1'):
        why = f'CUDA_VISIBLE_DEVICES={visible!r} hides it: unset the variable'
    elif torch.version.cuda is None:
        why = f'torch {torch.__version__} is built without CUDA: install a build with it'
    else:
        needed = OLDEST_DRIVER.get(int(torch.version.cuda.split('.')[0]))
        why = 'torch.cuda does not start: `python -c "import torch; torch.cuda.init()"` says why'
        if needed and driver and int(driver.split('.')[0]) < needed:
            why = (
                f'driver {driver} is too old for CUDA {torch.version.cuda}, which needs {needed} or '
                'later: update the driver, or install a torch built for an older CUDA'
            )
    return (
        f'this machine has an NVIDIA GPU, and torch does not see it: {why}. To use the CPU, set '
        f'{CPU_VARIABLE}=1'
    )
