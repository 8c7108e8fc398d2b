"""MMSegmentation's own tests of segmentors, run with our backbone in place of theirs.

The suite is in the source distribution that pip downloads, of the last release that ships it;
nothing of it is kept here. ``MMSEG_SDIST=FILE`` in the environment names one downloaded before.

    pytest -m peers tests/peers
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers

SDIST = 'mmsegmentation==1.2.2'

# Their images are as small as 4x4 pixels, and SViT's smallest is 32x32. Nothing else changes.
LARGER = {
    'test_forward.py': [('(3, 4, 4)', '(3, 64, 64)')],
    'test_segmentors/utils.py': [('(1, 3, 8, 16)', '(2, 3, 64, 80)')],
    'test_segmentors/test_encoder_decoder.py': [
        ('crop_size=(3, 3), stride=(2, 2)', 'crop_size=(40, 40), stride=(30, 30)')
    ],
    'test_segmentors/test_cascade_encoder_decoder.py': [
        ('crop_size=(3, 3), stride=(2, 2)', 'crop_size=(40, 40), stride=(30, 30)')
    ],
    'test_segmentors/test_seg_tta_model.py': [('10 + i, 10 + i', '40 + i, 40 + i')],
}

# A plugin for their pytest: every backbone that is built becomes an SViT of the same widths.
PLUGIN = """
import mmsvit
from mmengine.registry import init_default_scope
import mmseg.models
from mmseg.registry import MODELS
from mmsvit import SViT

init_default_scope('mmseg')
WIDTHS = {'ResNetV1c': {18: (64, 128, 256, 512), 50: (256, 512, 1024, 2048)},
          'ResNet': {50: (256, 512, 1024, 2048)},
          'HRNet': {None: (18, 36, 72, 144)}, 'MobileNetV2': {None: (24, 32, 96, 320)},
          'ExampleBackbone': {None: (4, 3, 4, 4)}}
replaced = []
build = MODELS.build

def build_ours(cfg, *args, **kwargs):
    kind = isinstance(cfg, dict) and cfg.get('type')
    if kind not in WIDTHS:
        return build(cfg, *args, **kwargs)
    replaced.append(kind)
    widths = WIDTHS[kind][cfg.get('depth')]
    arch = dict(embed_dims=widths, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
                super_token_sizes=(8, 4, 1, 1), num_iters=(1, 1, 1, 1), layer_scale=(None,) * 4)
    if kind == 'ExampleBackbone':  # One output of three channels.
        return SViT({**arch, 'num_heads': (1, 1, 1, 1)}, out_indices=(1,))
    return SViT(arch, mlp_ratio=0.5, norm_cfg=cfg.get('norm_cfg', dict(type='BN')))

MODELS.build = build_ours

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f'REPLACED {len(replaced)}: {sorted(set(replaced))}')
"""


@pytest.fixture(scope='module')
def suite(tmp_path_factory) -> Path:
    """The folder of their tests, of larger images, with our plugin and their configs."""
    folder = tmp_path_factory.mktemp('mmseg')
    sdist = os.environ.get('MMSEG_SDIST')
    if not sdist:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:']
        command += ['--no-build-isolation', '-d', folder, SDIST]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f'{SDIST} cannot be downloaded: {result.stderr[-300:]}')
        (sdist,) = folder.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter='data')
    (root,) = (path.parent for path in folder.glob('*/tests'))
    mmseg = Path(find_spec('mmseg').origin).parent
    (root / 'configs').symlink_to(mmseg / '.mim' / 'configs')
    for path in root.iterdir():  # Ours is the installed mmseg.
        if path.name == 'mmseg':
            path.rename(root / 'mmseg_of_sdist')
    for name, changes in LARGER.items():
        file = root / 'tests' / 'test_models' / name
        text = file.read_text()
        for old, new in changes:
            assert old in text, f'{name} is not what it was'
            text = text.replace(old, new)
        file.write_text(text)
    (root / 'our_backbone.py').write_text(PLUGIN)
    return root


def run_suite(suite: Path, *names: str) -> str:
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'our_backbone', '-p', 'no:cacheprovider']
    command += [f'tests/test_models/{name}' for name in names]
    env = dict(os.environ, PYTHONPATH=str(suite))
    result = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True)
    summary = result.stdout[-3000:]
    assert result.returncode == 0, summary + result.stderr[-2000:]
    assert not re.search(r'REPLACED 0', summary)
    print(summary)
    return summary


@pytest.mark.promise(
    'Numbers',
    "MMSegmentation's own tests of segmentors pass with our backbone",
    '14 passed, 1 skipped (CCNet needs CUDA); 22 backbones replaced',
)
def test_segmentors(suite):
    names = ('test_encoder_decoder', 'test_cascade_encoder_decoder', 'test_seg_tta_model')
    summary = run_suite(suite, *(f'test_segmentors/{name}.py' for name in names))
    assert "['ExampleBackbone']" in summary


def test_forward_of_the_configs(suite):
    summary = run_suite(suite, 'test_forward.py')
    assert "['HRNet', 'MobileNetV2', 'ResNetV1c']" in summary
