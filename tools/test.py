"""Evaluate a detector, segmentor or classifier.

python tools/test.py configs/svit_maskrcnn_coco.py CHECKPOINT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmsvit.checkpoint import read_checkpoint, trust_checkpoints
from mmsvit.cli import (
    add_arguments,
    add_hook,
    load_config,
    make_parser,
    require_gpu,
    run,
    start_processes,
)
from mmsvit.datasets.quick_checks import check_data, type_name


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint of the whole model')
    parser.add_argument('--out', help='write the predictions to this pickle file (.pkl)')
    parser.add_argument('--show-dir', help='draw predictions beside the truth into this folder')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation, by tta_model and tta_pipeline of the config, or MMDetection's "
        'defaults',
    )
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='fold batch norms and layer scale of the backbone into other layers: faster',
    )
    add_arguments(parser)
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, found {args.out}')
    return args


def draw_into(cfg: Config, folder: str) -> None:
    """Switch on the visualization hook of MMDetection, MMSegmentation or MMPretrain."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise SystemExit('--show-dir needs default_hooks.visualization, which the config lacks')
    folder = str(Path(folder).absolute())
    kind = type_name(hook)
    if kind == 'DetVisualizationHook':
        hook.update(draw=True, test_out_dir=folder)
    elif kind == 'SegVisualizationHook':
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
    elif kind == 'VisualizationHook':
        hook.update(enable=True, out_dir=folder, interval=1)
    else:
        raise SystemExit(f'--show-dir does not know the hook {hook.type} of this config')


def set_detector_tta(cfg: Config, dataset: ConfigDict) -> None:
    """Set what MMDetection's own tool takes for a detector: flips, and NMS of all boxes."""
    head = cfg.model.get('roi_head') or cfg.model
    if head.get('mask_head') or head.get('panoptic_head'):
        raise SystemExit(
            "--tta: MMDetection's test-time augmentation merges boxes, not masks: it needs a detector "
            'of boxes alone'
        )
    nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    cfg.setdefault('tta_model', dict(type='DetTTAModel', tta_cfg=nms))
    *steps, pack = dataset.pipeline
    keys = (
        'img_id',
        'img_path',
        'ori_shape',
        'img_shape',
        'scale_factor',
        'flip',
        'flip_direction',
    )
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    augment = dict(type='TestTimeAug', transforms=[flips, [dict(pack, meta_keys=keys)]])
    cfg.setdefault('tta_pipeline', [*steps, augment])


def apply_tta(cfg: Config) -> None:
    """Wrap the model and replace the test pipeline by those for test-time augmentation."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    absent = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if absent and cfg.get('default_scope') == 'mmdet':
        set_detector_tta(cfg, dataset)
    elif absent:
        raise SystemExit(f'--tta needs {" and ".join(absent)}, which the config does not set')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def dump_into(cfg: Config, file: str) -> None:
    """Add a metric that writes all predictions to a file."""
    # A config in pure Python names classes, not a scope.
    scope = cfg.get('default_scope') or getattr(cfg.model.type, '__module__', '').partition('.')[0]
    dump = 'mmdet.DumpDetResults' if scope == 'mmdet' else 'DumpResults'
    evaluators = cfg.test_evaluator
    if not isinstance(evaluators, (list, tuple)):
        evaluators = [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=dump, out_file_path=file)]


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    require_gpu()
    cfg = load_config(args)
    check_data(cfg, ('test',))
    start_processes(cfg, args.local_rank, trains=False)
    read_checkpoint(args.checkpoint)  # Refuse an unsafe or corrupt file before anything else.
    if args.show_dir is not None:
        draw_into(cfg, args.show_dir)
    if args.tta:
        apply_tta(cfg)
    if args.out is not None:
        dump_into(cfg, args.out)
    cfg.load_from, cfg.resume = args.checkpoint, False
    # By default MMEngine only warns where a checkpoint does not fit.
    add_hook(cfg, dict(type='mmsvit.StrictCheckpointHook'))
    if args.deploy:
        add_hook(cfg, dict(type='mmsvit.DeployHook'))
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.test()


if __name__ == '__main__':
    run(main)
