"""ImageNet classification through mmpretrain: exact to the published classifier, end to end."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, golden_arch, run_python, small_arch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn import functional as F

from mmsvit.checkpoint import model_state_dict, read_checkpoint
from mmsvit.datasets.quick_checks import check_data
from mmsvit.engine.hooks.check_dataset_hook import CheckDatasetHook
from mmsvit.models.projection_pooling import ProjectionPooling

MMPRETRAIN = Path(find_spec('mmpretrain').origin).parent
TOOLS = {'mmpretrain': MMPRETRAIN / '.mim' / 'tools', 'mmsvit': ROOT / 'tools'}
SHAPES = ROOT / 'configs' / 'svit_classifier_shapes.py'
IMAGENET = sorted((ROOT / 'configs' / 'svit').glob('*.py'))
CLASSES = ('circle', 'ring', 'square', 'star', 'triangle')


def published(name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(GOLDEN / f'{name}.pth')['model']


def golden_model_cfg(name: str) -> dict:
    """A classifier with the architecture of a golden checkpoint."""
    num_classes, channels = published(name)['head.weight'].shape
    arch = golden_arch(name)
    width = arch['embed_dims'][-1]
    return dict(
        type='ImageClassifier',
        backbone=dict(type='mmsvit.SViT', arch=arch, out_indices=(3,)),
        neck=dict(type='mmsvit.ProjectionPooling', in_channels=width, out_channels=channels),
        head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=channels),
    )


def build(cfg: dict) -> nn.Module:
    init_default_scope('mmpretrain')
    return MODELS.build(cfg)


def published_logits(name: str, features: torch.Tensor) -> torch.Tensor:
    """The published classifier behind its last stage, written out."""
    weights = published(name)
    x = torch.einsum('oc,nchw->nohw', weights['proj.weight'][..., 0, 0], features)
    x = x + weights['proj.bias'].view(-1, 1, 1)
    mean, variance = weights['norm.running_mean'], weights['norm.running_var']
    scale = weights['norm.weight'] / (variance + 1e-5).sqrt()
    x = (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + weights['norm.bias'].view(-1, 1, 1)
    x = (x * torch.sigmoid(x)).flatten(2).mean(2)
    return F.linear(x, weights['head.weight'], weights['head.bias'])


@pytest.mark.parametrize(
    ('name', 'size'),
    [('tiny', '64x64'), ('tiny', '97x131'), ('coarse', '128x96'), ('coarse', '75x200')],
)
def test_the_authors_file_classifies_as_published(name, size):
    golden = np.load(GOLDEN / f'{name}.npz')
    model = build(golden_model_cfg(name)).eval()
    load_checkpoint(model, str(GOLDEN / f'{name}.pth'), map_location='cpu', strict=True)
    with torch.no_grad():
        found = model(torch.from_numpy(golden[f'{size}/input']))
        expected = published_logits(name, torch.from_numpy(golden[f'{size}/stage3']))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('name', ['tiny', 'coarse'])
def test_every_published_weight_has_a_place(name):
    found = model_state_dict(read_checkpoint(GOLDEN / f'{name}.pth'))
    constants = [key for key in published(name) if key.endswith(('unfold.weights', 'fold.weights'))]
    assert len(found) == len(published(name)) - len(constants)
    expected = build(golden_model_cfg(name)).state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda w: w.pop('proj.weight'), 'neck.proj.weight'),
        (lambda w: w.pop('head.bias'), 'head.fc.bias'),
        (lambda w: w.pop('layers.2.blocks.0.norm2.weight'), 'stages.2.blocks.0.norm2.weight'),
        (lambda w: w.update({'norm.extra': torch.zeros(1)}), 'neck.norm.extra'),
        (lambda w: w.update(extra=torch.zeros(1)), 'extra'),
        (lambda w: w.update({'head.weight': torch.zeros(7, 64)}), 'head.fc.weight'),
    ],
)
def test_one_weight_wrong_is_named(tmp_path, change, named):
    weights = published('tiny')
    change(weights)
    torch.save(dict(model=weights), tmp_path / 'broken.pth')
    model = build(golden_model_cfg('tiny'))
    with pytest.raises((RuntimeError, ValueError), match=named.replace('.', r'\.')):
        load_checkpoint(model, str(tmp_path / 'broken.pth'), map_location='cpu', strict=True)


def test_the_authors_file_of_another_arch_is_refused_even_where_mmengine_warns():
    cfg = golden_model_cfg('tiny')
    cfg['backbone']['arch'] = small_arch()
    with pytest.raises(ValueError, match=r"authors' file does not fit.*depths \[2, 2, 2, 1\]"):
        load_checkpoint(build(cfg), str(GOLDEN / 'tiny.pth'), map_location='cpu')


def test_converted_classifier(tmp_path):
    out = tmp_path / 'classifier.pth'
    run_python('tools/convert_checkpoint.py', GOLDEN / 'tiny.pth', out, '--classifier')
    torch.serialization.clear_safe_globals()
    converted = torch.load(out, weights_only=True)['state_dict']
    model, original = build(golden_model_cfg('tiny')), build(golden_model_cfg('tiny'))
    model.load_state_dict(converted, strict=True)
    load_checkpoint(original, str(GOLDEN / 'tiny.pth'), map_location='cpu', strict=True)
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    # A detector's backbone takes the whole classifier, too.
    checkpoint = dict(type='Pretrained', checkpoint=str(out))
    build(dict(type='mmsvit.SViT', arch=golden_arch('tiny'), init_cfg=checkpoint)).init_weights()

    run_python('tools/convert_checkpoint.py', GOLDEN / 'tiny.pth', tmp_path / 'backbone.pth')
    arguments = [tmp_path / 'backbone.pth', tmp_path / 'x.pth', '--classifier']
    refused = run_python('tools/convert_checkpoint.py', *arguments, check=False)
    assert refused.returncode != 0 and 'holds no classifier' in refused.stderr
    assert not (tmp_path / 'x.pth').exists()


def test_neck():
    neck = ProjectionPooling(6, 10, norm_eval=True).train()
    before = neck.norm.running_mean.clone()
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 6, 5, 3)]
    (vectors,) = neck(maps)
    assert vectors.shape == (2, 10) and torch.equal(neck.norm.running_mean, before)
    neck.norm_eval = False
    neck.train()(maps)
    assert not torch.equal(neck.norm.running_mean, before)


# --- configs ------------------------------------------------------------------------------


@pytest.mark.parametrize('path', IMAGENET, ids=lambda path: path.stem)
def test_imagenet_config_is_the_published_setting(path):
    cfg = Config.fromfile(path)
    arch, fine_tuning = path.stem.split('_')[0][5:], '384' in path.stem
    with torch.device('meta'):
        model = build(cfg.model)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    expected = {'small': 25.5, 'base': 52, 'large': 95}[arch]
    assert abs(parameters - expected) <= 0.01 * expected
    assert model.backbone.norm_eval == model.neck.norm_eval == fine_tuning
    assert model.backbone.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(
        0 if fine_tuning else {'small': 0.1, 'base': 0.4, 'large': 0.4}[arch]
    )
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW'
    assert optimizer.lr == pytest.approx(5e-6 if fine_tuning else 1e-3)
    assert optimizer.weight_decay == (1e-8 if fine_tuning else 0.05)
    assert cfg.train_cfg.max_epochs == (30 if fine_tuning else 300)
    # As the file's name says: 8 GPUs of so many images.
    assert f'8xb{cfg.train_dataloader.batch_size}_' in path.stem
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
    size = 384 if fine_tuning else 224
    assert cfg.train_dataloader.dataset.pipeline[1].scale == size
    assert cfg.train_dataloader.dataset.pipeline[3].type == 'RandAugment'
    resize, crop = cfg.test_dataloader.dataset.pipeline[1:3]
    assert crop == dict(type='CenterCrop', crop_size=size)
    assert (resize.edge, resize.scale) == ('short', 384 if fine_tuning else 256)
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.load_from == (f'checkpoints/stvit-{arch}-224.pth' if fine_tuning else None)


def small_imagenet_config(path: Path) -> Config:
    """An ImageNet config with a model that runs in milliseconds."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'model.backbone.arch': None, 'model.neck.in_channels': 24})
    cfg.model.backbone.arch = small_arch()
    cfg.model.data_preprocessor = cfg.data_preprocessor
    return cfg


