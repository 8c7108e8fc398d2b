"""The whole way through the stock runner: train, save, resume, test, infer."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import sysconfig
from argparse import Namespace
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GOLDEN,
    ROOT,
    activated,
    free_port,
    golden_arch,
    import_tool,
    run_python,
    small_arch,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper
from torch import nn

from mmsvit import SViT
from mmsvit.checkpoint import check_weights_are_there, read_checkpoint
from mmsvit.cli import is_refusal
from mmsvit.compat.mmcv_ext import is_stand_in
from mmsvit.engine.hooks.strict_checkpoint_hook import StrictCheckpointHook

# What tools/setup_env.py leaves, so that every program has the stand-in for mmcv's ops.
STAND_IN_FILE = Path(sysconfig.get_paths()['purelib'], 'mmsvit-ops.pth')

CONFIG = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'
MMDET_TOOLS = Path(find_spec('mmdet').origin).parent / '.mim' / 'tools'
CHECKPOINT_KEYS = ('state_dict', 'optimizer', 'message_hub', 'meta')


def options(shapes: Path, *more: str) -> list[str]:
    """The example config on the small data set: one epoch of four images at a time."""
    return [
        '--cfg-options',
        f'train_dataloader.dataset.data_root={shapes}/',
        f'val_dataloader.dataset.data_root={shapes}/',
        f'test_dataloader.dataset.data_root={shapes}/',
        f'val_evaluator.ann_file={shapes}/annotations/instances_val.json',
        f'test_evaluator.ann_file={shapes}/annotations/instances_val.json',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=1',
        *more,
    ]


@pytest.fixture(scope='module', params=['mmdet', 'mmsvit'])
def trained(request, shapes, tmp_path_factory):
    """A run of one epoch and its resumption for a second, by mmdet's own tool and by ours."""
    tool = {'mmdet': MMDET_TOOLS, 'mmsvit': ROOT / 'tools'}[request.param] / 'train.py'
    work_dir = tmp_path_factory.mktemp(request.param)
    # In a folder from which mmsvit cannot be imported by accident.
    arguments = [tool, CONFIG, '--work-dir', work_dir]
    run_python(*arguments, *options(shapes, 'train_cfg.max_epochs=1'), cwd=work_dir)
    assert (work_dir / 'epoch_1.pth').is_file()
    longer = ('train_cfg.max_epochs=2', 'default_hooks.run_record.force_resume=True')
    result = run_python(*arguments, '--resume', *options(shapes, *longer), cwd=work_dir)
    return request.param, work_dir, result.stdout + result.stderr


@pytest.mark.slow
def test_trains_resumes_and_evaluates(trained):
    _, work_dir, output = trained
    assert 'resumed epoch: 1, iter: 2' in output
    assert 'coco/bbox_mAP' in output and 'coco/segm_mAP' in output
    first, second = (torch.load(work_dir / f'epoch_{i}.pth', weights_only=False) for i in (1, 2))
    assert set(CHECKPOINT_KEYS) <= set(second)
    assert second['meta']['epoch'] == 2 and second['meta']['iter'] == 4
    weight = 'backbone.stages.0.blocks.0.attn.attend.qkv.weight'
    assert not torch.equal(first['state_dict'][weight], second['state_dict'][weight])


@pytest.mark.slow
def test_tests_a_checkpoint(trained, shapes, tmp_path):
    name, work_dir, _ = trained
    if name == 'mmdet' and is_stand_in() and not STAND_IN_FILE.is_file():
        pytest.skip("MMDetection's test.py imports mmcv's ops before it reads the config")
    tool = {'mmdet': MMDET_TOOLS, 'mmsvit': ROOT / 'tools'}[name] / 'test.py'
    out, shown = tmp_path / 'out.pkl', tmp_path / 'shown'
    run_python(
        *(tool, CONFIG, work_dir / 'epoch_2.pth', '--work-dir', tmp_path),
        *('--out', out, '--show-dir', shown),
        *options(shapes),
        cwd=tmp_path,
    )
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 4 and 'masks' in predictions[0]['pred_instances']
    assert len(list(shown.glob('*.jpg'))) == 4
    (metrics,) = tmp_path.glob('*/*.json')
    assert 'coco/segm_mAP' in json.loads(metrics.read_text())


