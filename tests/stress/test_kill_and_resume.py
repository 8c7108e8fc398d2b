"""Kill training runs at random moments, and resume them: python -m pytest -m stress tests/stress -s."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from mmsvit.checkpoint import read_checkpoint
from mmsvit.safe_checkpoint import newest_whole_checkpoint

KILLS = 10  # of each run
LONGEST_DELAY = 0.8  # seconds after the first new checkpoint


def options(task: str, shapes: Path, folder: Path) -> list[str | Path]:
    """A run that saves as often as it can."""
    common = [
        'train_dataloader.num_workers=2',
        'train_dataloader.persistent_workers=False',
        'model.backbone.drop_path_rate=0.2',
        'val_cfg=None',
        'val_dataloader=None',
        'val_evaluator=None',
        'default_hooks.checkpoint.save_best=None',
        'default_hooks.checkpoint.max_keep_ckpts=2',
        'default_hooks.checkpoint.interval=1',
    ]
    if task == 'upernet':
        config = 'svit_upernet_shapes.py'
        data, own = shapes, ['train_cfg.max_iters=60', 'model.data_preprocessor.size=(64,64)']
    else:
        config = 'svit_classifier_shapes.py'
        data = folder / 'classification'
        if not data.exists():
            sizes = ['--num-train', '16', '--num-val', '5', '--size', '64']
            run_python('tools/make_shapes_dataset.py', data, '--task', 'classification', *sizes)
        own = ['train_cfg.max_epochs=60', 'train_dataloader.batch_size=4']
    root = f'train_dataloader.dataset.data_root={data}/'
    return [ROOT / 'configs' / config, '--cfg-options', root, *common, *own]


def kill_at_random(command: list, work_dir: Path, rng: random.Random, log: Path) -> bool:
    """Whether it was killed before it came to its end."""
    before = {path: path.stat().st_mtime_ns for path in work_dir.glob('*.pth')}
    with log.open('a') as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    while process.poll() is None:
        now = {path: path.stat().st_mtime_ns for path in work_dir.glob('*_*.pth') if path.exists()}
        if set(now.items()) - set(before.items()):
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, LONGEST_DELAY))
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()[-3000:]
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.stress
@pytest.mark.parametrize('task', ['upernet', 'classifier'])
def test_killed_at_random_moments(task, shapes, tmp_path):
    arguments = options(task, shapes, tmp_path)
    train = [sys.executable, ROOT / 'tools' / 'train.py', *arguments]
    run_python(*train[1:], '--work-dir', tmp_path / 'whole')
    rng, work_dir = random.Random(0), tmp_path / 'killed'
    work_dir.mkdir()
    command = [*train[:3], '--resume', '--work-dir', work_dir, *train[3:]]
    resumed_from, in_writing = [], 0
    for _ in range(KILLS):
        assert kill_at_random(command, work_dir, rng, tmp_path / 'log.txt'), 'make it longer'
        in_writing += bool(list(work_dir.glob('*.partial')))
        resumed_from.append(Path(newest_whole_checkpoint(work_dir)).stem)
    run_python(*map(str, command[1:]))
    final = [
        read_checkpoint(newest_whole_checkpoint(tmp_path / name))['state_dict']
        for name in ('whole', 'killed')
    ]
    differences = [
        float((final[1][key].double() - value.double()).abs().max())
        for key, value in final[0].items()
    ]
    print(
        f'\n{task}: {KILLS} kills, {in_writing} of them while a checkpoint was written; resumed from '
        f'{", ".join(resumed_from)}; largest difference of a final weight {max(differences):.3g}'
    )
    for key, value in final[0].items():
        torch.testing.assert_close(final[1][key], value, rtol=1e-5, atol=1e-6)