@pytest.mark.parametrize('path', IMAGENET, ids=lambda path: path.stem)
def test_imagenet_config_takes_a_step(path):
    from mmpretrain.structures import DataSample

    torch.manual_seed(0)
    cfg = small_imagenet_config(path)
    cfg.model.backbone.with_cp = True
    model = build(cfg.model)
    model.init_weights()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(label) for label in (0, 5, 17, 999)]
    data = dict(inputs=images, data_samples=samples)
    model.train()
    loss = model(**model.data_preprocessor(data, True), mode='loss')['loss']
    assert torch.isfinite(loss)
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # What gets no gradient stops a distributed run.
    model.train_step(data, optim_wrapper)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(model.train_step(data, optim_wrapper)['loss'])
    model.eval()
    with torch.no_grad():
        predicted = model.test_step(data)
    assert predicted[0].pred_score.shape == (1000,)


def test_the_learning_rate_is_the_authors_in_each_of_the_300_epochs():
    """Timm's CosineLRScheduler (warm-up of 5 without prefix), stepped after each epoch with its number."""
    cfg = Config.fromfile(IMAGENET[0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [
        PARAM_SCHEDULERS.build(each, default_args=dict(optimizer=optimizer, end=300))
        for each in cfg.param_scheduler
    ]
    for epoch in range(300):
        t = max(epoch - 1, 0)
        expected = 1e-6 + t * (1e-3 - 1e-6) / 5
        if t >= 5:
            expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 300)) / 2
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12), epoch
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


