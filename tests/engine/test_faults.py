"""Runs that are killed, stopped, or fed with damage; see docs/reliability.md."""

from __future__ import annotations

import errno
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image
from toy import (
    BATCH,
    EPOCHS,
    IMAGES,
    ToyPack,
    assert_same_weights,
    evaluation,
    make_images,
    toy_config,
    toy_data,
    train,
)

import mmsvit.checkpoint
from mmsvit.checkpoint import UnsafeCheckpointError, read_checkpoint
from mmsvit.checkpoint.files import AtomicLocalBackend, newest_valid_checkpoint
from mmsvit.engine.hooks.bad_samples_hook import GuardedPipeline, refuse_truncated
from mmsvit.engine.hooks.exact_resume_hook import SeededBatchSampler
from mmsvit.engine.hooks.safe_checkpoint_hook import SafeCheckpointHook

ITERATIONS = EPOCHS * IMAGES // BATCH
HANGING = 300  # Seconds after which processes do not go on.


class Killed(Exception):
    pass


@HOOKS.register_module()
class DieAt(Hook):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Runner, *_, **__) -> None:
        if runner.iter == self.iteration:
            raise Killed


@HOOKS.register_module()
class SendSignal(Hook):
    def __init__(self, iteration: int, number: int) -> None:
        self.iteration, self.number = iteration, number

    def before_train_iter(self, runner: Runner, *_, **__) -> None:
        if runner.iter == self.iteration:
            os.kill(os.getpid(), self.number)


@HOOKS.register_module()
class GradientsInHalf(Hook):
    """Let gradients overflow above 65504, as float16's do."""

    def before_train(self, runner: Runner) -> None:
        runner.model.backbone.stages[1].register_forward_hook(self.narrow)

    def narrow(self, module: object, inputs: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient.half().to(gradient.dtype))


@pytest.fixture(scope='module', autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are compared with runs in this one: threads move last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp('images') / 'noise')


@pytest.fixture(scope='module')
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
    train(folder, images)
    return folder


def log_of(folder: Path) -> str:
    return ''.join(path.read_text() for path in sorted(folder.glob('*/*.log')))


def toy(folder: Path, images: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / 'tests' / 'toy.py', folder, images, *options]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_two(folder: Path, images: Path, *options: str) -> list[subprocess.Popen]:
    """The two processes of a distributed run."""
    command = [sys.executable, ROOT / 'tests' / 'toy.py', folder, images, '--distributed']
    return start_in(('.', '.'), [*command, *options])


