"""A drop path rate that changes in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from toy import make_images, train

from mmsvit import SViT
from mmsvit.engine.hooks import DropPathHook


@HOOKS.register_module()
class NoteRates(Hook):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def after_train_iter(self, runner: Runner, *_, **__) -> None:
        self.rates.append(runner.model.backbone.stages[-1].blocks[-1].drop_path.drop_prob)


def rates_of(runner: Runner) -> list[float]:
    return next(hook for hook in runner.hooks if isinstance(hook, NoteRates)).rates


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / 'images')


def test_the_rate_changes_and_a_resumed_run_goes_on_with_it(images, tmp_path):
    hooks = [
        dict(type='mmsvit.DropPathHook', schedule=[(1, 0.5), (2, 0.6)]),
        dict(type='NoteRates'),
    ]
    runner = train(tmp_path / 'run', images, custom_hooks=hooks)
    assert rates_of(runner) == [0.3] * 6 + [0.5] * 6 + [0.6] * 6
    (tmp_path / 'run' / 'epoch_3.pth').unlink()
    runner = train(tmp_path / 'run', images, custom_hooks=hooks, resume=True)
    assert rates_of(runner) == [0.6] * 6


def test_a_schedule_of_iterations(images, tmp_path):
    hook = dict(type='mmsvit.DropPathHook', schedule=[(4, 0.0)], by_epoch=False)
    hooks = [hook, dict(type='NoteRates')]
    runner = train(tmp_path / 'run', images, by_epoch=False, custom_hooks=hooks)
    assert rates_of(runner) == [0.3] * 4 + [0.0] * 14


def test_the_rate_rises_linearly_from_the_first_block():
    model = SViT(drop_path_rate=0.19)
    model.set_drop_path_rate(0.38)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(20)])


@pytest.mark.parametrize('schedule', [[], [(3, 0.1), (3, 0.2)], [(-1, 0.1)], [(0, 1.0)]])
def test_bad_schedules_are_refused(schedule):
    with pytest.raises(ValueError, match='schedule'):
        DropPathHook(schedule)
