"""Kill training runs at random moments, and resume them: python -m pytest -m stress tests/stress -s."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from mmsvit.checkpoint import read_checkpoint
from mmsvit.checkpoint.files import newest_valid_checkpoint

KILLS = 10  # for each task


def options(task: str, shapes: Path, folder: Path) -> list[str | Path]:
    """A run that saves after every iteration or epoch, and is evaluated often."""
    if task == 'upernet':
        config, data = 'svit_upernet_shapes.py', shapes
        own = ['train_cfg.max_iters=40', 'train_cfg.val_interval=4']
        own.append('model.data_preprocessor.size=(64,64)')
    else:
        config, data = 'svit_classifier_shapes.py', folder / 'classification'
        sizes = ['--num-train', '16', '--num-val', '5', '--size', '64']
        run_python('tools/make_shapes_dataset.py', data, '--task', 'classification', *sizes)
        own = ['train_cfg.max_epochs=40', 'train_dataloader.batch_size=4']
    for split in ('train', 'val'):
        own.append(f'{split}_dataloader.dataset.data_root={data}/')
        own.append(f'{split}_dataloader.persistent_workers=False')
    common = [
        'train_dataloader.num_workers=2',
        'val_dataloader.num_workers=1',
        'model.backbone.drop_path_rate=0.2',
        'default_hooks.checkpoint.max_keep_ckpts=2',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.logger.interval=1',
    ]
    return [ROOT / 'configs' / config, '--cfg-options', *own, *common]


def killed_after(delay: float, command: list, log: Path) -> bool:
    """Whether it had to be killed, or came to its end before."""
    with log.open('w') as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    assert process.returncode == 0, log.read_text()[-3000:]
    return False


def moment(work_dir: Path, log: Path) -> str:
    """What a run that was killed had been doing."""
    if list(work_dir.glob('*.partial')):
        return 'writing'
    lines = re.findall(r'(?:Epoch|Iter)\((train|val)\)', log.read_text())
    return {'train': 'training', 'val': 'evaluation'}[lines[-1]] if lines else 'start-up'


@pytest.mark.promise(
    'Runs',
    'A run killed (SIGKILL) at random moments and resumed ends in the same weights as an '
    'uninterrupted one',
    '20 kills, in start-up, training and evaluation; largest difference of a weight 0 '
    '([details](reliability.md#twenty-kills))',
)
@pytest.mark.stress
@pytest.mark.parametrize('task', ['upernet', 'classifier'])
def test_killed_at_random_moments(task, shapes, tmp_path, record: Callable[[str], None]):
    """From the start of a process to its end; what ends before it is killed is begun anew."""
    arguments = options(task, shapes, tmp_path)
    train, log = [sys.executable, ROOT / 'tools' / 'train.py'], tmp_path / 'log.txt'
    start = time.monotonic()
    run_python(*train[1:], *arguments[:1], '--work-dir', tmp_path / 'whole', *arguments[1:])
    length = time.monotonic() - start
    rng, runs, moments, resumed_from = random.Random(0), [tmp_path / 'run_0'], Counter(), []

    def resume(seconds: float) -> bool:
        command = [*train, arguments[0], '--resume', '--work-dir', runs[-1], *arguments[1:]]
        return killed_after(seconds, command, log)

    # One kill in each part of a run's time, in any order.
    parts = rng.sample(range(KILLS), KILLS)
    while parts:
        start, fresh = time.monotonic(), not runs[-1].exists()
        if resume(length * (parts[-1] + rng.random()) / KILLS):
            parts.pop()
            moments[moment(runs[-1], log)] += 1
            found = newest_valid_checkpoint(runs[-1])
            resumed_from.append(Path(found).stem if found else 'nothing')
        else:
            if fresh:  # Another program may have slowed down the first.
                length = min(length, time.monotonic() - start)
            runs.append(tmp_path / f'run_{len(runs)}')
    assert not resume(600)  # The last of them comes to its end.
    expected = read_checkpoint(newest_valid_checkpoint(tmp_path / 'whole'))['state_dict']
    difference = 0.0
    for run in runs:
        found = read_checkpoint(newest_valid_checkpoint(run))['state_dict']
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
            difference = max(difference, float((found[key].double() - value.double()).abs().max()))
    record(
        f'{len(runs)} runs of {length:.0f} s, {KILLS} kills: '
        f'{", ".join(f"{count} in {name}" for name, count in sorted(moments.items()))}; resumed from '
        f'{", ".join(resumed_from)}; largest difference of a final weight {difference:.3g}'
    )