def start_in(folders: Sequence[str | Path], command: list) -> list[subprocess.Popen]:
    """The processes of a distributed run, each in a folder."""
    env = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), OMP_NUM_THREADS='1')
    env.update(WORLD_SIZE=str(len(folders)), PYTHONPATH=str(ROOT / 'tests'))
    env['PYTHONFAULTHANDLER'] = '1'  # For end_of.
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**env, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def end_of(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Their exit statuses and what they say; those that hang say where, and end with -SIGABRT."""
    patience = threading.Timer(HANGING, lambda: [p.send_signal(signal.SIGABRT) for p in processes])
    patience.start()
    try:
        with ThreadPoolExecutor() as pool:  # At once: who writes to a full pipe waits.
            said = list(pool.map(lambda process: process.communicate()[1], processes))
    finally:
        patience.cancel()
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


# --- killed and resumed -------------------------------------------------------------------


@pytest.mark.promise(
    'Runs',
    'A resumed run ends in the same weights, with EMA, gradient accumulation and data workers',
    '4 of 4, within 1e-6',
)
@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_resumes_exactly(by_epoch, workers, images, tmp_path):
    changes = {'by_epoch': by_epoch, 'train_dataloader.num_workers': workers}
    # Averages and gradient accumulation have states of their own.
    changes['optim_wrapper.accumulative_counts'] = 2
    ema = dict(type='EMAHook', momentum=0.1)
    train(tmp_path / 'whole', images, custom_hooks=[ema], **changes)
    with pytest.raises(Killed):
        train(
            tmp_path / 'killed',
            images,
            custom_hooks=[ema, dict(type='DieAt', iteration=9)],
            **changes,
        )
    runner = train(tmp_path / 'killed', images, custom_hooks=[ema], resume=True, **changes)
    assert 'Auto resumed' not in log_of(tmp_path / 'killed')  # It was chosen by us.
    assert runner.iter == ITERATIONS
    assert_same_weights(tmp_path / 'whole', tmp_path / 'killed')


@pytest.mark.promise('Runs', 'A resumed run ends in the same weights without a seed in the config')
def test_resumes_exactly_without_a_seed(images, tmp_path):
    with pytest.raises(Killed):
        train(
            tmp_path / 'a',
            images,
            randomness=dict(seed=None),
            custom_hooks=[dict(type='DieAt', iteration=9)],
        )
    seed = read_checkpoint(tmp_path / 'a' / 'epoch_1.pth')['meta']['seed']
    train(tmp_path / 'a', images, randomness=dict(seed=None), resume=True)
    train(tmp_path / 'b', images, randomness=dict(seed=seed))
    assert_same_weights(tmp_path / 'a', tmp_path / 'b')


@pytest.mark.promise(
    'Runs',
    'The number of data workers does not change the result',
    '0 and 2 workers, within 1e-6',
)
def test_data_workers_do_not_change_what_is_learned(images, uninterrupted, tmp_path):
    train(tmp_path, images, **{'train_dataloader.num_workers': 2})
    assert_same_weights(uninterrupted, tmp_path)


@pytest.mark.promise(
    'Runs',
    'Every iteration, sample and model gets its own random numbers',
    '36 samples and 18 iterations, no two the same',
)
def test_other_iterations_have_other_randomness(images, tmp_path):
    seen = []

    @HOOKS.register_module(force=True)
    class Watch(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
            paths = [sample.img_id for sample in data_batch['data_samples']]
            seen.extend(zip(paths, [float(image.sum()) for image in data_batch['inputs']]))
            seen.append(float(torch.rand(())))

    train(tmp_path, images, custom_hooks=[dict(type='Watch')])
    assert len(set(seen)) == len(seen) == EPOCHS * IMAGES + ITERATIONS


@pytest.mark.promise('Runs', 'Every iteration, sample and model gets its own random numbers')
def test_samples_and_the_model_have_other_randomness(images, tmp_path):
    drawn = []

    class Draw(ToyPack):
        def __call__(self, results: dict) -> dict:
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))
            return super().__call__(results)

    @HOOKS.register_module(force=True)
    class WatchModel(Hook):
        def before_train_iter(self, runner: Runner, *_, **__) -> None:
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))

    data = toy_data(images)
    data['pipeline'][-1] = dict(type=Draw)
    data['pipeline'] = [data['pipeline'][0], data['pipeline'][-1]]  # The first draw of each.
    changes = {'train_dataloader.dataset': data}
    train(tmp_path, images, custom_hooks=[dict(type='WatchModel')], **changes)
    for values in zip(*drawn):
        assert len(set(values)) == len(values) == EPOCHS * IMAGES + ITERATIONS


@pytest.mark.promise(
    'Runs',
    'A run killed while it writes a checkpoint resumes and ends in the same weights',
    'the first and the second checkpoint, 2 of 2',
)
@pytest.mark.slow
def test_killed_in_the_middle_of_writing_a_checkpoint(images, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    for number, files in ((1, []), (2, ['epoch_1.pth'])):
        process = toy(folder, images, '--die-in-write', str(number))
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode == -signal.SIGKILL, output
        assert sorted(path.name for path in folder.glob('*.pth')) == files
        assert list(folder.glob('*.partial'))
        for file in files:
            read_checkpoint(folder / file)
    train(folder, images, resume=True)
    assert_same_weights(uninterrupted, folder)


# --- checkpoints --------------------------------------------------------------------------


@pytest.mark.promise(
    'Runs',
    'A full disk at a checkpoint ends the run with a message; the previous checkpoint and '
    '`last_checkpoint` stay',
)
def test_a_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    changes = {'default_hooks.checkpoint.max_keep_ckpts': 1}
    with pytest.raises(Killed):
        train(tmp_path, images, custom_hooks=[dict(type='DieAt', iteration=7)], **changes)
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    with monkeypatch.context() as context:
        context.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match=r'epoch_2\.pth.*No space left.*--resume'):
            train(tmp_path, images, resume=True, **changes)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    assert not list(tmp_path.glob('*.partial')) and not (tmp_path / 'epoch_2.pth').exists()
    train(tmp_path, images, resume=True, **changes)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_3.pth']


def run_tool(
    monkeypatch: pytest.MonkeyPatch, folder: Path, work_dir: Path, images: Path, *options: str
) -> None:
    """tools/train.py as a whole, on the toy's config, in this process."""
    toy_config(work_dir, images).dump(folder / 'toy.py')
    arguments = ['train.py', str(folder / 'toy.py'), '--work-dir', str(work_dir), *options]
    arguments.append('--debug')  # the error, not its sentence
    monkeypatch.setattr(sys, 'argv', arguments)
    runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')


@pytest.mark.promise(
    'Runs',
    'A work folder that is read-only or cannot be created is refused before training',
)
def test_a_run_that_cannot_write_ends_before_training(images, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'cannot write to the folder.*file/run.*--work-dir'):
        run_tool(monkeypatch, tmp_path, tmp_path / 'file' / 'run', images)


def mount(*arguments: str | Path) -> None:
    if subprocess.run(['mount', *arguments], check=False).returncode:
        pytest.skip('may not mount')


@pytest.mark.promise(
    'Runs',
    'A full disk at a checkpoint ends the run with a message; the previous checkpoint and '
    '`last_checkpoint` stay',
    'passed; then resumed to the same weights',
)
@pytest.mark.promise(
    'Runs',
    'A work folder that is read-only or cannot be created is refused before training',
)
@pytest.mark.skipif(os.geteuid() != 0, reason='needs to mount a small file system')
def test_a_run_on_a_small_disk(uninterrupted, images, tmp_path, monkeypatch):
    """One checkpoint fits, the second does not; then the disk is read-only, then large."""
    work_dir, read_only = tmp_path / 'disk', tmp_path / 'read_only'
    work_dir.mkdir()
    read_only.mkdir()
    size = f'size={int(1.7 * (uninterrupted / "epoch_1.pth").stat().st_size)}'
    mount('-t', 'tmpfs', '-o', size, 'tmpfs', work_dir)
    try:
        with pytest.raises(OSError, match=r'epoch_2\.pth.*No space left.*--resume'):
            run_tool(monkeypatch, tmp_path, work_dir, images)
        assert [path.name for path in work_dir.glob('*.p*[hl]')] == ['epoch_1.pth']
        assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'epoch_1.pth')
        assert newest_valid_checkpoint(work_dir) == str(work_dir / 'epoch_1.pth')
        mount('--bind', work_dir, read_only)
        try:
            mount('-o', 'remount,bind,ro', read_only)
            with pytest.raises(OSError, match=r'Read-only file system.*--work-dir'):
                run_tool(monkeypatch, tmp_path, read_only, images, '--resume')
        finally:
            subprocess.run(['umount', read_only], check=True)
        mount('-o', 'remount,size=100m', work_dir)
        run_tool(monkeypatch, tmp_path, work_dir, images, '--resume')
        assert_same_weights(uninterrupted, work_dir)
    finally:
        subprocess.run(['umount', '--lazy', work_dir], check=True)  # Logs in it are open.


