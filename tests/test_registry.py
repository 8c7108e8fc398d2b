"""``type='mmsvit.SViT'`` works in every mm* library without anyone importing mmsvit."""

from __future__ import annotations

import pytest
from conftest import run_python

from mmsvit.compat.mmcv_ext import is_stand_in

BUILD = """
from mmengine.registry import init_default_scope
from {library}.registry import MODELS
init_default_scope('{scope}')
backbone = MODELS.build(dict(type='mmsvit.SViT', arch='small', out_indices=(0,)))
assert type(backbone).__module__ == 'mmsvit.models.svit', type(backbone)
"""


@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_in_a_fresh_interpreter(library, tmp_path):
    code = BUILD.format(library=library, scope=library)
    if is_stand_in():  # Without compiled ops, mmsvit must be imported before the others.
        code = f'import mmsvit\n{code}'
    run_python('-c', code, cwd=tmp_path)


def test_import_is_cheap_and_gives_the_backbone(tmp_path):
    code = (
        'import sys, mmsvit; assert "torch" not in sys.modules and "mmengine" not in sys.modules; '
        'from mmsvit import SViT; SViT("small", out_indices=(0,)); '
        'assert not {"mmcv", "mmdet"} & set(sys.modules)'
    )
    result = run_python('-c', code, cwd=tmp_path)
    assert result.stdout == ''
