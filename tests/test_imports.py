"""Imports go one way, and importing the model changes nothing in other libraries."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_python

PACKAGE = ROOT / 'mmsvit'
# What each room, or module of the root, may import from the others.
ALLOWED = {
    '__init__': {'compat', 'config_path', 'models'},
    'analysis': set(),
    'apis': {'checkpoint', 'models', 'visualization'},
    'atomic_file': set(),
    'benchmarking': {'__init__', 'analysis', 'atomic_file', 'config_path', 'models', 'ops'},
    'check_env': {'__init__', 'compat', 'ops'},
    'checkpoint': {'atomic_file', 'compat'},
    'cli': {'checkpoint', 'compat', 'config_keys', 'datasets'},
    'compat': set(),
    'config_keys': set(),
    'config_path': set(),
    'datasets': {'atomic_file'},
    'engine': {'checkpoint', 'compat', 'datasets', 'models', 'ops', 'registry', 'visualization'},
    'export': {'checkpoint', 'models'},
    'models': {'checkpoint', 'ops', 'registry'},
    'ops': {'compat'},
    'prove_gpu': {'atomic_file', 'cli', 'compat', 'datasets', 'models', 'ops'},
    'registry': set(),
    'visualization': {'atomic_file', 'models', 'ops'},
}
SOURCES = sorted(PACKAGE.rglob('*.py'))


def modules(source: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, at any place in it."""
    here = ['mmsvit', *source.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            name = '.'.join([*base, *([node.module] if node.module else [])])
            yield from (f'{name}.{alias.name}' for alias in node.names)


def room(name: str) -> str:
    """The room of a module of mmsvit."""
    part = name.split('.')[1]
    return part if part in ALLOWED else '__init__'


@pytest.mark.parametrize('source', SOURCES, ids=lambda s: str(s.relative_to(PACKAGE)))
def test_imports_go_one_way(source):
    here = room('.'.join(['mmsvit', *source.relative_to(PACKAGE).with_suffix('').parts]))
    found = {room(name) for name in modules(source) if name.startswith('mmsvit.')}
    assert found - {here} <= ALLOWED[here]


def test_rooms_form_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, below in ALLOWED.items() if below - {'__init__'} <= done} - done
        assert ready, f'a circle among {set(ALLOWED) - done}'
        done |= ready


def test_only_the_page_knows_gradio():
    users = [source for source in SOURCES if any('gradio' in name for name in modules(source))]
    assert users == [PACKAGE / 'apis' / 'demo_page.py']


@pytest.mark.parametrize('statement', ['from mmsvit import SViT', 'import mmsvit.models'])
def test_the_model_needs_no_mm_package_but_mmengine(statement):
    code = f'import sys\n{statement}\nprint(*{{name.split(".")[0] for name in sys.modules}})'
    loaded = set(run_python('-c', code).stdout.split())
    assert 'mmengine' in loaded
    assert not loaded & {'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'gradio', 'matplotlib'}


SNAPSHOT = """
import importlib, pkgutil, sys, types
import mmcv, mmdet, mmengine.hooks, mmengine.model, mmengine.optim, mmengine.registry
import mmengine.runner, torch, torch.utils.checkpoint, torch.utils.flop_counter
import torch.nn.utils.fusion
from mmengine.runner import CheckpointLoader

def bindings():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] in ('torch', 'mmengine', 'mmcv'):
            for key, value in list(vars(module).items()):
                if callable(value):
                    found[name, key] = value
                if isinstance(value, type):
                    for attribute, method in list(vars(value).items()):
                        if callable(method):
                            found[name, key, attribute] = method
    return found

before = bindings()
schemes = dict(CheckpointLoader._schemes)
allowed = torch.serialization.get_safe_globals()
hooks = list(sys.meta_path)
{statements}
after = bindings()
changed = [key for key, value in before.items() if after.get(key) is not value]
assert CheckpointLoader._schemes == schemes
assert torch.serialization.get_safe_globals() == allowed
print('CHANGED', changed)
"""


def test_importing_the_model_rebinds_nothing():
    statements = 'import mmsvit\nmmsvit.SViT()\nimport mmsvit.models, mmsvit.ops, mmsvit.registry'
    output = run_python('-c', SNAPSHOT.replace('{statements}', statements)).stdout
    assert output.strip() == 'CHANGED []'


def test_the_snapshot_sees_the_documented_patch():
    code = SNAPSHOT.replace('{statements}', 'import mmsvit.checkpoint')
    result = run_python('-c', code, check=False)
    assert result.returncode == 1 and 'AssertionError' in result.stderr
