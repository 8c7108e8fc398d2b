"""Runs that meet another run, another config, or a kill in an evaluation."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from toy import IMAGES, evaluation, make_images, toy_config, train

from mmsvit.checkpoint import read_checkpoint
from mmsvit.checkpoint.files import newest_valid_checkpoint
from mmsvit.engine.run_record import compare

EMA = [dict(type='EMAHook', momentum=0.1)]


class Killed(Exception):
    pass


@HOOKS.register_module()
class KillIn(Hook):
    """End a run as a kill would, at a place of its n-th evaluation, or before an iteration."""

    def __init__(self, place: str, number: int = 1) -> None:
        self.place, self.left = place, number

    def _kill(self, place: str) -> None:
        self.left -= self.place == place
        if not self.left:
            raise Killed

    def before_val_epoch(self, runner: Runner) -> None:
        self._kill('evaluation')

    def before_train_iter(self, runner: Runner, *_, **__) -> None:
        self._kill('training')

    def before_train(self, runner: Runner) -> None:
        self._kill('start')


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp('images') / 'noise')


def killed(folder: Path, images: Path, place: str = 'training', number: int = 8, **changes) -> None:
    """A run that is killed; by default after its first checkpoint."""
    hooks = [*changes.pop('custom_hooks', []), dict(type='KillIn', place=place, number=number)]
    with pytest.raises(Killed):
        train(folder, images, custom_hooks=hooks, **changes)


def log_of(folder: Path) -> str:
    return ''.join(path.read_text() for path in sorted(folder.glob('*/*.log')))


@pytest.mark.promise(
    'Runs', 'A resumed run refuses settings that it would ignore, and names others that changed'
)
@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        # mmdetection 3800: the learning rate scaled for another batch size is not used
        ('auto_scale_lr', dict(enable=True, base_batch_size=16), 'auto_scale_lr: None -> 16'),
        ('train_dataloader.batch_size', 4, 'images in a step: 2 -> 4'),
        ('optim_wrapper.accumulative_counts', 2, 'images in a step: 2 -> 4'),
        ('optim_wrapper.optimizer.lr', 0.1, r'optim_wrapper\.optimizer\.lr: 0\.01 -> 0\.1'),
        ('train_cfg.max_epochs', 6, 'max_epochs: 3 -> 6'),
        ('param_scheduler', [dict(type='ConstantLR')], r'param_scheduler\.0\.type: LinearLR'),
        ('custom_hooks', EMA, 'EMA: 0 -> 1'),
    ],
)
def test_a_change_that_would_be_ignored_is_refused(key, value, message, images, tmp_path):
    killed(tmp_path, images)
    with pytest.raises(ValueError, match=rf'(?s)cannot be continued.*{message}.*--force-resume'):
        train(tmp_path, images, resume=True, **{key: value})


def test_averages_that_are_left_out_are_refused(images, tmp_path):
    killed(tmp_path, images, custom_hooks=EMA)
    with pytest.raises(ValueError, match='EMA: 1 -> 0'):
        train(tmp_path, images, resume=True)


def test_a_refused_change_can_be_forced(images, tmp_path):
    killed(tmp_path, images)
    force = {'default_hooks.run_record.force_resume': True, 'train_cfg.max_epochs': 4}
    assert train(tmp_path, images, resume=True, **force).iter == 4 * IMAGES // 2
    assert 'train_cfg.max_epochs: 3 -> 4' in log_of(tmp_path)


def test_a_change_that_is_used_is_named_and_equal_settings_are_silent(images, tmp_path):
    killed(tmp_path, images)
    killed(tmp_path, images, number=2, resume=True, **{'train_dataloader.num_workers': 1})
    assert 'changed settings' not in log_of(tmp_path)
    train(tmp_path, images, resume=True, **{'optim_wrapper.clip_grad.max_norm': 2.0})
    assert 'optim_wrapper.clip_grad.max_norm: 1.0 -> 2.0' in log_of(tmp_path)


def test_the_table_of_settings_is_what_runs_do():
    text = (ROOT / 'docs' / 'reliability.md').read_text()
    rows = re.findall(r'^\| (.*) \| (refused|named|silent) \| ', text, re.MULTILINE)
    verdicts = set()
    for settings, verdict in rows:
        for key in re.findall('`([^`]+)`', settings):
            refused, used = compare({key: '1'}, {key: '2'})
            assert (len(refused), len(used)) == (verdict == 'refused', verdict == 'named'), key
            verdicts.add(verdict)
    assert verdicts == {'refused', 'named', 'silent'}


@pytest.mark.promise('Runs', 'A work folder holds one run; another is refused, and never resumed')
def test_a_new_run_in_a_used_folder_is_refused(images, tmp_path):
    train(tmp_path, images)
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    with pytest.raises(ValueError, match=r'checkpoints of another run.*--resume.*--overwrite'):
        train(tmp_path, images)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before


def test_a_killed_run_is_resumed_among_later_checkpoints_of_another(images, tmp_path):
    train(tmp_path, images)
    overwrite = {'default_hooks.run_record.overwrite': True}
    killed(tmp_path, images, **overwrite)
    assert Path(newest_valid_checkpoint(tmp_path)).name == 'epoch_1.pth'
    assert 'epoch_3.pth' in {path.name for path in tmp_path.iterdir()}
    assert train(tmp_path, images, resume=True).iter == 3 * IMAGES // 2


def test_a_checkpoint_of_another_run_does_not_come_into_the_folder_of_mine(images, tmp_path):
    killed(tmp_path / 'mine', images)
    killed(tmp_path / 'other', images)
    before = (tmp_path / 'mine' / 'epoch_1.pth').read_bytes()
    with pytest.raises(ValueError, match='checkpoints of another run'):
        train(tmp_path / 'mine', images, resume=True, load_from=str(tmp_path / 'other/epoch_1.pth'))
    assert (tmp_path / 'mine' / 'epoch_1.pth').read_bytes() == before


@pytest.mark.promise('Runs', 'One process at a time trains in a work folder; a kill frees it')
def test_one_run_at_a_time(images, tmp_path):
    command = [sys.executable, ROOT / 'tests' / 'toy.py', tmp_path, images, '--slow']
    first = subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob('begun_*')):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        with pytest.raises(ValueError, match=f'another run is training.*process {first.pid} on'):
            train(tmp_path, images)
    finally:
        first.kill()
        first.wait()
    train(tmp_path, images, **{'default_hooks.run_record.overwrite': True})


@pytest.mark.promise('Runs', 'An evaluation that was interrupted is made when the run is resumed')
@pytest.mark.parametrize('by_epoch', [True, False])
def test_an_interrupted_evaluation_is_made(by_epoch, images, tmp_path):
    changes = {**evaluation(images), 'default_hooks.checkpoint.save_best': 'score'}
    changes['by_epoch'] = by_epoch
    if not by_epoch:
        changes['train_cfg.val_interval'] = 6
        changes['default_hooks.checkpoint.interval'] = 6
    changes['default_hooks.checkpoint.rule'] = 'greater'
    killed(tmp_path, images, 'evaluation', 3, **changes)  # the last
    best = 'epoch_2' if by_epoch else 'iter_12'
    assert [path.stem for path in tmp_path.glob('best_*')] == [f'best_score_{best}']
    train(tmp_path, images, resume=True, **changes)
    last = 'epoch_3' if by_epoch else 'iter_18'
    assert [path.stem for path in tmp_path.glob('best_*')] == [f'best_score_{last}']
    train(tmp_path, images, resume=True, **changes)
    assert log_of(tmp_path).count('The evaluation after 18 iterations is missing') == 1


def test_the_best_result_is_known_though_its_checkpoint_was_saved_before(images, tmp_path):
    changes = {**evaluation(images), 'default_hooks.checkpoint.save_best': 'score'}
    changes['default_hooks.checkpoint.rule'] = 'less'  # the first is the best
    killed(tmp_path, images, 'training', 8, **changes)
    train(tmp_path, images, resume=True, **changes)
    assert [path.stem for path in tmp_path.glob('best_*')] == ['best_score_epoch_1']


def test_a_signal_in_an_evaluation_that_is_made_up_for_ends_the_run(images, tmp_path):
    changes = evaluation(images)
    killed(tmp_path, images, 'evaluation', 3, **changes)

    class Signal(Hook):
        def before_val_iter(self, runner: Runner, *_, **__) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        runner = Runner.from_cfg(toy_config(tmp_path, images, resume=True, **changes))
        runner.register_hook(Signal())
        with pytest.raises(SystemExit) as left:
            runner.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143


@pytest.mark.parametrize('place', ['elsewhere', 'name'])
def test_older_checkpoints_are_found_wherever_the_run_writes_them(place, images, tmp_path):
    changes = {'default_hooks.checkpoint.filename_tmpl': 'mine-{:03d}.pth'}
    if place == 'elsewhere':
        changes = {'default_hooks.checkpoint.out_dir': str(tmp_path / 'elsewhere')}
    train(tmp_path / 'run', images, **changes)
    newest = Path((tmp_path / 'run' / 'last_checkpoint').read_text())
    newest.write_bytes(newest.read_bytes()[:1000])
    found = Path(newest_valid_checkpoint(tmp_path / 'run'))
    assert found.parent == newest.parent and read_checkpoint(found)['meta']['iter'] == 12
    assert train(tmp_path / 'run', images, resume=True, **changes).iter == 18


@pytest.mark.parametrize('run', ['[', '[1]', '{"id": 3, "checkpoints": 4, "evaluated": [1]}', '\0'])
def test_a_damaged_record_of_the_folder_is_passed_over(run, images, tmp_path):
    killed(tmp_path, images)
    (tmp_path / 'run.json').write_text(run)
    if '3' not in run:
        assert train(tmp_path, images, resume=True).iter == 18
    else:  # It is another run's.
        with pytest.raises(ValueError, match='another run'):
            train(tmp_path, images, resume=True, load_from=str(tmp_path / 'epoch_1.pth'))


@pytest.mark.parametrize('record', ['text', ['list'], {}, dict(id=3, settings=[])])
def test_a_damaged_record_of_a_checkpoint_does_no_harm(record, images, tmp_path):
    killed(tmp_path, images)
    (tmp_path / 'run.json').unlink()
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    checkpoint['meta']['run'] = record
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    assert train(tmp_path, images, resume=True).iter == 18


def test_what_a_run_is_stands_in_its_folder_and_its_checkpoints(images, tmp_path):
    train(tmp_path, images, **evaluation(images))
    folder = json.loads((tmp_path / 'run.json').read_text())
    stored = read_checkpoint(tmp_path / 'epoch_2.pth')['meta']['run']
    assert stored == {key: folder[key] for key in stored} and len(stored['id']) == 32
    expected = {'images in a step': '2', 'training images': '12', 'randomness.seed': '0'}
    assert expected.items() <= stored['settings'].items()
    assert stored['settings']['version of torch'] == torch.__version__
    assert list(folder['evaluated']) == ['6', '12', '18']


def test_a_run_without_a_checkpoint_hook_is_told_what_to_set(images, tmp_path):
    with pytest.raises(ValueError, match=r'default_hooks.checkpoint is None.*run_record=None'):
        train(tmp_path / 'run', images, default_hooks=dict(checkpoint=None))
