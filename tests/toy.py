"""A training run of seconds in which everything is random that can be: data, drop path, dropout.

python tests/toy.py WORK_DIR IMAGES, in a process of its own
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import small_arch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image
from torch import Tensor, nn

from mmsvit import SViT
from mmsvit.checkpoint import read_checkpoint
from mmsvit.cli import add_guards, run

EPOCHS, IMAGES, BATCH = 3, 12, 2


def make_images(folder: Path, suffix: str = '.jpg') -> Path:
    """Twelve small images of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(
            folder / f'{i:02}{suffix}'
        )
    return folder


@DATASETS.register_module()
class ToyImages(BaseDataset):
    def load_data_list(self) -> list[dict]:
        files = sorted(Path(self.data_root).iterdir())
        return [dict(img_path=str(file), img_id=i) for i, file in enumerate(files)]


@TRANSFORMS.register_module()
class ToyPack:
    def __call__(self, results: dict) -> dict:
        noise = np.random.normal(size=(32, 32, 3)) + torch.randn(()).item()
        image = torch.from_numpy(results['img'] / 255 + 0.1 * noise)
        sample = BaseDataElement(
            metainfo=dict(img_path=results['img_path'], img_id=results['img_id'])
        )
        return dict(inputs=image.permute(2, 0, 1).float(), data_samples=sample)


