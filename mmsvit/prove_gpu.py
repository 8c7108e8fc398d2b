"""Prove Triton's kernels on the GPU of this machine, so that backend 'auto' takes them.

    python -m mmsvit.prove_gpu configs/svit_maskrcnn_coco.py
    python -m mmsvit.prove_gpu                 (SViT-S, B and L as our configs have them)

Each kernel that a config would run is compared with float64, run twice for the same bits, and timed
beside plain PyTorch; a record of it is kept (MMSVIT_PROOFS, or ~/.cache/mmsvit/proofs). A new
driver, torch, Triton or mmsvit asks for new records. The GPU is used by a process of its own: a
kernel that faults ends that one alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from .atomic_file import atomic_file
from .cli import make_parser, run
from .compat.gpu import unseen_gpu
from .datasets.quick_checks import type_name
from .models import SViT
from .models.kernels import kernels_of
from .ops import proofs
from .ops.backend import choose_backend, is_interpreted
from .ops.proofs import Kernel
from .ops.proving import RAGGED, prove, speedup

DTYPES = ('float32', 'float16', 'bfloat16')
ARCHS = ('small', 'base', 'large')
DENSE_SIZES = (16, 8, 1, 1)
IMAGE = (800, 1344)  # The largest of COCO, for the timing.
# Triton's interpreter in place of a GPU, to try the program.
INTERPRETER = dict(gpu='interpreter', capability='none', driver='none', **proofs.versions('none'))
TIMEOUT = 180  # seconds for a kernel; compilation takes most


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument('configs', nargs='*', help='whose kernels are proven')
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, default=DTYPES, help='all of them by default'
    )
    parser.add_argument('--again', action='store_true', help='those that have a record, too')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args()


def backbones(node: Any) -> Iterator[SViT]:
    """The SViT of a config, without memory, wherever in the model they are."""
    if isinstance(node, dict):
        if type_name(node).endswith('SViT'):
            settings = {
                key: value for key, value in node.items() if key not in ('type', 'init_cfg')
            }
            with torch.device('meta'):
                yield SViT(**settings)
            return
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from backbones(value)


def wanted_kernels(configs: list[str], dtypes: list[str]) -> dict[Kernel, int]:
    """The kernels to prove, and the strides of their maps.

    Raises:
        ValueError: A config has no SViT that chooses its backend.
    """
    chosen = [getattr(torch, name) for name in dtypes]
    if not configs:
        with torch.device('meta'):
            models = [SViT(arch, super_token_sizes=DENSE_SIZES) for arch in ARCHS]
        return kernels_of(nn.ModuleList(models), chosen)
    found: dict[Kernel, int] = {}
    for config in configs:
        models = list(backbones(Config.fromfile(config).get('model')))
        kernels = kernels_of(nn.ModuleList(models), chosen)
        if not kernels:
            raise ValueError(f"{config} has no mmsvit.SViT with ops_backend='auto' in its model")
        found.update(kernels)
    return found


def to_json(kernel: Kernel, stride: int) -> dict:
    """A line for the worker."""
    dtype = str(kernel.dtype).removeprefix('torch.')
    return dict(kernel._asdict(), dtype=dtype, stride=stride)


def work() -> None:
    """Prove the kernels of standard input, a line of JSON each; answer each by a line."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # Libraries print, too.

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    device = torch.device('cpu' if is_interpreted() else 'cuda')
    try:
        if not is_interpreted() and not torch.cuda.is_available():
            raise RuntimeError(unseen_gpu() or 'torch finds no CUDA GPU')
        choose_backend(device, torch.float32, 'triton')
        torch.zeros(1, device=device)
        here = proofs.environment(device) or INTERPRETER
    except Exception as error:  # An exclusive GPU, a broken driver: whatever CUDA raises.
        answer(unable=str(error))
        return
    answer(environment=here)
    for line in sys.stdin:
        content = json.loads(line)
        stride = content.pop('stride')
        content.update(dtype=getattr(torch, content['dtype']), cell=tuple(content['cell']))
        kernel = Kernel(**content)
        real = 2, -(-IMAGE[0] // stride), -(-IMAGE[1] // stride)
        try:
            if is_interpreted():  # In Python, a real size would take for ever.
                answer(problem=prove(kernel, RAGGED, device), speedup=None)
                continue
            problem = prove(kernel, [*RAGGED, real], device)
            answer(problem=problem, speedup=None if problem else speedup(kernel, real, device))
        except torch.OutOfMemoryError as error:
            answer(unknown=f'not enough memory: {str(error).splitlines()[0]}')
            torch.cuda.empty_cache()
        except Exception as error:  # Whatever Triton or CUDA raise.
            lost = 'CUDA error' in str(error)  # The context is, and this process with it.
            problem = f'{type(error).__name__}: {str(error).splitlines()[0]}'
            answer(problem=problem, speedup=None, lost=lost)
            if lost:
                return


class Worker:
    """The process that uses the GPU, started anew when it is gone."""

    def __init__(self) -> None:
        self._answers: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, '-m', 'mmsvit.prove_gpu', '--worker']
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.start = self._next()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _next(self) -> dict[str, Any] | None:
        """The next answer; None if the process ended, or takes too long and was killed."""
        try:
            line = self._answers.get(timeout=TIMEOUT)
        except queue.Empty:
            line = None
        return None if line is None else json.loads(line)

    def ask(self, content: dict) -> dict[str, Any] | None:
        """Have a kernel proven; None if that ended the process, see :meth:`end`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(content) + '\n')
            self._process.stdin.flush()
        return self._next()

    def end(self) -> str:
        """End the process, and say how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            return f'it did not end in {TIMEOUT} s'
        return f'its process ended with status {self._process.returncode}'

    def close(self) -> None:
        """Let the process end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self.end()


def start_worker() -> tuple[Worker, dict[str, str]]:
    """Start the process, and learn where it runs.

    Raises:
        RuntimeError: It cannot use the GPU.
    """
    worker = Worker()
    if worker.start is None or 'unable' in worker.start:
        why = worker.end() if worker.start is None else worker.start['unable']
        raise RuntimeError(
            f'nothing can be proven here, and nothing is recorded: {why}. Backend auto takes '
            'plain PyTorch'
        )
    return worker, worker.start['environment']


def prove_all(kernels: dict[Kernel, int], again: bool) -> dict[str, dict]:
    """Prove kernels, with progress, and write the record after each.

    Args:
        kernels: From :func:`wanted_kernels`.
        again: Whether those with a record, too.

    Returns:
        All entries of the record, by the kernels' names.

    Raises:
        RuntimeError: See :func:`start_worker`.
        OSError: The record cannot be written.
    """
    worker: Worker | None
    worker, here = start_worker()
    file = proofs.folder() / proofs.file_name(here)
    entries = proofs.read(file, here)
    print(f'{here["gpu"]}, driver {here["driver"]}, torch {here["torch"]}: records in {file}')
    for number, (kernel, stride) in enumerate(kernels.items(), 1):
        name, begin = str(kernel), time.monotonic()
        if name in entries and not again:
            print(f'[{number}/{len(kernels)}] {name}: has a record')
            continue
        print(f'[{number}/{len(kernels)}] {name}: ', end='', flush=True)
        if worker is None:
            worker, _ = start_worker()
        answer = worker.ask(to_json(kernel, stride))
        if answer is None:
            answer = dict(problem=worker.end(), speedup=None, lost=True)
        if answer.get('lost'):
            worker = None
        seconds = time.monotonic() - begin
        if 'unknown' in answer:
            print(f'not proven, {answer["unknown"]} ({seconds:.0f} s)')
            continue
        problem, ratio = answer['problem'], answer['speedup']
        entries[name] = dict(proven=problem is None, problem=problem, speedup=ratio)
        with atomic_file(file) as part:
            part.write_text(json.dumps(dict(environment=here, kernels=entries), indent=1))
        timed = '' if ratio is None else f', {ratio:.2f} times as fast as PyTorch'
        print(f'{f"WRONG: {problem}" if problem else f"right{timed}"} ({seconds:.0f} s)')
    if worker is not None:
        worker.close()
    return entries


def main() -> None:
    """Prove the kernels that the configs would run; exit with 1 if one is wrong."""
    args = parse_args()
    if args.worker:
        work()
        return
    kernels = wanted_kernels(args.configs, args.dtypes)
    entries = prove_all(kernels, args.again)
    found = [entries[str(kernel)] for kernel in kernels if str(kernel) in entries]
    right = [entry for entry in found if entry['proven']]
    taken = [entry for entry in right if (entry['speedup'] or 0) >= proofs.LEAST_SPEEDUP]
    print(
        f'{len(right)} of {len(kernels)} kernels are right, {len(found) - len(right)} wrong; backend '
        f'auto takes {len(taken)}, those at least {proofs.LEAST_SPEEDUP} times as fast as PyTorch'
    )
    if len(right) < len(found):
        sys.exit(1)


if __name__ == '__main__':
    run(main)