# --- data ---------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def image_folders(tmp_path_factory) -> Path:
    """The generated classification data set, of a few small images."""
    folder = tmp_path_factory.mktemp('data') / 'shapes_classification'
    sizes = ['--num-train', '24', '--num-val', '10', '--size', '64']
    run_python('tools/make_shapes_dataset.py', folder, '--task', 'classification', *sizes)
    return folder


def test_generated_folders(image_folders):
    images = {}
    for split, count in (('train', 24), ('val', 10)):
        assert sorted(path.name for path in (image_folders / split).iterdir()) == list(CLASSES)
        files = list((image_folders / split).glob('*/*.jpg'))
        assert sorted(path.stem for path in files) == [f'{i:06d}' for i in range(count)]
        assert min(len(list(image_folders.glob(f'{split}/{name}/*'))) for name in CLASSES) >= 2
        images[split] = {path.read_bytes() for path in files}
    assert not images['train'] & images['val']


@pytest.mark.parametrize(
    ('hue', 'name'), enumerate(('circle', 'square', 'triangle', 'star', 'ring'))
)
def test_folders_tell_the_truth(image_folders, hue, name):
    right = []
    for file in image_folders.glob(f'*/{name}/*.jpg'):
        pixels = cv2.imread(str(file)).astype(np.float32)
        colour = np.ptp(pixels, axis=2)
        strong = cv2.cvtColor(pixels / 255, cv2.COLOR_BGR2HSV)[colour > 0.8 * colour.max()]
        angle = np.angle(np.exp(1j * np.deg2rad(strong[:, 0])).mean(), deg=True)
        right.append(round(angle / 72) % 5 == hue)
    assert np.mean(right) > 0.7  # Some backgrounds have the stronger colour.


def test_missing_imagenet_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / 'configs' / 'svit' / 'svit-small_8xb128_in1k.py')
    with pytest.raises(FileNotFoundError) as error:
        check_data(cfg, ('train', 'val'))
    assert f'train_dataloader.dataset.data_root: {tmp_path}/data/imagenet\n' in str(error.value)
    assert f'val_dataloader.dataset.split: {tmp_path}/data/imagenet/val\n' in str(error.value)
    for split in ('train', 'val'):
        (tmp_path / 'data' / 'imagenet' / split).mkdir(parents=True)
    check_data(cfg, ('train', 'val'))


def check_folders(head: int = 5, preprocessor: int = 5, **datasets: object) -> None:
    loaders = {
        f'{split}_dataloader': SimpleNamespace(dataset=dataset)
        for split, dataset in datasets.items()
    }
    model = nn.Module()
    model.head, model.data_preprocessor = nn.Module(), nn.Module()
    model.head.num_classes, model.data_preprocessor.num_classes = head, preprocessor
    CheckDatasetHook().before_train(SimpleNamespace(model=model, val_loop=1, **loaders))


def test_class_folders_must_mean_the_same_everywhere(image_folders, tmp_path):
    from mmpretrain.datasets import CustomDataset

    def dataset(folder, **arguments):
        return CustomDataset(data_root=str(folder), **arguments)

    train, val = (dataset(image_folders / split) for split in ('train', 'val'))
    check_folders(train=train, val=val)
    with pytest.raises(ValueError, match=r'^head\.num_classes is 7, but .* 5 classes'):
        check_folders(head=7, train=train, val=val)
    with pytest.raises(ValueError, match=r'data_preprocessor\.num_classes is 1000'):
        check_folders(preprocessor=1000, train=train, val=val)
    order = ('circle', 'square', 'triangle', 'star', 'ring')
    with pytest.raises(ValueError, match='another order than the folders'):
        check_folders(train=dataset(image_folders / 'train', metainfo=dict(classes=order)), val=val)
    # Names that are not the folders', as ImageNet's, are anybody's guess.
    names = dataset(image_folders / 'train', metainfo=dict(classes=('a', 'b', 'c', 'd', 'e')))
    check_folders(train=names, val=val)
    shutil.copytree(image_folders / 'val', tmp_path / 'val')
    shutil.rmtree(tmp_path / 'val' / 'circle')
    with pytest.raises(ValueError, match=r"only train has \['circle'\]"):
        check_folders(train=train, val=dataset(tmp_path / 'val'))


# --- the whole way ------------------------------------------------------------------------