@pytest.mark.slow
def test_deployed_backbone_finds_the_same(trained, shapes, tmp_path):
    name, work_dir, _ = trained
    if name == 'mmdet':
        pytest.skip("MMDetection's test.py has no --deploy")
    scores = []
    for deploy in ([], ['--deploy']):
        out = tmp_path / f'{len(deploy)}.pkl'
        arguments = [CONFIG, work_dir / 'epoch_2.pth', '--work-dir', tmp_path, '--out', out]
        run_python(ROOT / 'tools' / 'test.py', *arguments, *deploy, *options(shapes), cwd=tmp_path)
        scores.append(pickle.loads(out.read_bytes())[0]['pred_instances']['scores'])
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(scores[1], scores[0])  # It was another computation.


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused(trained, shapes, tmp_path):
    _, work_dir, _ = trained
    checkpoint = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    checkpoint['state_dict'].pop('backbone.stem.0.weight')
    torch.save(checkpoint, tmp_path / 'less.pth')
    (tmp_path / 'cut.pth').write_bytes((work_dir / 'epoch_2.pth').read_bytes()[:10_000])
    for file, message in (('less', 'backbone.stem.0.weight'), ('cut', 'is corrupt or incomplete')):
        arguments = [CONFIG, tmp_path / f'{file}.pth', '--work-dir', tmp_path, *options(shapes)]
        result = run_python(ROOT / 'tools' / 'test.py', *arguments, cwd=tmp_path, check=False)
        assert result.returncode != 0 and message in result.stderr


DETECTOR = """
import sys
import numpy as np
from mmdet.apis import inference_detector, init_detector
config, checkpoint, image, scores = sys.argv[1:]
model = init_detector(config, checkpoint, device='cpu')
single = inference_detector(model, image)
sizes = [(47, 95, 3), (80, 33, 3)]
several = inference_detector(model, [np.zeros(size, np.uint8) for size in sizes])
assert len(several) == 2 and 'masks' in several[1].pred_instances
assert model.dataset_meta['classes'][4] == 'ring'
np.save(scores, single.pred_instances.scores)
"""

