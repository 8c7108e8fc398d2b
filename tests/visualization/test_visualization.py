"""Pictures: drawing, reading images, the tool, the hook, curves and reports."""

from __future__ import annotations

import itertools
import json
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, import_tool, run_python, small_arch
from matplotlib.transforms import Bbox
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image

from mmsvit import SViT, config_path
from mmsvit.apis.image_files import find_images, read_image
from mmsvit.apis.inference import ImageModel
from mmsvit.visualization.drawing import (
    AttentionPoint,
    Sheet,
    draw_attention,
    draw_tessellation,
    seen_image,
    super_token_sheet,
)
from mmsvit.visualization.html_report import HtmlReport
from mmsvit.visualization.super_token_maps import SuperTokenRecorder
from mmsvit.visualization.training_curves import choose_metrics, draw_curves, read_curves


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_tessellation_has_borders_and_mean_colours():
    image = np.full((40, 60, 3), 50, np.uint8)
    image[:, 30:] = (200, 10, 90)
    image[:, 10] = 110  # what a mean is taken over
    labels = np.zeros((80, 120), int)
    labels[:, 60:] = 7
    borders, colours = draw_tessellation(image, labels)
    assert borders.dtype == colours.dtype == np.uint8
    assert (np.abs(colours[:, 35:] - np.array([200, 10, 90])) <= 2).all()
    assert np.ptp(colours[:, :29].reshape(-1, 3), axis=0).max() == 0
    assert 51 <= colours[0, 0, 0] <= 55
    assert (borders[:, 29:31].max(axis=1) > 150).all()
    np.testing.assert_array_equal(borders[:, :20], image[:, :20])


def test_attention_is_bright_where_weights_are_large():
    weights = np.zeros((60, 80))
    weights[:, 60:] = 5.0
    drawn, top = draw_attention(picture(60, 80), weights, (30, 20))
    assert top == 5.0
    grey = drawn.astype(int).sum(axis=2)
    assert grey[:, 62:].min() > grey[:10, :58].max()
    assert drawn[30, 20].tolist() != drawn[5, 20].tolist()  # the ring


@pytest.mark.parametrize(
    'config', ['svit_maskrcnn_coco', 'svit_upernet_ade20k', 'svit/svit-small_8xb128_in1k']
)
def test_seen_image_undoes_the_preprocessor_of_each_library(config):
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(ROOT / 'configs' / f'{config}.py')
    init_default_scope(cfg.default_scope)
    settings = dict(cfg.get('data_preprocessor') or cfg.model.data_preprocessor)
    settings.setdefault('type', 'ClsDataPreprocessor')
    preprocessor = MODELS.build(settings)
    bgr = picture(50, 70)
    data = dict(inputs=torch.from_numpy(bgr).permute(2, 0, 1))
    if 'mmseg' in type(preprocessor).__module__:
        from mmseg.structures import SegDataSample

        data['data_samples'] = SegDataSample()
    inputs = preprocessor(pseudo_collate([data]), False)['inputs']
    np.testing.assert_array_equal(seen_image(preprocessor, inputs[0], (50, 70)), bgr[..., ::-1])


def test_sheet_shows_all_stages_of_any_image():
    torch.manual_seed(0)
    backbone = SViT(small_arch()).eval()
    image = picture(70, 131)
    with SuperTokenRecorder(backbone, range(4)) as recorder, torch.no_grad():
        backbone(torch.from_numpy(image).permute(2, 0, 1)[None] / 100.0)
    (maps,) = recorder.maps()
    short = super_token_sheet(image, maps[:1], AttentionPoint(1, 1), 'costs $5 and $6.jpg')
    long = super_token_sheet(image, maps, AttentionPoint(0, 0, 'super_token', 0))
    assert long.shape[1] == short.shape[1] and long.shape[0] > 3 * short.shape[0] - 300
    assert long[:3].min() == 255 and long.std() > 20