@pytest.mark.promise('Runs', 'A new checkpoint is complete before an old one is removed')
def test_a_new_checkpoint_is_whole_before_an_old_one_goes(images, tmp_path, monkeypatch):
    removed = []

    def remove(self: SafeCheckpointHook, names: set[str]) -> None:
        assert Path(newest_valid_checkpoint(tmp_path)).name not in names
        removed.extend(names)
        original(self, names)

    original = SafeCheckpointHook._remove
    monkeypatch.setattr(SafeCheckpointHook, '_remove', remove)
    train(tmp_path, images, **{'default_hooks.checkpoint.max_keep_ckpts': 1})
    assert removed == ['epoch_1.pth', 'epoch_2.pth']
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['epoch_3.pth']


@pytest.mark.promise(
    'Runs',
    'If checkpoints are truncated, bit-flipped, empty or missing, the latest valid one is '
    'used, or the error is clear',
    '4 of 4',
)
@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'missing', 'empty'])
def test_resumes_from_the_newest_whole_checkpoint(damage, uninterrupted, images, tmp_path):
    for file in uninterrupted.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    newest = tmp_path / 'epoch_3.pth'
    content = newest.read_bytes()
    if damage == 'truncated':
        newest.write_bytes(content[: len(content) // 2])
    elif damage == 'flipped':
        weights = max(torch.load(newest)['state_dict'].values(), key=torch.numel)
        place = content.index(weights.numpy().tobytes()) + 5
        newest.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        torch.load(newest, weights_only=False)  # torch sees nothing.
        with pytest.raises(ValueError, match='checksum'):
            read_checkpoint(newest)
    elif damage == 'missing':
        newest.unlink()
    else:
        newest.write_bytes(b'')
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    assert newest_valid_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    train(tmp_path, images, resume=True)
    assert_same_weights(uninterrupted, tmp_path)
    for file in tmp_path.glob('epoch_*.pth'):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r'no valid checkpoint[\s\S]*epoch_1.pth'):
        newest_valid_checkpoint(tmp_path)


@pytest.mark.promise('Runs', 'A copied work folder resumes from itself')
def test_a_copied_folder_is_resumed_from_itself(uninterrupted, tmp_path):
    copy, empty = tmp_path / 'copy', tmp_path / 'empty'
    shutil.copytree(uninterrupted, copy)
    assert newest_valid_checkpoint(copy) == str(copy / 'epoch_3.pth')
    (copy / 'epoch_3.pth').unlink()
    assert newest_valid_checkpoint(copy) == str(copy / 'epoch_2.pth')
    # As where the checkpoint hook has an out_dir.
    empty.mkdir()
    shutil.copy(uninterrupted / 'last_checkpoint', empty)
    assert newest_valid_checkpoint(empty) == str(uninterrupted / 'epoch_3.pth')


@pytest.mark.promise(
    'Runs',
    'A flipped bit is detected; whatever the damage, the message names the file',
    '300 flips: none changes a weight unseen; 400 damaged files',
)
def test_every_flipped_bit_that_matters_is_seen(tmp_path):
    torch.save({'state_dict': {'a': torch.arange(100.0)}, 'meta': {}}, tmp_path / 'whole.pth')
    content = (tmp_path / 'whole.pth').read_bytes()
    whole = read_checkpoint(tmp_path / 'whole.pth')['state_dict']['a']
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 300):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / 'damaged.pth').write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / 'damaged.pth')
        except ValueError:
            continue
        assert torch.equal(found['state_dict']['a'], whole)  # It was in the padding.