def options(folder: Path) -> list[str]:
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    changes = ['num_workers=0', 'persistent_workers=False', f'dataset.data_root={folder}/']
    return [
        '--cfg-options',
        *(f'{loader}.{change}' for loader in loaders for change in changes),
        'train_dataloader.batch_size=8',
        'default_hooks.logger.interval=1',
        'train_cfg.max_epochs=1',
    ]


INFERENCER = """
import json, sys
from mmpretrain import ImageClassificationInferencer
config, checkpoint, image, out = sys.argv[1:]
inferencer = ImageClassificationInferencer(config, pretrained=checkpoint, device='cpu')
(result,) = inferencer(image)
with open(out, 'w') as file:
    json.dump(dict(scores=result['pred_scores'].tolist(), name=result.get('pred_class')), file)
"""


@pytest.mark.slow
@pytest.mark.parametrize('tools', ['mmpretrain', 'mmsvit'])
def test_trains_evaluates_and_infers(tools, image_folders, tmp_path):
    # In a folder from which mmsvit cannot be imported by accident.
    work_dir = ['--work-dir', tmp_path]
    train = TOOLS[tools] / 'train.py'
    result = run_python(train, SHAPES, *work_dir, *options(image_folders), cwd=tmp_path)
    assert 'Epoch(train) [1][3/3]' in result.stdout + result.stderr
    assert 'accuracy/top1' in result.stdout + result.stderr

    checkpoint, out = tmp_path / 'epoch_1.pth', tmp_path / 'out.pkl'
    test = [TOOLS[tools] / 'test.py', SHAPES, checkpoint, *work_dir, '--out', out]
    run_python(*test, *options(image_folders), cwd=tmp_path)
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 10

    image = sorted(image_folders.glob('val/*/*.jpg'))[0]
    run_python('-c', INFERENCER, SHAPES, checkpoint, image, tmp_path / 'result', cwd=tmp_path)
    found = json.loads((tmp_path / 'result').read_text())
    np.testing.assert_allclose(found['scores'], predictions[0]['pred_score'], rtol=1e-4, atol=1e-5)
    assert found['name'] in CLASSES

    less = torch.load(checkpoint, weights_only=False)
    less['state_dict'].pop('neck.proj.bias')
    torch.save(less, tmp_path / 'less.pth')
    test[2] = tmp_path / 'less.pth'
    result = run_python(*test, *options(image_folders), cwd=tmp_path, check=False)
    assert result.returncode != 0 and 'neck.proj.bias' in result.stderr


@pytest.mark.slow
def test_the_authors_file_goes_through_every_tool(tmp_path):
    num_classes = 10
    rng = np.random.default_rng(0)
    for i in range(num_classes):
        (tmp_path / 'val' / f'class_{i}').mkdir(parents=True)
        image = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / 'val' / f'class_{i}' / '0.png'), image)
    config = tmp_path / 'golden.py'
    arch = {'_delete_': True, **golden_arch('tiny')}
    # With an average of the weights, which reads the checkpoint by itself.
    config.write_text(
        f'_base_ = {str(IMAGENET[-1].with_name("svit-small_8xb128_in1k.py"))!r}\n'
        f'model = dict(backbone=dict(arch={arch}), neck=dict(in_channels=128, out_channels=64), '
        f'head=dict(in_channels=64, num_classes={num_classes}))\n'
        f'data_preprocessor = dict(num_classes={num_classes})\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="EMAHook", momentum=4e-5)]\n'
        'dataset = dict(_delete_=True, type="CustomDataset", data_prefix="val", '
        f'data_root={str(tmp_path)!r}, pipeline=_base_.test_pipeline)\n'
        'test_dataloader = dict(dataset=dataset, num_workers=0, persistent_workers=False)\n'
    )
    scores = {}
    for name, tools in TOOLS.items():
        out = tmp_path / f'{name}.pkl'
        arguments = [config, GOLDEN / 'tiny.pth', '--work-dir', tmp_path, '--out', out]
        run_python(tools / 'test.py', *arguments, cwd=tmp_path)
        scores[name] = [result['pred_score'].tolist() for result in pickle.loads(out.read_bytes())]
    image = tmp_path / 'val' / 'class_0' / '0.png'
    result = tmp_path / 'result'
    run_python('-c', INFERENCER, config, GOLDEN / 'tiny.pth', image, result, cwd=tmp_path)
    found = json.loads(result.read_text())['scores']

    cfg = Config.fromfile(config)
    model = build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}).eval()
    model.load_state_dict(model_state_dict(read_checkpoint(GOLDEN / 'tiny.pth')), strict=True)
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(data_root=str(tmp_path / 'val'), pipeline=cfg.test_pipeline)
    with torch.no_grad():
        predicted = model.test_step(dict(inputs=[dataset[0]['inputs']]))
    expected = predicted[0].pred_score.numpy()
    for result in (scores['mmpretrain'][0], scores['mmsvit'][0], found):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