@pytest.mark.parametrize('size', [(160, 90), (160, 40), (40, 160), (90, 160), (100, 100)])
def test_nothing_on_a_sheet_is_cut_or_overprinted(size, monkeypatch):
    torch.manual_seed(0)
    backbone = SViT(small_arch()).eval()
    with SuperTokenRecorder(backbone, range(4)) as recorder, torch.no_grad():
        backbone(torch.randn(1, 3, *size))
    pages = []
    render = Sheet.render
    monkeypatch.setattr(Sheet, 'render', lambda page: pages.append(page) or render(page))
    note = '1333x800 pixels. Config: mask-rcnn_svit-s_fpn_1x_coco.py. Weights: stvit-small-224.pth'
    super_token_sheet(picture(*size), recorder.maps()[0], title='photograph.jpg', note=note)
    (page,) = pages
    figure = page.figure
    boxes = {text: text.get_window_extent() for text in figure.texts}
    for image in figure.images:
        left, right, bottom, top = image.get_extent()
        boxes[image] = Bbox.from_extents(left, bottom, right, top)
    for box in boxes.values():
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)


def test_points_outside_the_image_are_refused():
    with pytest.raises(ValueError, match='fractions of width and height'):
        AttentionPoint(12, 0.5)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to nothing inside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    body = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + body


def test_images_of_strangers(tmp_path):
    def read(name: str, content: bytes) -> Image.Image:
        (tmp_path / name).write_bytes(content)
        return read_image(tmp_path / name, max_bytes=50_000, max_pixels=10_000)

    for content in (
        b'hello',
        b'',
        b'\xff\xd8\xff\xe0 no more',
        png(50, 50),
        b'%PDF-1.4',
        b'GIF89a',
    ):
        with pytest.raises(ValueError, match='not an image, or corrupt'):
            read('a.jpg', content)
    for width, height in ((101, 100), (200_000, 200_000), (2_000_000_000, 1)):
        with pytest.raises(ValueError, match=r'pixels|too large'):
            read('b.png', png(width, height))
    with pytest.raises(ValueError, match=r'0\.1 MB'):
        read('c.png', bytes(60_000))
    for kind, mode in (
        ('png', 'RGBA'),
        ('jpeg', 'L'),
        ('jpeg', 'CMYK'),
        ('gif', 'P'),
        ('tiff', 'I;16'),
        ('tiff', 'I;16B'),
        ('png', 'I;16'),
    ):
        grey = Image.new('RGB', (60, 40), (102, 102, 102))
        grey = Image.new(mode, (60, 40), 102 * 256 + 77) if '16' in mode else grey.convert(mode)
        grey.save(tmp_path / f'd.{kind}')
        image = read_image(tmp_path / f'd.{kind}', 50_000, 10_000)
        assert (image.mode, image.size) == ('RGB', (60, 40))
        assert np.abs(np.asarray(image).astype(int) - 102).max() <= 1
    Image.new('F', (60, 40), 90).save(tmp_path / 'f.tiff')
    with pytest.raises(ValueError, match='values of 32 bits'):
        read_image(tmp_path / 'f.tiff', 50_000, 10_000)
    for size in ((2000, 2), (2, 2000)):
        Image.new('RGB', size).save(tmp_path / 'long.png')
        with pytest.raises(ValueError, match='20 times as long as the other'):
            read_image(tmp_path / 'long.png', 50_000, 10_000)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new('RGB', (60, 40)).save(tmp_path / 'e.jpg', exif=turned)
    assert read_image(tmp_path / 'e.jpg', 50_000, 10_000).size == (40, 60)


