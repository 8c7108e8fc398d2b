"""What several test files need."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch

import mmsvit  # noqa: F401  (before any test imports MMDetection: see mmsvit/compat/mmcv_ext.py)

if torch.cuda.is_available():
    OPS_PLACES = [('torch', 'cpu'), ('cpu', 'cpu'), ('torch', 'cuda'), ('triton', 'cuda')]
else:
    # Triton's interpreter runs the kernels on the CPU if it is told so before its import.
    os.environ['TRITON_INTERPRET'] = '1'
    OPS_PLACES = [('torch', 'cpu'), ('cpu', 'cpu'), ('triton', 'cpu')]
if importlib.util.find_spec('triton') is None:
    OPS_PLACES = [place for place in OPS_PLACES if place[0] != 'triton']

ROOT = Path(__file__).resolve().parent.parent
# Marks of the tests that run only if ``-m`` names them.
ON_DEMAND = ('all_configs', 'stress', 'peers')
# How reasons to skip say that something is not installed.
MISSING = 'could not import|not installed|not on the PATH'
GOLDEN = Path(__file__).resolve().parent / 'golden'
FIGURES = ROOT / 'work_dirs' / 'stress.md'  # Rows for the table of docs/stress.md.


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long or downloads, and is not asked for by its mark."""
    unasked = [mark for mark in ON_DEMAND if mark not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unasked))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        callspec = getattr(item, 'callspec', None)
        if callspec is not None and 'place' in callspec.params:
            item.add_marker('cuda')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--require-all',
        action='store_true',
        help='fail where a package or program is missing, instead of skipping the tests that need it',
    )


def fail_if_required(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config
) -> None:
    reason = str(report.longrepr)
    if report.skipped and config.getoption('--require-all') and re.search(MISSING, reason):
        report.outcome, report.longrepr = 'failed', f'--require-all: {reason}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator:
    report = yield
    fail_if_required(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator:
    report = yield
    fail_if_required(report, collector.config)
    return report


def golden_arch(name: str) -> dict:
    """The architecture of a golden checkpoint as SViT's ``arch``."""
    arch = json.loads((GOLDEN / f'{name}.json').read_text())['arch']
    return dict(
        embed_dims=arch['embed_dim'],
        depths=arch['depths'],
        num_heads=arch['num_heads'],
        super_token_sizes=arch['stoken_size'],
        num_iters=arch['n_iter'],
        layer_scale=[arch['init_values'] if used else None for used in arch['layerscale']],
    )


def small_arch(**changes: tuple) -> dict:
    """An architecture that runs in milliseconds."""
    arch = dict(
        embed_dims=(8, 12, 16, 24),
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 2, 3),
        super_token_sizes=(4, (2, 3), 1, 1),
        num_iters=(1, 2, 1, 1),
        layer_scale=(None, None, 0.5, None),
    )
    return {**arch, **changes}


def activated(**variables: str) -> dict[str, str]:
    """The environment variables of this environment when it is activated, and others."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return {**os.environ, 'PATH': path, **variables}


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def import_tool(name: str, folder: str = 'tools') -> ModuleType:
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(
    *arguments: str | Path,
    cwd: Path = ROOT,
    check: bool = True,
    timeout: int = 600,
    site: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run a fresh Python; its output is in the failure message if it fails.

    What is in the folder ``site`` is imported before what is installed.
    """
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    if site is not None:
        env['PYTHONPATH'] = str(site)
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert result.returncode == 0, f'{arguments}\n{result.stdout}\n{result.stderr}'
    return result


@pytest.fixture(params=OPS_PLACES, ids='-'.join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend of the super token operations and a device that it can run on."""
    return request.param


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print figures of a stress test, and add them to a table in the work folder."""

    def write(figures: str) -> None:
        threads = torch.get_num_threads()
        machine = f'{platform.machine()}, {threads} threads, torch {torch.__version__}'
        name = request.node.name.removeprefix('test_').replace('_', ' ')
        line = f'| {datetime.date.today()} | {name} | {figures} | {machine} |\n'
        print(line)
        FIGURES.parent.mkdir(exist_ok=True)
        with FIGURES.open('a') as table:
            table.write(line)

    return write


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of a few small images."""
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    sizes = ['--num-train', '8', '--num-val', '4', '--size', '64']
    run_python('tools/make_shapes_dataset.py', folder, *sizes)
    return folder


@pytest.fixture
def damaged(shapes, tmp_path):
    """A copy of the generated data set, to be damaged."""
    return Path(shutil.copytree(shapes, tmp_path / 'shapes'))


@pytest.fixture
def scenes(tmp_path):
    """Four images with label maps of three classes and ignored pixels."""
    from data_configs import write_labels

    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for i in range(4):
        cv2.imwrite(str(tmp_path / 'images' / f'{i}.jpg'), rng.integers(0, 255, (24, 32, 3)))
        write_labels(tmp_path, i, rng.choice([0, 1, 2, 255], (24, 32)))
    return tmp_path


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    """A folder with mmsvit installed from a wheel."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for name in ('mmsvit', 'configs', 'tools', 'setup.py', 'pyproject.toml', 'README.md'):
        # A copy: what an earlier build left behind would be packed again.
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for name in ('MANIFEST.in', 'model-index.yml'):
        shutil.copy(ROOT / name, source)
    pip = ['-m', 'pip', '-q']
    run_python(*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, source)
    (wheel,) = folder.glob('mmsvit-*.whl')
    run_python(*pip, 'install', '--no-deps', '--target', folder / 'site', wheel)
    return folder / 'site'


WITHOUT_COMPILED = """
import sys, warnings
warnings.simplefilter('error', UserWarning)
import importlib.machinery
class Hide:  # As if mmcv had been installed without its ops.
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            finder = next((f for f in sys.meta_path if type(f).__name__ == 'StandInFinder'), None)
            if finder is None:
                raise ModuleNotFoundError("No module named 'mmcv._ext'")
            return finder.find_spec(name, path)
sys.meta_path.insert(0, Hide())
"""

# After it: run a tool, and see that it ran without compiled ops.
RUN = """
import runpy
sys.argv[:] = sys.argv[1:]
warnings.resetwarnings()
runpy.run_path(sys.argv[0], run_name='__main__')
assert sys.modules['mmcv._ext'].__file__.endswith('torchvision_ops.py')
"""
