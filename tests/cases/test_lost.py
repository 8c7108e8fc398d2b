"""Inputs that ended a run late, or kept it from going on."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, import_tool, small_arch
from data_configs import LINE, TRIANGLE, detection_config, printed
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend
from toy import make_images, train

from mmsvit import SViT
from mmsvit.atomic_file import atomic_file
from mmsvit.datasets.inspection import inspect_data
from mmsvit.datasets.quick_checks import check_data

EVALUATION_DAMAGES = {
    # cocodataset/cocoapi 507: id 0 means no match
    'id 0': (lambda ann: ann.update(id=0), 'id 0'),
    'id as text': (lambda ann: ann.update(id='1'), 'id 0'),
    # cocodataset/cocoapi 374
    'no iscrowd': (lambda ann: ann.pop('iscrowd'), 'without iscrowd'),
    # jsbroks/coco-annotator 169
    'a point': (lambda ann: ann.update(segmentation=[[3, 3]]), 'cannot read'),
    'nothing': (lambda ann: ann.update(segmentation=[[]]), 'cannot read'),
    'a line before a polygon': (lambda ann: ann.update(segmentation=[LINE, TRIANGLE]), 'cannot'),
    'no mask': (lambda ann: ann.pop('segmentation'), 'cannot read'),
}


@pytest.mark.parametrize('name', EVALUATION_DAMAGES)
def test_what_evaluation_would_fail_on_is_refused_before_training(damaged, name):
    change, message = EVALUATION_DAMAGES[name]
    file = damaged / 'annotations' / 'instances_val.json'
    content = json.loads(file.read_text())
    change(content['annotations'][1])
    file.write_text(json.dumps(content))
    cfg = detection_config(damaged)
    with pytest.raises(ValueError, match=f'{message}|have no segmentation'):
        check_data(cfg, ('val',))
    report = inspect_data(cfg, ('val',), samples=0)
    assert any(message in problem.kind for problem in report.problems('error')), printed(report)


def test_a_line_behind_a_polygon_is_evaluated(damaged):
    file = damaged / 'annotations' / 'instances_val.json'
    content = json.loads(file.read_text())
    content['annotations'][1]['segmentation'] = [TRIANGLE, LINE]
    file.write_text(json.dumps(content))
    check_data(detection_config(damaged), ('val',))


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp('images') / 'noise')


@HOOKS.register_module()
class FullDisk(Hook):
    """From now on no line of the log fits on the disk."""

    def before_train(self, runner: Runner) -> None:
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.stream = open('/dev/full', 'w')  # noqa: SIM115, PTH123


@pytest.mark.promise(
    'Runs', 'A log that cannot be written, as on a full disk, does not end the run'
)
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='/dev/full is not installed')
def test_a_log_on_a_full_disk_is_named_once_and_the_run_goes_on(
    images, tmp_path, monkeypatch, capfd
):

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalVisBackend, '_dump', fail)
    runner = train(tmp_path, images, custom_hooks=[dict(type='FullDisk')], log_level='INFO')
    assert runner.iter == 18
    output = ''.join(capfd.readouterr())
    assert output.count('The log cannot be written') == 1 and 'Logging error' not in output


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_converting_on_a_full_disk_leaves_nothing_behind(suffix, tmp_path, monkeypatch):
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    torch.save(dict(state_dict=SViT(small_arch()).state_dict()), tmp_path / 'a.pth')

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', fail)
    monkeypatch.setattr(sys, 'argv', ['convert', f'{tmp_path}/a.pth', f'{tmp_path}/b{suffix}'])
    with pytest.raises(OSError, match='No space left'):
        import_tool('convert_checkpoint').main()
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    (tmp_path / 'report.html').write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / 'report.html') as part:
        part.write_text('half')
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


ENDLESS = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy
from mmengine.registry import TRANSFORMS

@TRANSFORMS.register_module()
class Endless:
    def __call__(self, results):
        Path(sys.argv[2], f'reading_{os.getpid()}').touch()
        os.read(os.pipe()[0], 1)

import signal
signal.signal(signal.SIGTERM, signal.SIG_DFL)
data = toy.toy_data(sys.argv[3])
data['pipeline'].insert(0, dict(type='Endless'))
changes = {'train_dataloader.dataset': data, 'train_dataloader.num_workers': int(sys.argv[4])}
toy.train(Path(sys.argv[2], 'run'), sys.argv[3], **changes)
"""


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.promise(
    'Runs', 'A second signal ends a run whatever it waits for, and its data workers'
)
@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_the_second_signal_leaves_an_image_that_is_never_read(workers, images, tmp_path):
    command = [sys.executable, '-c', ENDLESS, ROOT / 'tests', tmp_path, images, str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_until(lambda: list(tmp_path.glob('reading_*')) or process.poll() is not None)
    time.sleep(0.5)  # Until the other worker reads.
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # As torchrun repeats it.
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    readers = [int(path.name.partition('_')[2]) for path in tmp_path.glob('reading_*')]
    wait_until(lambda: not any(Path(f'/proc/{reader}').exists() for reader in readers), 10)


@pytest.mark.promise('Runs', 'A rank that is gone ends the others with a sentence')
@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_rank_is_named_by_the_other(victim, images, tmp_path):
    processes = []
    for rank in (0, 1):
        variables = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='29763', WORLD_SIZE='2')
        env = {**os.environ, **variables, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
        toy = [
            sys.executable,
            ROOT / 'tests' / 'toy.py',
            tmp_path,
            images,
            '--slow',
            '--distributed',
        ]
        processes.append(
            subprocess.Popen(toy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    wait_until(lambda: (tmp_path / 'begun_1').exists())
    processes[victim].kill()
    output = processes[1 - victim].communicate(timeout=60)[0].decode()
    assert processes[1 - victim].returncode == 1
    assert 'another rank of this run is gone' in output and '--resume' in output
    assert 'Traceback' not in output