def test_finding_images(tmp_path, monkeypatch):
    for name in ('a.jpg', 'b.PNG', 'notes.txt', 'deep/c.jpg', 'deep/er/d.webp', 'empty/x.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*names: str) -> list[str]:
        return [path.name for path in find_images(names)]

    assert found('.') == ['a.jpg', 'b.PNG']
    assert found('**/*') == ['a.jpg', 'b.PNG', 'c.jpg', 'd.webp']
    # Each once, whatever it is called.
    assert found('a.jpg', f'{tmp_path}/*.jpg', f'{tmp_path}/deep', 'deep') == ['a.jpg', 'c.jpg']
    assert found('notes.txt') == ['notes.txt']  # What is named by itself is taken at its word.
    within = {str(relative) for relative in find_images(['deep/**/*', 'a.jpg', '.']).values()}
    assert within == {'c.jpg', 'er/d.webp', 'a.jpg', 'b.PNG'}
    for name in ('empty', 'nothing/*.jpg', 'none.jpg'):
        with pytest.raises(FileNotFoundError, match=re.escape(repr(name))):
            find_images([name])


TOOL = 'tools/visualize_super_tokens.py'
CLASSIFIER = ROOT / 'configs' / 'svit_classifier_shapes.py'


def test_tool_draws_folders_with_every_option(tmp_path):
    for i, size in enumerate([(40, 90), (64, 64)]):
        (tmp_path / str(i)).mkdir()
        cv2.imwrite(str(tmp_path / str(i) / 'same.png'), picture(*size, seed=i))
    out = tmp_path / 'out'
    config = tmp_path / 'small.py'
    config.write_text(
        f"_base_ = '{ROOT}/configs/svit_classifier_shapes.py'\nmodel = dict(train_cfg=None)\n"
    )
    torch.manual_seed(0)
    cfg = Config.fromfile(config).model.backbone
    settings = {key: value for key, value in cfg.items() if key not in ('type', 'init_cfg')}
    torch.save(dict(state_dict=SViT(**settings).state_dict()), tmp_path / 'weights.pth')
    result = run_python(
        *(
            TOOL,
            tmp_path / '*' / '*.png',
            '--config',
            config,
            '--checkpoint',
            tmp_path / 'weights.pth',
            '--out-dir',
            out,
            '--point',
            '0.2',
            '0.9',
        ),
        *('--of', 'super_token', '--head', '1', '--stage', '1', '4', '--block', '1'),
        *('--size', '200'),
    )
    assert 'pictures of 2 images' in result.stdout
    kinds = [f'stage{s}_{k}' for s in (1, 4) for k in ('attention', 'borders', 'colours')]
    written = {str(path.relative_to(out)) for path in out.rglob('*.png')}
    assert written == {f'{i}/same_{kind}.png' for i in range(2) for kind in ['sheet', *kinds]}
    assert max(cv2.imread(str(out / '0' / 'same_stage1_borders.png')).shape) == 200


def test_random_weights_show_no_attention(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), picture(40, 64))
    config = ROOT / 'configs' / 'svit_classifier_shapes.py'
    out = tmp_path / 'out'
    run_python(TOOL, tmp_path / 'a.png', '--config', config, '--out-dir', out, '--size', '64')
    kinds = {path.stem.rpartition('_')[2] for path in out.iterdir()}
    assert kinds == {'sheet', 'borders', 'colours'}
    refused = run_python(
        *(TOOL, tmp_path / 'a.png', '--config', config, '--point', '0.1', '0.1'), check=False
    )
    assert refused.returncode == 2 and 'need --checkpoint' in refused.stderr


