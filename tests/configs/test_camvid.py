"""The configs of CamVid on tiny pictures in its layout, and in that of a copy with void as 255."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, import_tool, run_python, small_arch
from mmengine.config import Config
from PIL import Image

from mmsvit.datasets.inspection import inspect_data

CONFIG = ROOT / 'configs' / 'camvid' / 'svit-s_fpn_cpu_camvid.py'
VOID = {'public': 11, 'copy': 255}


def make_data(folder: Path, layout: str) -> None:
    """Three pictures of each split; the top row of each label map is void."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        places = {'public': (split, f'{split}annot'), 'copy': (f'img/{split}', f'ann/{split}')}
        images, labels = (folder / place for place in places[layout])
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(3):
            label_map = np.arange(64 * 96, dtype=np.uint8).reshape(64, 96) // 9 % 11
            label_map[0] = VOID[layout]
            picture = rng.integers(0, 255, (64, 96, 3), np.uint8) // 2 + 10 * label_map[..., None]
            suffix = {'public': 'png', 'copy': 'jpg'}[layout]
            Image.fromarray(picture.astype(np.uint8)).save(images / f'{i}.{suffix}')
            Image.fromarray(label_map).save(labels / f'{i}.png')


def small_config(folder: Path, layout: str) -> Config:
    """The config on these pictures, with a model of milliseconds."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(arch=small_arch(), super_token_sizes=None)
    cfg.model.neck.in_channels = list(small_arch()['embed_dims'])
    void = VOID[layout]
    cfg.model.data_preprocessor.seg_pad_val = cfg.model.decode_head.ignore_index = void
    cfg.train_pipeline[3].ignore_index = void
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=f'{folder}/', ignore_index=void)
        if layout == 'copy':
            loader.dataset.img_suffix = '.jpg'
            loader.dataset.data_prefix = dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}')
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    cfg.train_pipeline[2].scale, cfg.train_pipeline[3].crop_size = (96, 64), (64, 64)
    cfg.model.data_preprocessor.size = (64, 64)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ignore_index = void
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize('layout', VOID)
def test_a_step_an_evaluation_and_pictures(layout, tmp_path):
    make_data(tmp_path / 'data', layout)
    small_config(tmp_path / 'data', layout).dump(tmp_path / 'config.py')
    run = tmp_path / 'run'
    run_python('tools/train.py', tmp_path / 'config.py', '--work-dir', run)
    scalars = ''.join(path.read_text() for path in run.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in scalars.splitlines()]
    assert all(0 < record['loss'] < 10 for record in records if 'loss' in record)
    assert 0 <= records[-1]['mIoU'] <= 100
    test = ('--work-dir', tmp_path / 'test', '--show-dir', tmp_path / 'drawn')
    run_python('tools/test.py', tmp_path / 'config.py', run / 'iter_2.pth', *test)
    assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 3


@pytest.mark.parametrize('layout', VOID)
def test_void_is_neither_a_class_nor_wrong(layout, tmp_path):
    make_data(tmp_path, layout)
    report = inspect_data(small_config(tmp_path, layout), ('train', 'val', 'test'), samples=None)
    assert not report.problems('error') and not report.problems('warning')


def test_what_is_wrong_with_a_copy_is_named(tmp_path):
    make_data(tmp_path, 'public')
    Image.fromarray(np.full((64, 96), 12, np.uint8)).save(tmp_path / 'trainannot' / '0.png')
    Image.fromarray(np.zeros((32, 96), np.uint8)).save(tmp_path / 'valannot' / '1.png')
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n'
    (tmp_path / 'test' / '2.png').write_text(pointer)
    cfg = small_config(tmp_path, 'public')
    said = str(inspect_data(cfg, ('train', 'val', 'test'), samples=None).problems('error'))
    assert 'has [12]' in said
    assert '1.png is 96x32, its image 96x64' in said
    assert '2.png' in said and 'LFS' in said


def test_a_missing_split_is_named(tmp_path):
    make_data(tmp_path, 'public')
    (tmp_path / 'val').rename(tmp_path / 'elsewhere')
    report = inspect_data(small_config(tmp_path, 'public'), ('train', 'val', 'test'), samples=None)
    (problem,) = report.problems('error')
    assert problem.split == 'val' and str(tmp_path / 'val') in str(problem.examples)


def test_a_comparison_writes_its_tables_and_goes_on(tmp_path, monkeypatch):
    tool = import_tool('compare_backbones')
    make_data(tmp_path / 'data', 'public')
    cfg = small_config(tmp_path / 'data', 'public')
    cfg.param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0)]
    cfg.dump(tmp_path / 'config.py')
    arguments = ['compare_backbones.py', str(tmp_path / 'config.py'), '--models', 'r50']
    arguments += ['--lrs', '1e-3', '1e-4', '--search-iters', '1', '--seeds', '3', '4']
    monkeypatch.setattr('sys.argv', [*arguments, '--out', str(tmp_path / 'out'), '--debug'])
    tool.main()
    page = (tmp_path / 'out' / 'README.md').read_text()
    results = [json.loads(path.read_text()) for path in tmp_path.glob('out/*/result.json')]
    assert sorted((r['lr'], r['seed'], r['search'], r['iterations']) for r in results)[:1] == [
        (1e-4, 3, True, 1)
    ]
    assert [r['search'] for r in results].count(False) == 2
    final = sorted(r['metrics']['mIoU'] for r in results if not r['search'])
    assert f'{sum(final) / 2:.2f}' in page and (tmp_path / 'out' / 'curves.png').is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('out/*/result.json')}
    tool.main()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_super_tokens_are_measured_beside_a_grid(tmp_path, monkeypatch):
    tool = import_tool('measure_super_tokens')
    make_data(tmp_path / 'data', 'public')
    small_config(tmp_path / 'data', 'public').dump(tmp_path / 'config.py')
    out = tmp_path / 'table.md'
    arguments = ['measure_super_tokens.py', str(tmp_path / 'config.py'), '--no-slic', '--debug']
    monkeypatch.setattr('sys.argv', [*arguments, '--out', str(out)])
    tool.main()
    rows = [line.split(' | ') for line in out.read_text().splitlines()[2:]]
    names = [row[0].removeprefix('| ') for row in rows]
    # Cells of 4x4 tokens of stride 4, and of 2x3 of stride 8.
    cells = ['16x16', '16x24']
    assert names == [
        name
        for i, cell in enumerate(cells)
        for name in (
            f'super tokens of stage {i + 1}',
            f'grid of as many, stage {i + 1}',
            f'grid of {cell} pixels',
        )
    ]
    assert [int(row[1]) for row in rows[2::3]] == [4 * 6, 4 * 4]
    for super_tokens, as_many in zip(rows[::3], rows[1::3]):
        assert abs(int(super_tokens[1]) - int(as_many[1])) <= 3
    assert all(0 <= float(value.strip(' |')) <= 100 for row in rows for value in row[2:])