@pytest.mark.promise(
    'Runs',
    'A flipped bit is detected; whatever the damage, the message names the file',
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_whatever_the_damage_the_file_is_named(tmp_path):
    """Also where there are no checksums: in torch's older format, and in what is no checkpoint."""
    file, rng = tmp_path / 'damaged.pth', np.random.default_rng(0)
    torch.save({'a': torch.arange(9.0)}, file, _use_new_zipfile_serialization=False)
    older, errors = file.read_bytes(), []
    for i in range(400):
        content = bytearray(older if i % 2 else rng.bytes(100))
        content[rng.integers(len(content))] = rng.integers(256)
        file.write_bytes(content[: rng.integers(len(content))] if i % 4 == 3 else content)
        try:
            read_checkpoint(file)
        except ValueError as error:
            errors.append(error)
    assert len(errors) > 200 and all('damaged.pth' in str(error) for error in errors)
    assert len({type(error.__cause__) for error in errors}) > 1


@pytest.mark.promise(
    'Safety',
    'Automatic resumption runs no code: one such file in the work folder, of any age, stops it',
    'older and newer than a valid one',
)
@pytest.mark.parametrize('name', ['epoch_1.pth', 'epoch_3.pth'])
def test_automatic_resumption_runs_no_code(name, uninterrupted, images, tmp_path, monkeypatch):
    for file in uninterrupted.glob('epoch_[12].pth'):
        shutil.copy(file, tmp_path)
    checkpoint = read_checkpoint(uninterrupted / name)

    class Evil:
        def __reduce__(self):
            return os.makedirs, (str(tmp_path / 'was_here'), 0o777, True)

    checkpoint['meta']['evil'] = Evil()
    torch.save(checkpoint, tmp_path / name)
    # Older or newer than one that could be used: it is no damage, and is not passed over.
    with pytest.raises(
        UnsafeCheckpointError, match=rf'{name}.*is refused.*makedirs.*move it out of'
    ):
        train(tmp_path, images, resume=True)
    assert not (tmp_path / 'was_here').exists()
    if name == 'epoch_3.pth':
        monkeypatch.setattr(mmsvit.checkpoint.reading, '_trusted', True)
        assert newest_valid_checkpoint(tmp_path) == str(tmp_path / name)
        assert (tmp_path / 'was_here').exists()


@pytest.mark.promise(
    'Runs',
    'If checkpoints are truncated, bit-flipped, empty or missing, the latest valid one is '
    'used, or the error is clear',
)
def test_a_checkpoint_of_torch_before_zip_files_is_resumed_from(uninterrupted, tmp_path):
    checkpoint = read_checkpoint(uninterrupted / 'epoch_2.pth')
    torch.save(checkpoint, tmp_path / 'epoch_2.pth', _use_new_zipfile_serialization=False)
    assert newest_valid_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')


@pytest.mark.promise('Runs', 'Weights that are not finite are never saved')
def test_weights_that_are_not_finite_are_not_saved(images, tmp_path):
    @HOOKS.register_module(force=True)
    class Ruin(Hook):
        def before_train_iter(self, runner: Runner, *_, **__) -> None:
            if runner.iter == 11:
                runner.model.head.weight.data[0, 3] = float('nan')

    hooks = {'default_hooks.non_finite': None}
    with pytest.raises(
        FloatingPointError, match=r'is not finite after 12 iterations.*epoch_1\.pth'
    ):
        train(tmp_path, images, custom_hooks=[dict(type='Ruin')], **hooks)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']


@pytest.mark.promise('Runs', 'What a work folder says that makes no sense is named and passed over')
@pytest.mark.parametrize(
    'last', [b'\xff\xfe', b'x' * 5000, b'a\0b', b'', b'/nowhere/epoch_9.pth'], ids=repr
)
def test_a_last_checkpoint_that_names_nothing_is_passed_over(last, uninterrupted, tmp_path):
    shutil.copy(uninterrupted / 'epoch_2.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_bytes(last)
    assert newest_valid_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')


@pytest.mark.promise('Runs', 'What a work folder says that makes no sense is named and passed over')
@pytest.mark.parametrize('done', ['9', None, float('nan'), 10**30, -1, True, 9.0])
def test_a_checkpoint_with_nonsense_for_iterations_is_passed_over(done, uninterrupted, tmp_path):
    checkpoint = read_checkpoint(uninterrupted / 'epoch_1.pth')
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    checkpoint['meta']['iter'] = done
    torch.save(checkpoint, tmp_path / 'epoch_2.pth')
    assert newest_valid_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_1.pth').unlink()
    with pytest.raises(ValueError, match=r'epoch_2\.pth: .*iter and meta\.epoch must be whole'):
        newest_valid_checkpoint(tmp_path)


def test_two_writers_of_one_file_leave_a_whole_one(tmp_path):
    contents = [bytes([i]) * 2**20 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            AtomicLocalBackend().put(content, tmp_path / 'epoch_1.pth')

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / 'epoch_1.pth').read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ['epoch_1.pth']


@pytest.mark.promise('Safety', 'A resumed checkpoint cannot name files that the run removes')
@pytest.mark.parametrize('key', ['checkpoint_between', 'keep_ckpt_ids', 'best_ckpt'])
def test_a_checkpoint_cannot_have_other_files_removed(key, images, uninterrupted, tmp_path):
    victims = [tmp_path / 'victim.pth', tmp_path / 'epoch_0' / 'x' / 'victim.pth']
    for victim in victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text('mine')
    checkpoint = torch.load(uninterrupted / 'epoch_1.pth', weights_only=False)
    names = {
        'checkpoint_between': '../victim.pth',
        'keep_ckpt_ids': ['0/x/../../../victim', '/../../epoch_0', 0],
        'best_ckpt': str(victims[0]),
    }
    info = checkpoint['message_hub']['runtime_info']
    info.update({key: names[key], 'best_score': -1.0})
    run = tmp_path / 'run'
    run.mkdir()
    torch.save(checkpoint, run / 'epoch_1.pth')
    changes = {'default_hooks.checkpoint.max_keep_ckpts': 1}
    if key == 'best_ckpt':
        best = dict(save_best='score', rule='greater', published_keys=['state_dict'])
        changes.update({f'default_hooks.checkpoint.{k}': value for k, value in best.items()})
        changes.update(evaluation(images))
    train(run, images, resume=True, **changes)
    assert all(victim.read_text() == 'mine' for victim in victims)
    if key != 'best_ckpt':
        assert f'{key} of the checkpoint is ignored' in log_of(run)


# --- signals ------------------------------------------------------------------------------


@pytest.mark.promise(
    'Runs',
    'SIGTERM, Ctrl-C and SIGHUP save a checkpoint and exit with 143, 130 and 129',
    '9 of 9, with data workers of training and of evaluation',
)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize('iteration', [3, 5, 9])  # in an epoch, at its end, in the next
def test_a_signal_saves_and_leaves(number, iteration, images, uninterrupted, tmp_path):
    hook = dict(type='SendSignal', iteration=iteration, number=int(number))
    before = listen(number)
    try:
        with pytest.raises(SystemExit) as left:
            train(tmp_path, images, custom_hooks=[hook])
    finally:
        signal.signal(number, before)
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[number]
    assert left.value.code == 128 + number == expected
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / f'iter_{iteration + 1}.pth')
    runner = train(tmp_path, images, resume=True)
    assert runner.iter == ITERATIONS
    assert_same_weights(uninterrupted, tmp_path)
    assert not list(tmp_path.glob('iter_*.pth'))  # An epoch's has replaced it.


def test_a_signal_that_is_ignored_stays_ignored(images, tmp_path):
    """As nohup starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hook = dict(type='SendSignal', iteration=3, number=int(signal.SIGHUP))
        assert train(tmp_path, images, custom_hooks=[hook]).iter == ITERATIONS
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def listen(number: int) -> object:
    """Undo that a signal is ignored, as under nohup; what it did before."""
    default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    return signal.signal(number, default)


def stop_after(iteration: int, folder: Path, images: Path, **changes: object) -> None:
    """Train up to where SIGTERM comes."""
    hook = dict(type='SendSignal', iteration=iteration - 1, number=int(signal.SIGTERM))
    before = listen(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            train(folder, images, custom_hooks=[hook], **changes)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.promise(
    'Runs',
    'A checkpoint saved by a signal replaces the one before; a run resumed in another folder '
    'leaves the first folder alone',
)
def test_two_stops_in_an_epoch_leave_one_checkpoint(images, uninterrupted, tmp_path):
    stop_after(2, tmp_path, images)
    stop_after(4, tmp_path, images, resume=True)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_4.pth']
    train(tmp_path, images, resume=True)
    assert not list(tmp_path.glob('iter_*.pth'))
    assert_same_weights(uninterrupted, tmp_path)


@pytest.mark.promise(
    'Runs',
    'A checkpoint saved by a signal replaces the one before; a run resumed in another folder '
    'leaves the first folder alone',
)
def test_a_run_that_goes_on_elsewhere_leaves_the_first_folder_alone(images, tmp_path):
    changes = {**evaluation(images), 'default_hooks.checkpoint.save_best': 'score'}
    changes['default_hooks.checkpoint.rule'] = 'greater'
    changes['default_hooks.checkpoint.max_keep_ckpts'] = 1
    first, second = tmp_path / 'first', tmp_path / 'second'
    stop_after(8, first, images, **changes)
    files = ['best_score_epoch_1.pth', 'epoch_1.pth', 'iter_8.pth']
    assert sorted(path.name for path in first.glob('*.pth')) == files
    train(second, images, resume=True, load_from=str(first / 'iter_8.pth'), **changes)
    assert sorted(path.name for path in first.glob('*.pth')) == files
    files = ['best_score_epoch_3.pth', 'epoch_3.pth']
    assert sorted(path.name for path in second.glob('*.pth')) == files


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f'{path} did not appear')


@pytest.mark.promise(
    'Runs', 'SIGTERM, Ctrl-C and SIGHUP save a checkpoint and exit with 143, 130 and 129'
)
@pytest.mark.slow
def test_a_signal_to_the_whole_process_group(images, uninterrupted, tmp_path):
    process = toy(tmp_path, images, '--slow', '--workers', '2')  # in a session of its own
    wait_for(tmp_path / 'begun_1')
    os.killpg(process.pid, signal.SIGTERM)  # Its data workers get it, too.
    assert process.wait(60) == 143
    train(tmp_path, images, resume=True)
    assert_same_weights(uninterrupted, tmp_path)


@pytest.mark.promise(
    'Runs', 'SIGTERM, Ctrl-C and SIGHUP save a checkpoint and exit with 143, 130 and 129'
)
@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_in_evaluation(images, uninterrupted, tmp_path):
    process = toy(tmp_path, images, '--slow', '--workers', '2', '--evaluate', '--interval', '2')
    wait_for(tmp_path / 'evaluating')
    os.killpg(process.pid, signal.SIGTERM)
    # Nothing was saved before the evaluation, so that it has to come to its end.
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 143, output
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_7.pth']
    train(tmp_path, images, resume=True)
    assert_same_weights(uninterrupted, tmp_path)


@pytest.mark.promise(
    'Runs',
    'All ranks stop at the same iteration',
    '2 processes; resumed to the same weights',
)
@pytest.mark.slow
def test_all_processes_stop_at_the_same_iteration(images, tmp_path):
    folder, whole = tmp_path / 'stopped', tmp_path / 'whole'
    processes = start_two(folder, images, '--slow')
    others = start_two(whole, images)
    wait_for(folder / 'begun_1')
    processes[1].send_signal(signal.SIGTERM)  # One of them.
    assert end_of(processes)[0] == [143, 143]
    assert end_of(others)[0] == [0, 0]
    assert end_of(start_two(folder, images))[0] == [0, 0]
    assert_same_weights(whole, folder)


@pytest.mark.promise(
    'Runs',
    'All ranks evaluate what is saved, batch norm statistics included',
    '2 processes, with and without averaged weights',
)
@pytest.mark.slow
@pytest.mark.parametrize('average', [False, True])
def test_what_is_saved_is_what_was_evaluated(average, images, tmp_path):
    options = ['--evaluate', '--note-evaluated', *['--average'] * average]
    codes, said = end_of(start_two(tmp_path, images, *options))
    assert codes == [0, 0], said
    for epoch in (1, 2, 3):
        saved = torch.load(tmp_path / f'epoch_{epoch}.pth', weights_only=True)
        saved = saved['state_dict']
        for rank in (0, 1):
            path = tmp_path / f'evaluated_{epoch * IMAGES // BATCH // 2}_{rank}.pth'
            evaluated = torch.load(path, weights_only=True)
            assert evaluated.keys() == saved.keys()
            assert all(torch.equal(evaluated[key], saved[key]) for key in saved), (epoch, rank)


@pytest.mark.promise(
    'Runs',
    'Ranks that disagree on the checkpoint to resume from all stop with a message',
    '2 processes, of which one has a checkpoint',
)
@pytest.mark.slow
def test_processes_that_would_begin_at_different_places_stop(images, tmp_path):
    """Two machines without a common disk, of which one has a checkpoint."""
    machines = tmp_path / 'one', tmp_path / 'other'
    stop_after(2, machines[0] / 'run', images)
    machines[1].mkdir()
    config = toy_config(Path('run'), images, custom_imports=dict(imports=['toy']))
    config.dump(tmp_path / 'toy.py')
    command = [sys.executable, ROOT / 'tools' / 'train.py', tmp_path / 'toy.py', '--resume']
    codes, said = end_of(start_in(machines, [*command, '--launcher', 'pytorch']))
    assert codes == [1, 1], said
    for report in said:
        assert "rank 0 resumes from 'iter_2.pth', rank 1 starts from scratch" in report
    assert not list(machines[1].glob('run/*.pth'))


# --- NaN and infinity ---------------------------------------------------------------------


@pytest.mark.promise(
    'Runs',
    'NaN and infinity stop the run, naming iteration, images, loss terms, gradient norm and '
    'module; the last checkpoint is good',
    'forward and backward',
)
@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_nan_stops_the_run_with_a_report(where, images, tmp_path):
    poison = dict(type='Poison', iterations=[8], where=where)
    with pytest.raises(FloatingPointError) as stopped:
        train(tmp_path, images, custom_hooks=[poison])
    report = str(stopped.value)
    assert 'at iteration 9 (epoch 2)' in report and report.count(str(images)) == BATCH
    assert 'loss_mean' in report and 'loss_size' in report and 'gradient norm: ' in report
    culprit = {'forward': 'output of backbone.stages.1 (', 'backward': 'backbone.stages.1.'}[where]
    assert culprit in report
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']


@pytest.mark.promise(
    'Runs',
    'If the config says so, steps with NaN or infinity are skipped, up to a limit',
    'with and without accumulation',
)
@pytest.mark.parametrize('accumulate', [1, 2])
def test_nan_is_skipped(accumulate, images, tmp_path):
    poison = dict(type='Poison', iterations=[8, 9])
    hooks = {'default_hooks.non_finite.action': 'skip'}
    hooks['optim_wrapper.accumulative_counts'] = accumulate
    weights = []

    @HOOKS.register_module(force=True)
    class Note(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner: Runner, *_, **__) -> None:
            weights.append({k: v.clone() for k, v in runner.model.state_dict().items()})

    runner = train(tmp_path, images, custom_hooks=[poison, dict(type='Note')], **hooks)
    assert log_of(tmp_path).count('Skipped: ') == 2 // accumulate
    for key, value in weights[7].items():  # Running statistics as well.
        assert torch.equal(weights[9][key], value), key
    assert any(not torch.equal(weights[11][key], value) for key, value in weights[9].items())
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())


@pytest.mark.promise(
    'Runs', 'If the config says so, steps with NaN or infinity are skipped, up to a limit'
)
def test_nan_for_ever_is_not_skipped(images, tmp_path):
    poison = dict(type='Poison', iterations=list(range(6, 18)))
    hooks = dict(action='skip', max_consecutive=3, type='mmsvit.NonFiniteHook')
    with pytest.raises(FloatingPointError, match='at iteration 10 '):
        train(tmp_path, images, custom_hooks=[poison], **{'default_hooks.non_finite': hooks})


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Changes to train with a GradScaler, which MMEngine's wrapper allows on GPUs alone."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    return {
        'custom_hooks': [dict(type='GradientsInHalf')],
        'optim_wrapper.type': 'AmpOptimWrapper',
        'optim_wrapper.dtype': 'bfloat16',
        'optim_wrapper.loss_scale': dict(init_scale=2.0**24),
    }


@pytest.mark.promise(
    'Runs',
    'Steps that `GradScaler` skips while it searches its scale are no failures; NaN under it,'
    ' and an endless search, are',
    "torch's scaler on the CPU, with and without clipping and fused AdamW: 5 of 5",
)
@pytest.mark.parametrize(('clip', 'fused'), [(True, False), (False, False), (False, True)])
def test_a_scaler_finds_its_scale_and_nan_is_reported(clip, fused, scaled, images, tmp_path):
    scaled['custom_hooks'].append(dict(type='Poison', iterations=[14]))
    scaled['optim_wrapper.optimizer.fused'] = fused
    if not clip:  # With it, MMEngine unscales the gradients before the scaler would.
        scaled['optim_wrapper.clip_grad'] = None
    with pytest.raises(FloatingPointError, match=r'at iteration 15 ') as stopped:
        train(tmp_path, images, **scaled)
    assert 'output of backbone.stages.1 (' in str(stopped.value)
    assert log_of(tmp_path).count('not finite') == 0  # Nothing was reported before.
    optimizer = read_checkpoint(tmp_path / 'epoch_2.pth')['optimizer']
    assert 1 < optimizer['loss_scaler']['scale'] < 2**24
    assert 0 < optimizer['state'][0]['step'] < 12  # Some were skipped, others taken.


@pytest.mark.promise(
    'Runs',
    'Steps that `GradScaler` skips while it searches its scale are no failures; NaN under it,'
    ' and an endless search, are',
)
@pytest.mark.parametrize('fused', [False, True])
def test_a_scaler_that_finds_no_scale_ends_the_run(fused, scaled, images, tmp_path):
    scaled['optim_wrapper.optimizer.fused'] = fused
    scaled['optim_wrapper.loss_scale'] = dict(init_scale=2.0**100)
    scaled['default_hooks.non_finite.max_scaler_skips'] = 3
    with pytest.raises(FloatingPointError, match='GradScaler skipped 4 steps in a row'):
        train(tmp_path, images, **scaled)


@pytest.mark.promise(
    'Runs',
    'Gradients are checked before clipping, which hides infinite ones; the reported norm is '
    'the one before clipping',
)
def test_the_norm_of_a_report_is_that_before_clipping(images, tmp_path):
    poison = dict(type='Poison', iterations=[8], where='loss')  # Its gradients are finite.
    with pytest.raises(FloatingPointError) as stopped:
        train(
            tmp_path,
            images,
            custom_hooks=[poison],
            **{'optim_wrapper.clip_grad.max_norm': 1e-3},
        )
    expected = MessageHub.get_current_instance().get_scalar('train/grad_norm').current()
    assert expected > 0.01 and f'gradient norm: {expected:.4g}\n' in str(stopped.value)


@pytest.mark.promise(
    'Runs',
    'Gradients are checked before clipping, which hides infinite ones; the reported norm is '
    'the one before clipping',
    "clipped by norm, by value and not at all, with and without torch's scaler on the CPU: 6 of 6",
)
@pytest.mark.parametrize(
    'clip', [None, dict(max_norm=1.0), dict(type='value', clip_value=1.0)], ids=str
)
@pytest.mark.parametrize('amp', [False, True])
def test_gradients_too_large_for_a_norm_are_seen(amp, clip, scaled, images, tmp_path):
    changes = {**scaled, 'optim_wrapper.loss_scale': dict(init_scale=8.0)} if amp else {}
    changes['optim_wrapper.clip_grad'] = clip and dict(_delete_=True, **clip)
    changes['custom_hooks'] = [dict(type='Poison', iterations=[8], where='norm')]
    with pytest.raises(FloatingPointError) as stopped:
        train(tmp_path, images, **changes)
    report = str(stopped.value)
    assert 'at iteration 9 ' in report and 'gradient norm: inf\n' in report
    assert 'first in: no single gradient' in report


@pytest.mark.promise(
    'Runs',
    'If one rank has NaN or infinity, all ranks skip or stop at the same step',
    '2 processes',
)
@pytest.mark.slow
def test_nan_on_one_process_is_skipped_and_stopped_at_on_all(images, tmp_path):
    # Three iterations to an epoch. One skipped step may stand alone, two in a row end the run.
    codes, reports = end_of(start_two(tmp_path, images, '--poison', '3', '6', '7'))
    assert codes == [1, 1], reports
    for report in reports:
        assert 'not finite at iteration 8 (epoch 3)' in report
    assert 'nothing on this rank' in reports[0]
    assert 'a loss; the outputs of all modules are finite' in reports[1]
    assert log_of(tmp_path).count('Skipped: ') == 2  # The main process's.
    weights = read_checkpoint(tmp_path / 'epoch_2.pth')['state_dict'].values()
    assert all(value.isfinite().all() for value in weights)


# --- damaged data -------------------------------------------------------------------------


@pytest.fixture
def damaged_images(tmp_path: Path) -> Path:
    """A truncated file, one that is no image, one that is not there, and ten good ones."""
    folder = make_images(tmp_path / 'damaged')
    content = (folder / '00.jpg').read_bytes()
    (folder / '00.jpg').write_bytes(content[: len(content) // 2])
    (folder / '01.jpg').write_bytes(b'nothing that anybody could decode')
    (folder / '02.jpg').unlink()
    (folder / '02.jpg').symlink_to('nowhere')
    return folder


@pytest.mark.promise(
    'Runs',
    'Missing, corrupt and truncated images during an epoch are skipped and counted, up to a limit',
    '3 of 3, by the main process and by 2 workers',
)
@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_left_out_and_counted(workers, damaged_images, tmp_path):
    train(tmp_path / 'run', damaged_images, **{'train_dataloader.num_workers': workers})
    log = log_of(tmp_path / 'run')
    for number, name in enumerate(('00.jpg', '01.jpg', '02.jpg'), 1):
        assert log.count(f'number {number} of at most 10') == 1 and name in log
    assert log.count('skipped, number') == 3
    assert '3 training samples could not be loaded' in log


@pytest.mark.promise(
    'Runs',
    'Missing, corrupt and truncated images during an epoch are skipped and counted, up to a limit',
)
def test_too_many_unreadable_images_stop_the_run(damaged_images, tmp_path):
    limit = {'default_hooks.bad_samples.max_skipped': 2}
    with pytest.raises(RuntimeError, match=r'after 2 were skipped, the limit.*0[012]\.jpg'):
        train(tmp_path / 'run', damaged_images, **limit)


@HOOKS.register_module()
class OtherPipeline(Hook):
    """As MMDetection's ``PipelineSwitchHook`` does it."""

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch == 1:
            dataset = runner.train_dataloader.dataset
            dataset.pipeline = Compose(list(dataset.pipeline.transforms))


def test_a_pipeline_that_a_hook_puts_in_place_is_guarded(damaged_images, tmp_path):
    # open-mmlab/mmdetection 9530
    hooks = [dict(type='OtherPipeline')]
    runner = train(tmp_path / 'run', damaged_images, custom_hooks=hooks)
    assert runner.epoch == EPOCHS
    assert isinstance(runner.train_dataloader.dataset.pipeline, GuardedPipeline)


@pytest.mark.parametrize('key', ['coco/mAP', 'toy/mAP'])
def test_save_best_of_no_metric_is_a_sentence(key, images, tmp_path):
    # open-mmlab/mmengine 1560
    changes = evaluation(images)
    changes['val_evaluator']['prefix'] = 'toy'
    changes['default_hooks.checkpoint.save_best'] = key
    changes['default_hooks.checkpoint.rule'] = 'greater'
    with pytest.raises(ValueError, match=f"save_best='{key}' names no metric"):
        train(tmp_path, images, **changes)
    assert (tmp_path / 'epoch_1.pth').exists() == (key == 'toy/mAP')


@pytest.mark.promise(
    'Runs',
    'Missing, corrupt and truncated images during an epoch are skipped and counted, up to a limit',
)
@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_truncated_images_are_told_from_others(suffix, tmp_path):
    for file in make_images(tmp_path / 'images', suffix).iterdir():
        refuse_truncated(file)
    content = file.read_bytes()
    file.write_bytes(content + b'\0' * 1000)  # Decoders leave such an end alone.
    refuse_truncated(file)
    for length in (100, len(content) // 2, len(content) - 60):
        file.write_bytes(content[:length])
        with pytest.raises(OSError, match=r'.'):
            refuse_truncated(file)
    Image.new('L', (1, 1)).save(file)
    refuse_truncated(file)


@pytest.mark.promise('Runs', 'All of these hooks are on by default, and each can be switched off')
def test_guards_can_be_left_out(images, tmp_path):
    cfg = toy_config(tmp_path, images, **{'default_hooks.bad_samples': None})
    assert 'bad_samples' not in cfg.default_hooks
    assert cfg.default_hooks.checkpoint.type == 'mmsvit.SafeCheckpointHook'


def test_an_endless_run_without_samples_ends():
    batches = SeededBatchSampler([], 2, None, True, seed=0, done=0, skip=0, endless=True)
    with pytest.raises(RuntimeError, match='gives no samples'):
        next(iter(batches))