def tool_says(monkeypatch, capsys, *arguments: object) -> str:
    """What the tool says when it ends without drawing."""
    monkeypatch.setattr('sys.argv', [TOOL, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        import_tool('visualize_super_tokens').main()
    return capsys.readouterr().err + str(end.value)


def test_tool_overwrites_no_image(tmp_path, monkeypatch, capsys):
    """Neither one that is to be read, nor the pictures of another."""
    for name in ('cup.png', 'cup_stage1_borders.png', 'other/cup.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), picture(40, 40))
    monkeypatch.chdir(tmp_path)
    for images, message in (
        (['.'], 'cup_stage1_borders.png, a picture of cup.png, is one of the images'),
        (['cup.png', 'other/cup.jpg'], 'have the same name'),
    ):
        options = ['--config', CLASSIFIER, '--out-dir', '.']
        assert message in tool_says(monkeypatch, capsys, *images, *options)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([ROOT / 'README.md'], 'not an image'),
        ([ROOT / 'docs/images/quickstart.jpg', '--stage', '7'], 'there is no stage 7'),
        (['huge.png'], 'huge.png is not an image that can be read'),
        ([ROOT / 'docs/images/quickstart.jpg', '--device', 'qpu'], "device 'qpu' cannot be used"),
        ([ROOT / 'docs/images/quickstart.jpg', '--config', 'typo.py'], 'SViTT is not in the'),
    ],
)
def test_tool_refuses_before_it_works(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('huge.png').write_bytes(png(15_000, 13_000))
    typo = f"_base_ = '{CLASSIFIER}'\nmodel = dict(backbone=dict(type='mmsvit.SViTT'))\n"
    Path('typo.py').write_text(typo)
    assert message in tool_says(monkeypatch, capsys, '--config', CLASSIFIER, *arguments)
    assert not Path('super_tokens').exists()


@pytest.mark.parametrize('config', ['svit_maskrcnn_shapes', 'svit_upernet_shapes'])
def test_predictions_of_small_images_are_drawn_large(config, tmp_path):
    model = ImageModel(Config.fromfile(ROOT / 'configs' / f'{config}.py'))
    for module in model.model.modules():
        if hasattr(module, 'fc_cls'):
            module.fc_cls.bias.data[1] = 5  # Everything is a square.
    cv2.imwrite(str(tmp_path / 'a.png'), picture(80, 60))
    sample = model.predict(model.prepare(tmp_path / 'a.png'))
    image = picture(80, 60)[..., ::-1].copy()
    drawn = model.draw_prediction(image, sample)
    assert drawn.shape == (640, 480, 3)
    found = model.describe_prediction(sample)
    assert found and all(re.fullmatch(r'[\d.]+%', figure) for _, figure in found)
    if 'maskrcnn' in config:
        assert {name for name, _ in found} == {'square'}


def test_panoptic_predictions_are_drawn_and_described(tmp_path):
    cfg = Config.fromfile(config_path('mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'))
    backbone = dict(type='mmsvit.SViT', arch=small_arch())
    cfg.merge_from_dict({'model.backbone': dict(_delete_=True, **backbone)})
    cfg.model.neck.in_channels = [8, 12, 16, 24]
    cfg.model.test_cfg.rcnn.score_thr = 2.0  # No things, which random weights find everywhere.
    cfg.model.test_cfg.panoptic.stuff_area_limit = 1
    cfg.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    torch.manual_seed(0)
    model = ImageModel(cfg)
    cv2.imwrite(str(tmp_path / 'a.png'), picture(80, 60))
    sample = model.predict(model.prepare(tmp_path / 'a.png'))
    found = model.describe_prediction(sample)
    stuff = model.dataset_meta['stuff_classes']
    assert found and all(name in stuff for name, _ in found)
    shares = [float(share.rstrip('%')) for _, share in found]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5
    assert model.draw_prediction(picture(80, 60), sample).shape == (640, 480, 3)
    # A thing is itself and its number; what is behind the classes is nothing at all.
    ids = torch.full((1, 80, 60), len(model.dataset_meta['classes']))
    sample.pred_panoptic_seg.sem_seg = ids.clone()
    assert model.describe_prediction(sample) == []
    assert model.draw_prediction(picture(80, 60), sample).shape == (80, 60, 3)
    ids[:, :20], ids[:, 20:40] = 2, 2 + 1000
    sample.pred_panoptic_seg.sem_seg = ids
    assert model.describe_prediction(sample) == [('car', '25.0%')] * 2


class TinyModel(BaseModel):
    """A model that a runner can train in a second."""

    def __init__(self, **changes: tuple) -> None:
        super().__init__(dict(type='ImgDataPreprocessor', mean=[120] * 3, std=[60] * 3))
        self.backbone = SViT(small_arch(**changes), out_indices=(0, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        features = self.backbone(inputs)
        if mode == 'loss':
            return dict(loss=sum(f.square().mean() for f in features))
        return [BaseDataElement() for _ in inputs]


class FirstOfTwo(BaseTTAModel):
    """Test-time augmentation that takes the first prediction."""

    merged = 0

    def merge_preds(self, data_samples_list: list) -> list:
        self.merged += len(data_samples_list)
        return [samples[0] for samples in data_samples_list]


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict:
        return dict(inputs=torch.from_numpy(picture(64, 48, i)).permute(2, 0, 1))


class Flipped(Images):
    """Each image twice, as test-time augmentation has them."""

    def __getitem__(self, i: int) -> dict:
        image = super().__getitem__(i)['inputs']
        return dict(inputs=[image, image.flip(2)])


def runner_with_hook(work_dir, model, cfg: dict | None = None, **settings) -> Runner:
    loader = dict(
        dataset=Images(),
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    return Runner(
        model,
        work_dir=str(work_dir),
        experiment_name=str(work_dir).replace('/', '_'),
        train_dataloader=loader,
        val_dataloader=loader,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=4),
        val_cfg=dict(),
        val_evaluator=[],
        test_dataloader={**loader, 'dataset': Flipped()},
        test_cfg=dict(),
        test_evaluator=[],
        custom_hooks=[dict(type='mmsvit.SuperTokenVisualizationHook', **settings)],
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
        ),
        default_scope='mmengine',
        cfg=Config(cfg or {}),
    )


def train_with_hook(work_dir, model=TinyModel, **settings) -> Runner:
    runner = runner_with_hook(work_dir, model(), **settings)
    runner.train()
    return runner


def test_hook_draws_into_all_back_ends(tmp_path):
    event_accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    runner = train_with_hook(tmp_path, interval=2, val_images=3)
    names = {path.name for path in tmp_path.glob('*/vis_data/vis_image/*.png')}
    train = {f'super_tokens_train_{step}.png' for step in (2, 4)}
    assert names == train | {f'super_tokens_val_{i}_4.png' for i in range(3)}
    (events,) = tmp_path.glob('*/vis_data/events.out.tfevents*')
    accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
    assert len(accumulator.Tags()['images']) == 1 + 3
    assert not any(m._forward_pre_hooks for m in runner.model.modules())


def test_hook_is_silent_if_told_and_refuses_early(tmp_path):
    train_with_hook(tmp_path / 'none', interval=0, val_images=0)
    assert not list((tmp_path / 'none').glob('*/vis_data/vis_image/*'))
    with pytest.raises(ValueError, match='there is no stage 4'):
        train_with_hook(tmp_path / 'stage', stages=[3])
    assert not list((tmp_path / 'stage').glob('iter_*.pth'))
    with pytest.raises(ValueError, match='0 or more'):
        train_with_hook(tmp_path / 'interval', interval=-1)
    with pytest.raises(ValueError, match='cannot look into a compiled step'):
        train_with_hook(tmp_path / 'compiled', cfg=dict(compile=dict(dynamic=False)))
    with pytest.raises(ValueError, match='no stage of this backbone samples'):
        train_with_hook(tmp_path / 'global', lambda: TinyModel(super_token_sizes=(1, 1, 1, 1)))


def test_hook_leaves_test_time_augmentation_alone(tmp_path):
    model = FirstOfTwo(TinyModel())
    runner_with_hook(tmp_path, model).test()
    assert model.merged == 6 and not list(tmp_path.glob('*/vis_data/vis_image/*'))


def log(folder, *records: dict) -> None:
    file = folder / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, records)))


