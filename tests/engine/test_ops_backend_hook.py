"""The choice of kernels at the start of a run: said, the same on all ranks, kept by a resumed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port
from toy import make_images, train

from mmsvit.checkpoint import read_checkpoint
from mmsvit.engine.hooks.ops_backend_hook import KEY
from mmsvit.ops import backend, proofs
from mmsvit.ops.backend import choose_backend, fix_choice
from mmsvit.ops.proofs import Kernel

HERE = dict(gpu='A GPU', capability='9.0', driver='580', torch='2', triton='3', kernels='abc')
FIRST = Kernel('conv_ffn', torch.float32, 32)
SECOND = Kernel('add_depthwise_conv', torch.float32, 8)


def prove(*kernels: Kernel) -> None:
    """Leave records of these kernels alone."""
    entries = {str(kernel): dict(proven=True, problem=None, speedup=2.0) for kernel in kernels}
    file = proofs.folder() / proofs.file_name(HERE)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(environment=HERE, kernels=entries)))
    proofs.records.cache_clear()


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """Records are read as if the model, which stays on the CPU, were on a GPU."""
    monkeypatch.setenv('MMSVIT_PROOFS', str(tmp_path / 'proofs'))
    monkeypatch.setattr(proofs, 'environment', lambda device: HERE)
    monkeypatch.setattr(backend, '_why_not', lambda *_: None)
    yield
    fix_choice(None)
    proofs.records.cache_clear()


@pytest.fixture
def run(tmp_path):
    images = make_images(tmp_path / 'images')

    def start(epochs: int, **changes: object) -> tuple[str, list | None]:
        """The log, and what the last checkpoint says."""
        work_dir = tmp_path / 'run'
        for log in work_dir.glob('*/*.log'):
            log.unlink()
        train(work_dir, images, log_level='INFO', **{'train_cfg.max_epochs': epochs}, **changes)
        log = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
        return log, read_checkpoint(work_dir / f'epoch_{epochs}.pth')['meta'].get(KEY)

    return start


def test_a_run_says_what_it_takes_and_why_and_keeps_it(run):
    prove(FIRST)
    log, kept = run(1)
    assert kept == [str(FIRST)]
    assert "ops_backend: Triton's for 1 of 10 kernels, plain PyTorch for 9" in log
    assert 'no record proves it here' in log and 'python -m mmsvit.prove_gpu' in log
    # After the run, a choice is free again.
    prove(SECOND)
    assert choose_backend(torch.device('cuda'), torch.float32, 'auto', SECOND)[0] == 'triton'


@pytest.mark.parametrize(
    ('then', 'kept', 'said'),
    [
        ([FIRST], [FIRST], None),
        ([], [], "1 kernels of the run were Triton's, and plain PyTorch goes on"),
        ([FIRST, SECOND], [FIRST], '1 kernels stay with plain PyTorch, with which the run began'),
        ([SECOND], [], 'because nothing proves them here'),
    ],
)
def test_a_resumed_run_keeps_its_kernels_or_says_what_changed(run, then, kept, said):
    prove(FIRST)
    run(1)
    prove(*then)
    force = {'default_hooks.run_record.force_resume': True}
    log, found = run(2, resume=True, **force)
    assert found == [str(kernel) for kernel in kept]
    if said:
        assert said in log
    else:
        assert 'of the run' not in log and 'stay with' not in log


@pytest.mark.parametrize('stored', [None, 'text', [1, None], {'a': 1}])
def test_other_checkpoints_are_resumed(run, tmp_path, stored):
    prove(FIRST)
    run(1)
    path = tmp_path / 'run' / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta'][KEY] = stored
    torch.save(checkpoint, path)
    _, found = run(2, resume=True, **{'default_hooks.run_record.force_resume': True})
    assert found == ([] if isinstance(stored, list) else [str(FIRST)])


def test_a_variable_chooses_and_is_named(run, monkeypatch):
    monkeypatch.setenv('MMSVIT_OPS_BACKEND', 'torch')
    log, kept = run(1)
    assert 'ops_backend: MMSVIT_OPS_BACKEND=torch asks for it' in log and kept is None


def test_nothing_is_said_where_there_is_nothing_to_choose(run, monkeypatch):
    monkeypatch.setattr(proofs, 'environment', lambda device: None)
    log, kept = run(1)
    assert 'ops_backend: ' not in log and kept is None


RANK = """
import logging, os, sys
from types import SimpleNamespace
import torch
from conftest import small_arch
from mmsvit import SViT
from mmsvit.engine.hooks import OpsBackendHook
from mmsvit.ops import backend, proofs
os.environ.pop('TRITON_INTERPRET', None)  # conftest sets it
torch.distributed.init_process_group('gloo')
proofs.environment = lambda device: {here}
if '{mode}' == 'equal':
    backend._why_not = lambda *_: None
runner = SimpleNamespace(model=SViT(small_arch()), optim_wrapper=None,
    logger=logging.getLogger(), cfg=SimpleNamespace(filename=None))
try:
    OpsBackendHook().before_run(runner)
    print(sorted(proofs._fixed))
except RuntimeError as error:
    print('refused', error)
"""


@pytest.mark.parametrize('mode', ['equal', 'without Triton'])
def test_rank_0_chooses_for_all(monkeypatch, tmp_path, mode):
    """Each rank has other records, and those of rank 1 count for nothing."""
    port, processes = free_port(), []
    for rank, kernel in enumerate((FIRST, SECOND)):
        monkeypatch.setenv('MMSVIT_PROOFS', str(tmp_path / str(rank)))
        prove(kernel)
        env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE='2')
        env.update(RANK=str(rank), PYTHONPATH=str(ROOT / 'tests'), OMP_NUM_THREADS='1')
        command = [sys.executable, '-c', RANK.format(here=HERE, mode=mode)]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, text=True, cwd=Path(tmp_path)
            )
        )
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    if mode == 'equal':
        assert outputs == [str([str(FIRST)])] * 2
    else:
        assert all('refused backend=triton, but Triton needs a CUDA device' in o for o in outputs)
