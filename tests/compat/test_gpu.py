"""A GPU that torch does not see is named, with the way out; it is on none of these machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from mmsvit.compat.gpu import CPU_VARIABLE, unseen_gpu

DRIVER = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 1 00:00:00 UTC 2026\n'
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')


@pytest.fixture
def driver(tmp_path, monkeypatch) -> Path:
    """A driver that is new enough, without a GPU behind it."""
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.delenv(CPU_VARIABLE, raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    file = tmp_path / 'version'
    file.write_text(DRIVER.format('580.65.06'))
    return file


@no_gpu
def test_without_a_driver_there_is_no_gpu(driver):
    assert unseen_gpu(driver.with_name('none')) is None


@no_gpu
def test_a_variable_that_hides_it(driver, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert "CUDA_VISIBLE_DEVICES='' hides it" in unseen_gpu(driver)


@no_gpu
def test_an_old_driver(driver, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    driver.write_text(DRIVER.format('535.183.01'))
    assert 'driver 535.183.01 is too old for CUDA 13.0, which needs 580' in unseen_gpu(driver)
    driver.write_text(DRIVER.format('580.65.06'))
    assert 'torch.cuda.init()' in unseen_gpu(driver)


@no_gpu
def test_a_build_without_cuda(driver, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'is built without CUDA' in unseen_gpu(driver)


@no_gpu
def test_nvidia_smi_is_asked_where_the_driver_has_no_file(driver, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    tool = driver.with_name('nvidia-smi')
    tool.write_text('#!/bin/sh\necho 550.54.15\n')
    tool.chmod(0o755)
    assert 'driver 550.54.15 is too old' in unseen_gpu(driver.with_name('none'))
    tool.write_text('#!/bin/sh\nexit 9\n')  # As it does without a driver.
    assert unseen_gpu(driver.with_name('none')) is None


@no_gpu
def test_the_cpu_can_be_meant(driver, monkeypatch):
    monkeypatch.setenv(CPU_VARIABLE, '1')
    assert unseen_gpu(driver) is None


@no_gpu
@pytest.mark.slow
@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_tools_refuse_to_go_to_the_cpu_unasked(driver, tool, monkeypatch):
    fake = driver.with_name('nvidia-smi')
    fake.write_text('#!/bin/sh\necho 550.54.15\n')
    fake.chmod(0o755)
    command = [sys.executable, ROOT / 'tools' / tool, ROOT / 'configs' / 'svit_maskrcnn_shapes.py']
    command += ['weights.pth'] * (tool == 'test.py')
    result = subprocess.run(command, capture_output=True, text=True, cwd=driver.parent)
    assert result.returncode != 0
    assert 'this machine has an NVIDIA GPU, and torch does not see it' in result.stderr
    assert 'Traceback' not in result.stderr