INFERENCER = """
import sys
import numpy as np
from mmdet.apis import DetInferencer
config, checkpoint, image, scores, out = sys.argv[1:]
inferencer = DetInferencer(model=config, weights=checkpoint, device='cpu')
result = inferencer(image, out_dir=out)['predictions'][0]
np.testing.assert_allclose(result['scores'], np.load(scores), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_inference_apis_without_importing_mmsvit(trained, shapes, tmp_path):
    _, work_dir, _ = trained
    given = [
        CONFIG,
        work_dir / 'epoch_2.pth',
        shapes / 'val' / '000000.jpg',
        tmp_path / 'scores.npy',
    ]
    # Each in a process of its own: the one must not profit from what the other imports.
    # (Without compiled ops, mmsvit must be imported before MMDetection.)
    first = 'import mmsvit\n' if is_stand_in() else ''
    run_python('-c', first + DETECTOR, *given, cwd=tmp_path)
    run_python('-c', first + INFERENCER, *given, tmp_path / 'out', cwd=tmp_path)
    assert (tmp_path / 'out' / 'vis' / '000000.jpg').is_file()


@pytest.mark.slow
def test_super_token_pictures(trained, shapes, tmp_path):
    _, work_dir, _ = trained
    run_python(
        *('tools/visualize_super_tokens.py', *sorted((shapes / 'val').glob('*.jpg'))),
        *('--config', CONFIG, '--checkpoint', work_dir / 'epoch_2.pth', '--out-dir', tmp_path),
    )
    # For each image a sheet, and three pictures of two stages.
    assert len(list(tmp_path.glob('*.png'))) == 4 * (1 + 2 * 3)


@pytest.mark.slow
def test_two_processes(shapes, tmp_path):
    env = activated(PORT='29555')
    command = ['bash', ROOT / 'tools' / 'dist_train.sh', CONFIG, '2', '--work-dir', tmp_path]
    command += options(shapes, 'train_cfg.max_epochs=1')
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'Epoch(train) [1][1/1]' in result.stdout + result.stderr
    assert (tmp_path / 'epoch_1.pth').is_file()


@pytest.mark.parametrize('tool', ['train', 'mmdet'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('data', 'none/annotations'),
        ('classes', "do not have the classes ['hexagon']"),
        ('checkpoint', 'github.com/hhb072/STViT'),
        ('heads', 'num_classes'),
        ('neck', 'model.neck.in_channels is [64, 128, 320, 512]'),
    ],
)
def test_bad_input_ends_before_training(tool, change, message, shapes, tmp_path):
    changes = {
        'data': "train_dataloader = dict(dataset=dict(data_root='none/'))",
        'classes': "train_dataloader = dict(dataset=dict(metainfo=dict(classes=('circle', 'hexagon'))))",
        'checkpoint': "pretrained = dict(_delete_=True, type='Pretrained', checkpoint='x.pth')\n"
        'model = dict(backbone=dict(init_cfg=pretrained))',
        'heads': 'model = dict(roi_head=dict(bbox_head=dict(num_classes=7)))',
        'neck': 'model = dict(neck=dict(in_channels=[64, 128, 320, 512]))',
    }
    config = tmp_path / 'changed.py'
    path = {'train': ROOT / 'tools', 'mmdet': MMDET_TOOLS}[tool] / 'train.py'
    changed = [] if change == 'data' else [f'train_dataloader.dataset.data_root={shapes}/']
    config.write_text(f'_base_ = {str(CONFIG)!r}\n{changes[change]}\n')
    rest = [
        option for option in options(shapes) if not option.startswith('train_dataloader.dataset')
    ]
    arguments = [path, config, '--work-dir', tmp_path, *rest, *changed]
    result = run_python(*arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0 and message in result.stderr, result.stderr[-2000:]
    assert 'Epoch(train)' not in result.stdout + result.stderr
    assert tool == 'mmdet' or 'Traceback' not in result.stderr


def test_missing_config_and_wrong_options(shapes, tmp_path):
    def fails(*arguments):
        result = run_python(*arguments, cwd=tmp_path, check=False)
        assert result.returncode != 0
        return result.stderr

    assert 'nothing.py' in fails(ROOT / 'tools' / 'train.py', 'nothing.py')
    test = [ROOT / 'tools' / 'test.py', CONFIG, 'absent.pth', *options(shapes)]
    assert "'absent.pth' does not exist" in fails(*test)
    test = [ROOT / 'tools' / 'test.py', CONFIG, 'absent.pth', '--out', 'x.json']
    assert 'must end in .pkl' in fails(*test)
    train = [ROOT / 'tools' / 'train.py', CONFIG, '--auto-scale-lr', *options(shapes)]
    assert '--auto-scale-lr needs auto_scale_lr.base' in fails(*train, 'auto_scale_lr=None')


def test_auto_scale_lr_is_applied(shapes, tmp_path):
    more = ('train_dataloader.batch_size=2', 'train_cfg.max_epochs=0')
    arguments = ['--work-dir', tmp_path, '--auto-scale-lr', *options(shapes, *more)]
    result = run_python(ROOT / 'tools' / 'train.py', CONFIG, *arguments, cwd=tmp_path, check=False)
    assert 'Scaling the original LR by 0.5' in result.stdout + result.stderr


@pytest.mark.parametrize(
    ('wrapper', 'found'),
    [
        (dict(type='OptimWrapper'), dict(type='AmpOptimWrapper', loss_scale='dynamic')),
        (dict(type=AmpOptimWrapper), dict(type='AmpOptimWrapper', loss_scale='dynamic')),
        (dict(type='DeepSpeedOptimWrapper'), None),
    ],
)
def test_amp_replaces_no_wrapper_that_does_more(wrapper, found):
    cfg = Config(dict(optim_wrapper=wrapper))
    args = Namespace(
        config='mine.py', amp=True, auto_scale_lr=False, resume=None, ema=None, log_to=()
    )
    train = import_tool('train')
    if found is None:
        with pytest.raises(SystemExit, match=r'mine\.py has DeepSpeedOptimWrapper'):
            train.apply_options(cfg, args)
    else:
        train.apply_options(cfg, args)
        assert cfg.optim_wrapper == found


class TwoBranches(nn.Module):
    """As MMDetection's semi-supervised detectors are made."""

    def __init__(self) -> None:
        super().__init__()
        for branch in ('student', 'teacher'):
            setattr(self, branch, nn.ModuleDict(dict(backbone=SViT(small_arch()))))


@pytest.mark.parametrize('source', ['itself', 'detector'])
@pytest.mark.parametrize('damaged', ['', 'student.', 'teacher.'])
def test_every_backbone_of_a_model_is_held_to_load_from(source, damaged):
    model = TwoBranches()
    saved = model if source == 'itself' else model.student
    weights = dict(saved.state_dict())
    if damaged:
        branch = damaged if source == 'itself' else ''
        del weights[f'{branch}backbone.stem.0.weight']
    runner = SimpleNamespace(model=model, _load_from='checkpoint.pth')
    hook = StrictCheckpointHook(backbone_only=True)
    with pytest.raises(ValueError, match=r'stem\.0\.weight') if damaged else nullcontext():
        hook.after_load_checkpoint(runner, dict(state_dict=weights))


