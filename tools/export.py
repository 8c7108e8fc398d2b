r"""Export a model or its backbone for images of any size, and check what was written.

    python tools/export.py configs/svit_upernet_ade20k.py --checkpoint CHECKPOINT --output upernet.onnx
    python tools/export.py configs/svit_maskrcnn_coco.py --checkpoint checkpoints/stvit-small-224.pth \
        --part backbone --format torchscript --output svit.pt

The file is read again and compared with the model at several sizes; one that differs is not kept.
docs/export.md says what each kind of model takes and returns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.logging import MMLogger
from rich import print as rich_print
from rich.table import Table

from mmsvit.checkpoint import trust_checkpoints
from mmsvit.cli import add_config_options, add_trust_option, make_parser, read_config, run
from mmsvit.export import CHECK_SHAPES, FORMATS, PARTS, Check, ExportError, build_exportable, export


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', type=Path, help='config file')
    parser.add_argument(
        '--checkpoint',
        help="of the whole model, or, for the backbone, the authors' ImageNet weights; without it, "
        'the weights are those of init_cfg',
    )
    parser.add_argument('--output', type=Path, required=True, help='file to write')
    parser.add_argument('--format', choices=list(FORMATS), default='onnx')
    parser.add_argument(
        '--part',
        choices=PARTS,
        default='model',
        help='the whole model (detectors: up to the raw outputs of the dense head or RPN), '
        'backbone and neck, or the backbone',
    )
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(97, 131),
        metavar=('H', 'W'),
        help='image to record the model with; the file takes any other size too',
    )
    parser.add_argument(
        '--check-shapes',
        nargs='+',
        type=batch_shape,
        default=CHECK_SHAPES,
        metavar='NxHxW',
        help='images to compare file and model with; by default 1x64x96 2x97x131 1x224x224 3x33x257',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help="largest difference allowed, relative to each output's maximum",
    )
    parser.add_argument(
        '--no-normalize',
        action='store_true',
        help='leave the normalisation of pixels to whoever runs the file',
    )
    parser.add_argument(
        '--no-deploy',
        action='store_true',
        help="keep the backbone's batch norms and layer scale instead of folding them into layers",
    )
    add_config_options(parser)
    add_trust_option(parser)
    args = parser.parse_args()
    if not args.config.is_file():
        parser.error(f'no such config: {args.config}')
    if args.output.exists():
        parser.error(f'{args.output} exists already; name another file')
    return args


def batch_shape(text: str) -> tuple[int, int, int]:
    try:
        n, height, width = (int(number) for number in text.split('x'))
    except ValueError:
        message = f'{text!r} is not NxHxW, such as 1x512x512'
        raise argparse.ArgumentTypeError(message) from None
    return n, height, width


def table_of(checks: list[Check]) -> Table:
    """A row for each output, a column for each size of images."""
    shapes = list(dict.fromkeys(check.shape for check in checks))
    table = Table('output', title='difference from the model', title_justify='left')
    for shape in shapes:
        table.add_column('x'.join(map(str, shape)), justify='right')
    for output in dict.fromkeys(check.output for check in checks):
        errors = {check.shape: check.error for check in checks if check.output == output}
        table.add_row(output, *(f'{errors[shape]:.1e}' for shape in shapes))
    return table


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    MMLogger.get_instance('mmengine', log_level='WARNING')  # Initialisation is told in pages.
    cfg = read_config(args.config, args)
    try:
        model = build_exportable(
            cfg, args.checkpoint, args.part, not args.no_normalize, not args.no_deploy
        )
        if args.checkpoint is None:
            print('no --checkpoint: what init_cfg does not load is exported untrained')
        checks = export(
            model,
            args.output,
            args.format,
            args.shape,
            args.check_shapes,
            args.tolerance,
            normalised=args.no_normalize,
        )
    except (ExportError, FileNotFoundError, ImportError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    rich_print(table_of(checks))
    size = args.output.stat().st_size / 2**20
    print(f'wrote {args.output}: {size:.1f} MiB; takes {model.input_description}')
    if any(check.output.startswith('cls_score') for check in checks):
        print('it ends before boxes: docs/export.md says what makes them of its outputs')


if __name__ == '__main__':
    run(main)
