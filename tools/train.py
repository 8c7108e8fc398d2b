"""Train a detector, segmentor or classifier.

python tools/train.py configs/svit_maskrcnn_coco.py
python tools/train.py configs/svit_maskrcnn_coco.py --overfit 16     # can it learn 16 images?
"""

from __future__ import annotations

import argparse
import logging

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmsvit.checkpoint import (
    SAFETENSORS,
    check_weights_are_there,
    newest_valid_checkpoint,
    read_checkpoint,
    trust_checkpoints,
)
from mmsvit.checkpoint.files import check_writable
from mmsvit.cli import (
    add_arguments,
    add_guards,
    add_hook,
    load_config,
    make_parser,
    require_gpu,
    run,
    start_processes,
)
from mmsvit.datasets.quick_checks import check_data
from mmsvit.engine.overfit import WARM_UP, evaluate_only_these, judge, overfit_config
from mmsvit.engine.run_record import averages_of
from mmsvit.visualization.training_curves import read_curves

EMA_MOMENTUM = 0.0002  # of the new weights: MMEngine's default
LOGS = dict(tensorboard='TensorboardVisBackend', wandb='WandbVisBackend')


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the latest valid one in the work folder if no '
        'checkpoint is named',
    )
    parser.add_argument(
        '--force-resume',
        action='store_true',
        help='resume although settings differ that cannot be changed in a run',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='train in a work folder with checkpoints of another run, and replace them by name',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (needs a GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--ema',
        type=float,
        nargs='?',
        const=EMA_MOMENTUM,
        metavar='MOMENTUM',
        help=f'evaluate and save an average of the weights, too; the momentum is {EMA_MOMENTUM}',
    )
    parser.add_argument(
        '--log-to',
        nargs='+',
        choices=LOGS,
        default=(),
        help='log there, too; TensorBoard reads the work folder',
    )
    parser.add_argument(
        '--overfit',
        type=int,
        metavar='N',
        help='train and evaluate on the first N training images, without augmentation, into '
        'WORK_DIR_overfit, and say whether they were learned; the exit status is 1 if not',
    )
    parser.add_argument('--overfit-iters', type=int, help='iterations of --overfit, by default 500')
    add_arguments(parser)
    args = parser.parse_args()
    if args.overfit is None and args.overfit_iters is not None:
        parser.error('--overfit-iters needs --overfit')
    args.overfit_iters = 500 if args.overfit_iters is None else args.overfit_iters
    for option, least in (('overfit', 1), ('overfit_iters', WARM_UP + 1)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            parser.error(f'--{option.replace("_", "-")} must be {least} or more')
    return args


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Write the options that are settings into the config."""
    if args.ema is not None:
        if averages_of(cfg):
            raise SystemExit(f'--ema: {args.config} has an EMAHook already; set its momentum there')
        add_hook(cfg, dict(type='EMAHook', momentum=args.ema, priority='ABOVE_NORMAL'))
    if args.log_to:
        visualizer = cfg.setdefault('visualizer', dict(type='Visualizer'))
        places = visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
        kinds = [place.get('type') for place in places]
        visualizer.vis_backends = [
            *places,
            *(dict(type=LOGS[name]) for name in args.log_to if LOGS[name] not in kinds),
        ]
    if args.amp:
        kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper', OptimWrapper, AmpOptimWrapper):
            raise SystemExit(
                f'--amp makes optim_wrapper.type AmpOptimWrapper, but {args.config} has {kind}, '
                'which would be lost: set its own mixed precision in the config, without --amp'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise SystemExit(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does '
                'not set: the batch size that its learning rate is meant for'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None and args.resume.endswith(SAFETENSORS):
        raise SystemExit(
            f'--resume {args.resume}: a {SAFETENSORS} file holds weights alone, and nothing of the '
            "optimizer. Name the run's .pth file, or start a new run with these "
            f'weights: --cfg-options load_from={args.resume}'
        )
    found = None
    if args.resume == 'auto' or (
        args.resume is None and cfg.get('resume') and not cfg.get('load_from')
    ):
        # MMEngine's FlexibleRunner loads before any hook runs, so it is decided here. Without a
        # checkpoint a new run begins, from the config's load_from: a cluster's first try.
        found = newest_valid_checkpoint(cfg.work_dir)
        if found is None:
            start = cfg.get('load_from') or 'the beginning'
            print_log(
                f'Nothing to resume: there is no checkpoint in {cfg.work_dir!r}. A new run starts '
                f'from {start}.',
                logger='current',
                level=logging.WARNING,
            )
        else:
            print_log(f'Resuming from {found}.', logger='current')
        cfg.resume, cfg.load_from = found is not None, found or cfg.get('load_from')
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    if cfg.get('load_from') and found is None:
        read_checkpoint(cfg.load_from)  # Refuse an unsafe or corrupt file before anything else.
    if cfg.get('load_from') or cfg.get('resume'):
        # By default MMEngine only warns where a checkpoint does not fit. Heads may differ in a
        # run that starts from the weights of another; in a resumed run nothing may.
        add_hook(cfg, dict(type='mmsvit.StrictCheckpointHook', backbone_only=not cfg.get('resume')))


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    require_gpu()
    cfg = load_config(args)
    if args.overfit is not None:
        overfit_config(cfg, args.overfit, args.overfit_iters)
        if args.work_dir is None:
            cfg.work_dir += '_overfit'
    check_data(cfg, ('train', 'val'))
    check_weights_are_there(cfg.model)
    start_processes(cfg, args.local_rank, trains=True)
    check_writable(cfg.work_dir)
    apply_options(cfg, args)
    add_guards(cfg)
    if args.overfit is not None and 'run_record' in cfg.default_hooks:
        args.overwrite = True  # Nobody continues such a run.
    for option in ('force_resume', 'overwrite'):
        if getattr(args, option):
            if 'run_record' not in cfg.default_hooks:
                raise SystemExit(f'--{option.replace("_", "-")} needs default_hooks.run_record')
            cfg.default_hooks.run_record[option] = True
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.overfit is not None:
        evaluate_only_these(runner)
    runner.train()
    if args.overfit is not None and runner.rank == 0:
        learned, text = judge(read_curves(cfg.work_dir))
        print(text)
        raise SystemExit(0 if learned else 1)


if __name__ == '__main__':
    run(main)