def test_load_from_takes_the_authors_file_under_our_names():
    model = nn.ModuleDict(dict(backbone=SViT(golden_arch('tiny'))))
    checkpoint = read_checkpoint(GOLDEN / 'tiny.pth')
    runner = SimpleNamespace(model=model, _load_from='tiny.pth')
    StrictCheckpointHook(backbone_only=True).after_load_checkpoint(runner, checkpoint)
    assert model.state_dict().keys() <= checkpoint['state_dict'].keys()


@pytest.mark.promise('Safety', 'Launch scripts run no modules or commands that they happen to find')
def test_a_module_of_the_current_folder_is_not_imported_by_torchrun(tmp_path):
    (tmp_path / 'copy.py').write_text('open("ran", "w")')
    environment = activated(PORT=free_port())
    command = ['bash', ROOT / 'tools' / 'dist_train.sh', 'no_such_config.py', '1']
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert 'no_such_config.py' in result.stderr + result.stdout
    assert not (tmp_path / 'ran').exists()


@pytest.mark.promise('Safety', 'Launch scripts run no modules or commands that they happen to find')
@pytest.mark.parametrize('name', ['GPUS', 'GPUS_PER_NODE'])
@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_a_command_in_place_of_a_number_is_refused(script, name, tmp_path):
    environment = {**os.environ, name: f'x[$(touch {tmp_path}/ran)]'}
    command = ['bash', ROOT / 'tools' / script, 'a', 'b', 'c', 'd']
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and 'must be whole numbers' in result.stderr
    assert not (tmp_path / 'ran').exists()


def test_scripts_say_how_to_call_them():
    for script in ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'):
        result = subprocess.run(
            ['bash', ROOT / 'tools' / script], capture_output=True, text=True, check=False
        )
        assert result.returncode == 2 and f'tools/{script}' in result.stderr


@pytest.mark.parametrize('options', [[], ['--debug']])
def test_a_refusal_is_a_sentence_and_a_traceback_on_demand(options, tmp_path):
    data = ['--cfg-options', f'train_dataloader.dataset.data_root={tmp_path}/']
    config = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'
    result = run_python('tools/train.py', config, *options, *data, check=False)
    assert result.returncode == 1
    assert str(tmp_path) in result.stderr
    assert ('Traceback' in result.stderr) == bool(options)
    if not options:
        assert result.stderr.startswith('train.py: the config names data that is not there')


def test_a_config_of_the_earlier_generation_is_named(tmp_path):
    (tmp_path / 'old.py').write_text(
        "model = dict(type='MaskRCNN')\n"
        "data = dict(samples_per_gpu=2, train=dict(type='CocoDataset'))\n"
        "optimizer = dict(type='AdamW', lr=1e-4)\nlr_config = dict(policy='step')\n"
    )
    for tool in ('train', 'check_dataset', 'get_flops'):
        result = run_python(f'tools/{tool}.py', tmp_path / 'old.py', check=False)
        assert result.returncode == 1 and 'Traceback' not in result.stderr
        assert 'is a config of MMDetection 2.x' in result.stderr
        assert '(data, optimizer, lr_config)' in result.stderr