def test_curves_of_a_resumed_run(tmp_path):
    first = [dict(loss=3.0, iter=10, step=10), dict(loss=9.0, iter=20, step=20)]
    log(tmp_path / '1', *first, {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2, 'step': 1})
    log(tmp_path / '2', dict(loss=2.0, iter=20, step=20), {'coco/bbox_mAP': 0.3, 'step': 2})
    curves = read_curves(tmp_path)
    assert curves['loss'] == ([10, 20], [3.0, 2.0])
    assert curves['coco/bbox_mAP'] == ([1, 2], [0.1, 0.3])
    assert choose_metrics(sorted(curves)) == ['coco/bbox_mAP']
    figure = draw_curves({'a': curves, 'b': curves}, ['loss'], ['coco/bbox_mAP'])
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    with pytest.raises(ValueError, match=r"no run has \['los'\]; available: .*'loss'"):
        draw_curves({'a': curves}, ['los'], [])
    out = tmp_path / 'curves.svg'
    run_python('tools/plot_log.py', tmp_path, '--out', out)
    assert '<svg' in out.read_text()
    file = tmp_path / '2' / 'vis_data' / 'scalars.json'
    file.write_text(file.read_text() + '\n{"loss": 1.0, "it')  # A kill cut it off.
    assert read_curves(tmp_path) == curves
    file.write_text('not json\n')
    with pytest.raises(ValueError, match='line 1: expected a record'):
        read_curves(tmp_path)
    with pytest.raises(FileNotFoundError, match='no log of a run'):
        read_curves(tmp_path / '3')


