"""A release of MMEngine that mmsvit does not fit is refused with a sentence."""

from __future__ import annotations

import pytest
from conftest import run_python
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmsvit.compat import mmengine_private


@pytest.fixture(autouse=True)
def check_again():
    mmengine_private.check_mmengine.cache_clear()
    yield
    mmengine_private.check_mmengine.cache_clear()


def test_the_installed_release_fits():
    mmengine_private.check_mmengine()


def test_a_method_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(CheckpointHook, '_save_best_checkpoint')
    with pytest.raises(ImportError, match=r'_save_best_checkpoint is gone.*requirements\.txt'):
        mmengine_private.check_mmengine()


def test_a_method_with_other_parameters_is_named(monkeypatch):
    monkeypatch.setattr(CheckpointHook, '_save_checkpoint_with_step', lambda self, step: None)
    with pytest.raises(ImportError, match=r"_with_step takes \('self', 'step'\), expected"):
        mmengine_private.check_mmengine()


def test_an_attribute_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(mmengine_private, 'ATTRIBUTES', ((Runner, '_resume_from'),))
    with pytest.raises(ImportError, match='Runner has no attribute _resume_from'):
        mmengine_private.check_mmengine()


@pytest.mark.parametrize('module', ['checkpoint', 'engine.hooks', 'engine.layer_decay'])
def test_importing_what_relies_on_it_fails(module):
    code = (
        'from mmengine.optim import OptimWrapper\ndel OptimWrapper._clip_grad\n'
        f'import mmsvit.{module}'
    )
    result = run_python('-c', code, check=False)
    assert result.returncode == 1
    assert 'ImportError: mmsvit does not fit MMEngine' in result.stderr
    assert 'OptimWrapper._clip_grad is gone' in result.stderr