def test_a_busy_port_is_named_with_the_way_out():
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        for script in ('dist_train.sh', 'dist_test.sh'):
            result = subprocess.run(
                ['bash', ROOT / 'tools' / script, 'config.py', '2', '2'],
                env=activated(PORT=str(port)),
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 1 and 'Traceback' not in result.stderr
            assert f'port {port} is in use' in result.stderr
            assert f'PORT={port + 1}' in result.stderr


def test_a_port_that_is_no_number_runs_nothing(tmp_path):
    result = subprocess.run(
        ['bash', ROOT / 'tools' / 'dist_train.sh', 'config.py', '2'],
        env=activated(PORT=f'a[$(touch {tmp_path}/ran)]'),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and 'PORT must be a number' in result.stderr
    assert not (tmp_path / 'ran').exists()


def test_what_nobody_refused_keeps_its_traceback():
    def fails():
        return int('x')

    for function, refused in ((fails, False), (lambda: SViT('nonsense'), True)):
        with pytest.raises(ValueError) as caught:
            function()
        assert is_refusal(caught.value) == refused


def test_resume_says_where_it_looked_and_what_it_found(tmp_path, caplog):
    train = import_tool('train')
    args = Namespace(
        amp=False, auto_scale_lr=False, resume='auto', config='config.py', ema=None, log_to=()
    )

    def resume() -> tuple[Config, str]:
        cfg = Config(dict(work_dir=str(tmp_path), custom_hooks=[]))
        # A logger that an earlier test made writes to that test's standard output.
        logger = MMLogger.get_current_instance()
        logger.addHandler(caplog.handler)
        try:
            train.apply_options(cfg, args)
        finally:
            logger.removeHandler(caplog.handler)
        said = caplog.text
        caplog.clear()
        return cfg, said

    cfg, said = resume()
    assert f"Nothing to resume: there is no checkpoint in '{tmp_path}'" in said
    assert cfg.resume is False and cfg.load_from is None
    meta = dict(epoch=1, iter=8)
    torch.save(dict(meta=meta, state_dict={}, optimizer={}), tmp_path / 'epoch_1.pth')
    cfg, said = resume()
    assert f'Resuming from {tmp_path / "epoch_1.pth"}.' in said
    assert cfg.resume is True and cfg.load_from == str(tmp_path / 'epoch_1.pth')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth'))),
            r"model\.backbone\.init_cfg\.checkpoint is 'gone\.pth'.*authors of SViT publish.*scratch",
        ),
        (
            dict(neck=dict(init_cfg=[dict(type='PretrainedInit', checkpoint='neck.pth')])),
            r"model\.neck\.init_cfg\.0\.checkpoint is 'neck\.pth', which does not exist$",
        ),
    ],
)
def test_missing_weights_are_found_before_anything_is_built(monkeypatch, shapes, change, message):
    train = import_tool('train')
    cfg = Config.fromfile(CONFIG)
    for part, settings in change.items():
        cfg.model[part].update(settings)
    monkeypatch.setattr(train, 'load_config', lambda args: cfg)
    monkeypatch.setattr(train, 'check_data', lambda *_: None)
    monkeypatch.setattr(train.Runner, 'from_cfg', lambda *_: pytest.fail('a runner is built'))
    monkeypatch.setattr(sys, 'argv', ['train.py', str(CONFIG)])
    with pytest.raises(FileNotFoundError, match=message):
        train.main()


def test_weights_of_the_web_are_not_looked_for():
    for path in ('https://example.com/a.pth', 'torchvision://resnet50'):
        check_weights_are_there(dict(init_cfg=dict(type='Pretrained', checkpoint=path)))


def test_averages_and_logs_by_an_option(monkeypatch):
    train = import_tool('train')
    command = ['train.py', str(CONFIG), '--ema', '--log-to', 'tensorboard', 'wandb']
    monkeypatch.setattr(sys, 'argv', command)
    args = train.parse_args()
    cfg = Config.fromfile(CONFIG)
    before = list(cfg.visualizer.vis_backends)
    train.apply_options(cfg, args)
    assert [hook.momentum for hook in cfg.custom_hooks if hook.type == 'EMAHook'] == [0.0002]
    kinds = [backend.type for backend in cfg.visualizer.vis_backends]
    assert kinds[: len(before)] == [backend.type for backend in before]
    assert {'TensorboardVisBackend', 'WandbVisBackend'} <= set(kinds)
    with pytest.raises(SystemExit, match=r'--ema: .* has an EMAHook already'):
        train.apply_options(cfg, args)
    args.ema = None
    train.apply_options(cfg, args)
    assert len(cfg.visualizer.vis_backends) == len(set(kinds))  # none twice


def test_detectors_are_augmented_as_mmdetection_does(shapes, tmp_path):
    """Of boxes alone: trained for no step, tested with flips, from the command line."""
    config = ROOT / 'configs' / 'retinanet' / 'retinanet_svit-s_fpn_1x_coco.py'
    tool = import_tool('test')
    cfg = Config.fromfile(config)
    tool.apply_tta(cfg)
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module.type == 'RetinaNet'
    flips, (pack,) = cfg.test_dataloader.dataset.pipeline[-1].transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0] and 'flip_direction' in pack.meta_keys
    cfg = Config.fromfile(CONFIG)
    with pytest.raises(SystemExit, match='merges boxes, not masks'):
        tool.apply_tta(cfg)
    cfg.update(tta_model=dict(type='Mine'), tta_pipeline=[dict(type='Own')])
    tool.apply_tta(cfg)
    assert cfg.model.type == 'Mine' and cfg.test_dataloader.dataset.pipeline[0].type == 'Own'
