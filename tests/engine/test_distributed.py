"""Two processes train the same model as one."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, activated, free_port, run_python

from mmsvit import cli

# Without what is random or depends on who sees which image: dropout, flips, batch statistics,
# class weights, by which the loss is averaged.
# SGD, because Adam makes a step of full length out of a gradient that is nearly zero.
CONFIG = """
_base_ = {base!r}
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')
]
head = dict(
    norm_cfg=dict(_delete_=True, type='GN', num_groups=8),
    dropout_ratio=0.0,
    loss_decode=dict(class_weight=None),
)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(norm_eval=True),
    decode_head=head,
    auxiliary_head=head,
)
train_dataloader = dict(
    batch_size={batch_size},
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root={data!r}, pipeline=train_pipeline),
)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3)
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=3, save_best=None))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(shapes, tmp_path):
    def config(name: str, batch_size: int) -> Path:
        path = tmp_path / f'{name}.py'
        base = str(ROOT / 'configs' / 'svit_upernet_shapes.py')
        path.write_text(CONFIG.format(base=base, batch_size=batch_size, data=f'{shapes}/'))
        return path

    one, two = config('one', 4), config('two', 2)
    run_python(ROOT / 'tools' / 'train.py', one, '--work-dir', tmp_path / 'one')
    still = ['--cfg-options', 'optim_wrapper.optimizer.lr=0.0']
    run_python(ROOT / 'tools' / 'train.py', one, '--work-dir', tmp_path / 'still', *still)
    env = activated(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', PORT=free_port())
    result = subprocess.run(
        ['bash', ROOT / 'tools' / 'dist_train.sh', two, '2', '--work-dir', tmp_path / 'two'],
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    weights = [
        torch.load(tmp_path / name / 'iter_3.pth', weights_only=False)['state_dict']
        for name in ('one', 'two', 'still')
    ]
    moved = 'backbone.stages.0.blocks.0.ffn.fc1.weight'
    assert (weights[0][moved] - weights[2][moved]).abs().max() > 1e-4
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['svit_upernet_ade20k', 'svit_cascade_maskrcnn_coco'])
def test_training_of_sync_bn_without_gpus_is_refused_and_says_how(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    monkeypatch.setenv('LOCAL_RANK', '0')
    options = ['--launcher', 'pytorch', '--cfg-options', 'model.backbone.init_cfg=None']
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    cli.add_arguments(parser)
    command = [str(ROOT / 'configs' / f'{name}.py'), *options]
    cli.start_processes(cli.load_config(parser.parse_args(command)), 0, trains=False)
    with pytest.raises(ValueError, match='SyncBN on CUDA GPUs only') as error:
        cli.start_processes(cli.load_config(parser.parse_args(command)), 0, trains=True)
    command += str(error.value).partition('--cfg-options ')[2].split()
    cfg = cli.load_config(parser.parse_args(command))
    cli.start_processes(cfg, 0, trains=True)
    assert 'SyncBN' not in str(cfg.model)


LEAVE = """
import os
import runpy
import signal
import sys
from pathlib import Path

from mmsvit.engine.hooks.stop_signal_hook import StopSignalHook

def threads_of_group():
    names = {path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')}
    return names & {'pt_gloo_runloop'}

def after_train_iter(self, runner, *args, **kwargs):
    assert threads_of_group()
    if stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    finish(self, runner, *args, **kwargs)

tool, port, stopped = sys.argv[1], sys.argv[2], sys.argv[3] == 'stopped'
sys.argv[1:] = sys.argv[4:]
os.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # The threads are gloo's.
finish, StopSignalHook.after_train_iter = StopSignalHook.after_train_iter, after_train_iter
status = 0
try:
    runpy.run_path(tool, run_name='__main__')
except SystemExit as stop:
    status = stop.code
assert status == (143 if stopped else 0), status
assert not threads_of_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize('end', ['finished', 'stopped'])
def test_no_thread_of_the_group_is_left_at_the_end(shapes, tmp_path, end):
    """One that outlives the interpreter aborts a run that has done all its work, now and then."""
    config = tmp_path / 'config.py'
    base = str(ROOT / 'configs' / 'svit_upernet_shapes.py')
    config.write_text(CONFIG.format(base=base, batch_size=2, data=f'{shapes}/'))
    options = ['--launcher', 'pytorch', '--work-dir', tmp_path / 'work']
    run_python('-c', LEAVE, ROOT / 'tools' / 'train.py', free_port(), end, config, *options)


SHARDED = """
import os
import sys

import mmsvit  # before MMDetection, which needs it without compiled ops

import mmengine.runner
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import RUNNERS
from mmsvit.cli import run

def main():
    os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[2])
    torch.cuda.set_device = lambda *_: None  # MMEngine's strategy asks for a GPU even with gloo.
    cfg = Config.fromfile(mmsvit.config_path('mask_rcnn/mask-rcnn_svit-l_fpn_fsdp-1x_coco.py'))
    cfg.merge_from_dict({
        'work_dir': sys.argv[1], 'launcher': 'pytorch', 'env_cfg.dist_cfg.backend': 'gloo',
        'model.backbone.init_cfg': None,
    })
    runner = RUNNERS.build(cfg)
    assert type(runner.strategy).__name__ == 'FSDPStrategy'
    runner.strategy.model_wrapper['device_id'] = torch.device('cpu')
    plain = runner.strategy.build_model(cfg.model)
    names = list(plain.state_dict())
    model = runner.strategy._wrap_model(plain)
    parts = sum(type(module).__name__ == 'FullyShardedDataParallel' for module in model.modules())
    assert parts > 10, parts
    cfg.optim_wrapper.type = 'OptimWrapper'  # AMP needs a GPU.
    del cfg.optim_wrapper['dtype'], cfg.optim_wrapper['loss_scale']
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert {group['weight_decay'] for group in optim_wrapper.param_groups} == {0.0, 0.05}
    losses = model.train_step(demo_mm_inputs(1, [[3, 64, 64]], with_mask=True), optim_wrapper)
    assert torch.isfinite(losses['loss']), losses
    assert list(model.state_dict()) == names  # One file, as of a model that is not sharded.

run(main)
"""


@pytest.mark.slow
def test_sharded_config_builds_and_takes_a_step(tmp_path):
    run_python('-c', SHARDED, tmp_path, free_port())
