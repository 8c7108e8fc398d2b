"""Draw losses and metrics of one or several runs.

    python tools/plot_log.py work_dirs/quickstart
    python tools/plot_log.py work_dirs/a work_dirs/b --metrics coco/bbox_mAP --out compared.png

The libraries' own analyze_logs.py draw such curves as well, from one file and on one pair of axes;
docs/training.md says where they do not run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmsvit.atomic_file import atomic_file
from mmsvit.visualization.training_curves import choose_metrics, draw_curves, read_curves


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='+', type=Path, help='work folders, or scalars.json files')
    parser.add_argument('--losses', nargs='*', default=['loss'], help='scalars of training')
    parser.add_argument(
        '--metrics', nargs='*', help='scalars of validation; default: AP, mIoU, top-1'
    )
    parser.add_argument('--out', type=Path, default=Path('curves.png'), help='.png, .svg or .pdf')
    args = parser.parse_args()
    if args.out.suffix not in ('.png', '.svg', '.pdf'):
        parser.error(f'--out must end in .png, .svg or .pdf, found {args.out}')
    return args


def main() -> None:
    args = parse_args()
    try:
        runs = {str(run): read_curves(run) for run in args.runs}
        metrics = args.metrics
        if metrics is None:
            metrics = choose_metrics(sorted({name for curves in runs.values() for name in curves}))
        figure = draw_curves(runs, args.losses, metrics)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    with atomic_file(args.out) as part:
        figure.savefig(part)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