@MODELS.register_module()
class Toy(BaseModel):
    """A small SViT that learns to tell how bright an image is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SViT(small_arch(), drop_path_rate=0.3)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(24, 1)

    def forward(self, inputs: list[Tensor], data_samples: list, mode: str = 'tensor') -> object:
        inputs = torch.stack(list(inputs))
        out = self.head(self.dropout(self.backbone(inputs)[-1].mean((2, 3))))[:, 0]
        if mode != 'loss':
            return out
        return dict(
            loss_mean=(out - inputs.mean((1, 2, 3))).square().mean(),
            loss_size=0.01 * out.abs().mean(),
        )


@METRICS.register_module()
class ToyScore(BaseMetric):
    """Better at every evaluation."""

    def process(self, data_batch: object, data_samples: Sequence) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, int]:
        return dict(score=MessageHub.get_current_instance().get_info('iter'))


@HOOKS.register_module()
class DieInWrite(Hook):
    """SIGKILL in the middle of writing a checkpoint: half of the file is on the disk."""

    def __init__(self, number: int) -> None:
        self.left, self.fsync = number, os.fsync

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.left -= 1
        if not self.left:
            os.fsync = self.die

    def die(self, descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        self.fsync(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class Poison(Hook):
    """Make values or gradients of some iterations not finite, on one process or on all."""

    def __init__(
        self, iterations: list[int], where: str = 'forward', rank: int | None = None
    ) -> None:
        self.iterations, self.where, self.rank = iterations, where, rank

    def before_train(self, runner: Runner) -> None:
        if self.rank not in (None, runner.rank):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        spoilt = model if self.where == 'loss' else model.backbone.stages[1]
        spoilt.register_forward_hook(self.spoil, prepend=True)  # Others see what it did.

    def before_train_iter(self, runner: Runner, *_, **__) -> None:
        self.now = runner.iter in self.iterations

    def spoil(self, module: object, inputs: tuple, output: object) -> object:
        if not self.now:
            return None
        if self.where == 'loss':  # Its gradients are finite.
            return {**output, 'loss_size': output['loss_size'] + float('nan')}
        if self.where == 'forward':
            return output * float('nan')
        factor = 1e30 if self.where == 'norm' else float('inf')  # Its square is too large.
        output.register_hook(lambda gradient: gradient * factor)
        return None


@HOOKS.register_module()
class Slow(Hook):
    """Make iterations last, and say that they have begun."""

    def after_train_iter(self, runner: Runner, batch_idx: int, *_, **__) -> None:
        (Path(runner.work_dir) / f'begun_{runner.iter}').touch()
        time.sleep(0.3)

    def after_val_iter(self, runner: Runner, *_, **__) -> None:
        (Path(runner.work_dir) / 'evaluating').touch()
        time.sleep(0.3)


@HOOKS.register_module()
class NoteEvaluated(Hook):
    """Write what each process evaluates: of averaged weights, where there are some."""

    priority = 'LOWEST'

    def before_val_epoch(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        torch.save(
            model.state_dict(), Path(runner.work_dir) / f'evaluated_{runner.iter}_{runner.rank}.pth'
        )


def toy_data(images: Path) -> dict:
    """The config of the images."""
    pipeline = [
        dict(type='mmcv.LoadImageFromFile'),
        dict(type='mmcv.RandomFlip', prob=0.5),
        dict(type='ToyPack'),
    ]
    return dict(type='ToyImages', data_root=str(images), pipeline=pipeline)


def evaluation(images: Path, workers: int = 0) -> dict:
    """Changes for a run that is evaluated after every epoch."""
    sampler = dict(type='DefaultSampler', shuffle=False)
    loader = dict(batch_size=4, num_workers=workers, sampler=sampler, dataset=toy_data(images))
    return dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type='ToyScore'))


def toy_config(work_dir: Path, images: Path, by_epoch: bool = True, **changes: object) -> Config:
    """The config of such a run; ``changes`` go to the top level."""
    total = EPOCHS * IMAGES // BATCH
    loop = dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS)
    if not by_epoch:
        loop = dict(type='IterBasedTrainLoop', max_iters=total)
    checkpoint = dict(type='CheckpointHook', interval=1 if by_epoch else 4, by_epoch=by_epoch)
    cfg = Config(
        dict(
            experiment_name=f'{Path(work_dir).name}_{time.time_ns()}',
            default_scope='mmengine',
            model=dict(type='Toy'),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=BATCH,
                num_workers=0,
                sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler'),
                dataset=toy_data(images),
            ),
            train_cfg=loop,
            optim_wrapper=dict(
                type='OptimWrapper',
                optimizer=dict(type='AdamW', lr=1e-2),
                clip_grad=dict(max_norm=1.0),
            ),
            param_scheduler=[dict(type='LinearLR', by_epoch=False, start_factor=0.1, end=total)],
            default_hooks=dict(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=1)),
            randomness=dict(seed=0),
            log_level='WARNING',
        )
    )
    for key, value in changes.items():
        cfg.merge_from_dict({key: value})
    add_guards(cfg)
    return cfg


def train(work_dir: Path, images: Path, **changes: object) -> Runner:
    """Train in this process."""
    runner = Runner.from_cfg(toy_config(work_dir, images, **changes))
    runner.train()
    return runner


def final_weights(work_dir: Path) -> dict[str, Tensor]:
    """What a finished run ended in."""
    name = Path((Path(work_dir) / 'last_checkpoint').read_text()).name
    return read_checkpoint(Path(work_dir) / name)['state_dict']


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare what two runs ended in."""
    first, second = final_weights(one), final_weights(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('images', type=Path)
    parser.add_argument('--die-in-write', type=int, help='SIGKILL in writing this checkpoint')
    parser.add_argument(
        '--poison', type=int, nargs='+', help='iterations at which process 1 has NaN'
    )
    parser.add_argument('--slow', action='store_true')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--evaluate', action='store_true')
    parser.add_argument('--interval', type=int, default=1, help='epochs between checkpoints')
    parser.add_argument('--distributed', action='store_true')
    parser.add_argument('--note-evaluated', action='store_true')
    parser.add_argument('--average', action='store_true')
    args = parser.parse_args()
    hooks = [dict(type='DieInWrite', number=args.die_in_write)] if args.die_in_write else []
    if args.note_evaluated:
        hooks.append(dict(type='NoteEvaluated'))
    if args.average:
        hooks.append(dict(type='EMAHook', momentum=0.3))
    if args.slow:
        hooks.append(dict(type='Slow'))
    changes = {'train_dataloader.num_workers': args.workers}
    changes['default_hooks.checkpoint.interval'] = args.interval
    if args.evaluate:
        changes.update(evaluation(args.images, args.workers))
    if args.poison:
        hooks.append(dict(type='Poison', iterations=args.poison, where='loss', rank=1))
        guard = dict(type='mmsvit.NonFiniteHook', action='skip', max_consecutive=1)
        changes['default_hooks.non_finite'] = guard
    if args.distributed:
        torch.distributed.init_process_group('gloo')
        changes.update(
            launcher='pytorch',
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),
        )
    train(args.work_dir, args.images, resume=True, custom_hooks=hooks, **changes)


if __name__ == '__main__':
    # What started the tests may ignore signals, as nohup does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(main)
