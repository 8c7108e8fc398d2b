"""Check the data of a config before a long training.

    python tools/check_dataset.py configs/svit_maskrcnn_coco.py
    python tools/check_dataset.py configs/svit_maskrcnn_coco.py --splits val --all
    python tools/check_dataset.py configs/svit_maskrcnn_coco.py --show-dir targets

Looks at folders and files, every annotation, class names, num_classes of the heads, a sample
of the images, a few samples through the config's own pipeline, and the config's evaluator on the
truth itself, which must score 1. The exit status is 1 if there are errors, and 0 if there are at
most warnings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.runner import set_random_seed
from rich.console import Console

from mmsvit.cli import add_config_options, make_parser, read_config, run
from mmsvit.datasets.inspection import inspect_data


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', help='config file; it is code, so only one that you trust')
    splits = ('train', 'val', 'test')
    parser.add_argument('--splits', nargs='+', choices=splits, default=splits)
    number = parser.add_mutually_exclusive_group()
    number.add_argument(
        '--samples', type=int, default=200, help='images to decode of each data set'
    )
    number.add_argument('--all', action='store_true', help='decode all of them')
    parser.add_argument(
        '--show-dir',
        type=Path,
        help='draw a few training samples into this folder: the image as the pipeline gives it to the '
        'model, with boxes, masks, label map or label',
    )
    add_config_options(parser)
    args = parser.parse_args()
    if args.show_dir is not None and 'train' not in args.splits:
        parser.error('--show-dir draws training samples: add train to --splits')
    if args.samples < 0:
        parser.error('--samples must be 0 or more')
    return args


def main() -> None:
    args = parse_args()
    try:
        cfg = read_config(args.config, args)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    set_random_seed(0)
    try:
        samples = None if args.all else args.samples
        report = inspect_data(cfg, args.splits, samples, show_dir=args.show_dir)
    except ValueError as error:
        raise SystemExit(f'{args.config}: {error}') from error
    report.print(Console())
    raise SystemExit(1 if report.problems('error') else 0)


if __name__ == '__main__':
    run(main)
