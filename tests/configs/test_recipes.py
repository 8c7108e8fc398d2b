"""docs/recipes.md says what the configs say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import product

import pytest
from conftest import ROOT
from mmengine.config import Config

SIZES = {'s': 'S', 'b': 'B', 'l': 'L', 'small': 'S', 'base': 'B', 'large': 'L'}


def expand(pattern: str) -> list[str]:
    """``a-{s,b}`` as ``a-s`` and ``a-b``."""
    parts = re.split(r'\{(.*?)\}', pattern)
    choices = [part.split(',') if i % 2 else [part] for i, part in enumerate(parts)]
    return [''.join(choice) for choice in product(*choices)]


def rows() -> Iterator[tuple[str, str, str]]:
    """Config, setting and value of every row of a table that follows a list of configs."""
    configs: list[str] = []
    text = (ROOT / 'docs' / 'recipes.md').read_text().replace(',\n`', ', `')
    for line in text.splitlines():
        if line.startswith('Configs: '):
            configs = [name for found in re.findall('`(.*?)`', line) for name in expand(found)]
        elif line.startswith('#'):
            configs = []
        elif configs and line.startswith('| `'):
            setting, value = (cell.strip() for cell in line.split('|')[1:3])
            for config in configs:
                yield config, setting.strip('`'), value


def setting_of(cfg: Config, key: str) -> object:
    value = cfg
    for name in key.split('.'):
        value = value[int(name)] if isinstance(value, list) else (value or {}).get(name)
    return value


@pytest.mark.parametrize('config', sorted({config for config, _, _ in rows()}))
def test_the_table_of_recipes_is_what_configs_have(config):
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py')
    size = next(SIZES[part] for part in re.split(r'[-_/.]', config) if part in SIZES)
    for other, key, text in rows():
        if other == config:
            of_size = re.search(rf'\b{size} `(.*?)`', text)
            expected = ast.literal_eval(of_size[1] if of_size else text.strip('`'))
            found = setting_of(cfg, key)
            if isinstance(found, tuple):
                expected = tuple(expected)
            assert found == expected, key


def test_every_published_config_has_a_recipe():
    folders = ('mask_rcnn', 'cascade_mask_rcnn', 'retinanet', 'upernet', 'sem_fpn', 'svit')
    variants = re.compile('st8-4|st16-8|frozen-bn|syncbn|norm-eval|fsdp')
    expected = {
        f'{folder}/{path.stem}'
        for folder in folders
        for path in (ROOT / 'configs' / folder).glob('*.py')
        if not variants.search(path.stem)
    }
    assert {config for config, _, _ in rows()} == expected