def epochs(first: int, last: int, by_epoch: bool, loss: float) -> list[dict]:
    """What a run of two iterations an epoch logs."""
    records = []
    for epoch in range(first, last + 1):
        for i in (2 * epoch - 1, 2 * epoch):
            record = dict(loss=loss, time=0.1, iter=i, step=i)
            records.append({**record, 'epoch': epoch} if by_epoch else record)
        records.append(dict(mIoU=loss, time=7.0, step=epoch if by_epoch else 2 * epoch))
    return records


@pytest.mark.parametrize('by_epoch', [True, False])
def test_curves_leave_out_what_was_abandoned(tmp_path, by_epoch):
    log(tmp_path / '1', *epochs(1, 4, by_epoch, 9.0))
    log(tmp_path / '2', *epochs(3, 3, by_epoch, 5.0)[:1])  # Resumed, and has not caught up.
    curves = read_curves(tmp_path)
    assert curves['loss'] == ([1, 2, 3, 4, 5], [9.0] * 4 + [5.0])
    assert curves['mIoU'] == ([1, 2] if by_epoch else [2, 4], [9.0] * 2)
    assert curves['time'][1] == [0.1] * 5
    log(tmp_path / '3', *epochs(1, 2, by_epoch, 1.0))  # Begun anew in the same folder.
    curves = read_curves(tmp_path)
    assert curves['loss'] == ([1, 2, 3, 4], [1.0] * 4)
    assert curves['mIoU'] == ([1, 2] if by_epoch else [2, 4], [1.0] * 2)


def test_contact_sheet_shows_pictures_as_they_were_drawn(tmp_path):
    """Lines that are made thinner by resizing are not seen any more."""
    quickstart = import_tool('quickstart')
    tile = quickstart.TILE
    for i in range(2):
        both = np.hstack([picture(tile, tile, 10 * i), picture(tile, tile, 10 * i + 1)])
        cv2.imwrite(str(tmp_path / f'{i}.png'), both[..., ::-1])
        for j, kind in enumerate(('borders', 'colours', 'attention'), 2):
            file = tmp_path / f'{i}_stage1_{kind}.png'
            cv2.imwrite(str(file), picture(tile, tile, 10 * i + j)[..., ::-1])
    images = [Path('data', f'{i}.png') for i in range(2)]
    sheet = quickstart.contact_sheet(images, tmp_path, tmp_path)
    step = tile + quickstart.GAP
    for i in range(2):
        for j in range(5):
            top, left = quickstart.HEADING + i * step, j * step
            shown = sheet[top : top + tile, left : left + tile]
            np.testing.assert_array_equal(shown, picture(tile, tile, 10 * i + j))
    headings = sheet[: quickstart.HEADING]
    assert all((headings[:, j * step : j * step + tile] < 128).any() for j in range(5))


def test_report_is_one_file_without_references(tmp_path):
    report = HtmlReport('a < b')
    report.table(('', 'AP'), [('<script>', '0.5')])
    report.picture(picture(20, 30), 'a "picture"')
    report.code('python x.py')
    report.write(tmp_path / 'report.html')
    page = (tmp_path / 'report.html').read_text()
    assert '<script>' not in page and '&lt;script&gt;' in page
    assert not re.search(r'(src|href)="(?!data:)', page) and 'url(' not in page
    assert page.count('src="data:image/jpeg;base64,') == 1
