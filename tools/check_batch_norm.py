"""Are the pretrained batch norm statistics those of your images?

    python tools/check_batch_norm.py configs/svit_maskrcnn_coco.py
    python tools/check_batch_norm.py configs/svit_upernet_ade20k.py --images 500 --device cuda

Runs training images of a config through its backbone, with the weights of its init_cfg or of
--checkpoint, and compares mean and variance of what each batch norm is given with those that it
stores. Where they are close, freezing the statistics (norm_eval=True) is harmless.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor, nn

from mmsvit.analysis.batch_norm import measure_drift, verdict
from mmsvit.checkpoint import load_pretrained
from mmsvit.cli import add_config_options, make_parser, read_config, run
from mmsvit.datasets.quick_checks import check_data


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--checkpoint', help="in place of the config's weights")
    parser.add_argument('--images', type=int, default=200, help='how many training images')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='such as cuda'
    )
    add_config_options(parser)
    args = parser.parse_args()
    if args.images < 1:
        parser.error('--images must be 1 or more')
    return args


def read_images(model: nn.Module, loader: dict, number: int) -> Iterator[Tensor]:
    """Normalised batches of so many training images, or of all if there are fewer."""
    batches = Runner.build_dataloader(loader, seed=0)
    size = batches.batch_sampler.batch_size
    total = min(-(-number // size), -(-len(batches.dataset) // size))
    for _, batch in zip(track(range(total), 'Images', console=Console(stderr=True)), batches):
        yield model.data_preprocessor(batch, True)['inputs']


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args)
    check_data(cfg, ('train',))
    set_random_seed(0)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if args.checkpoint is not None:
        cfg.model.backbone.init_cfg = None
    elif not cfg.model.backbone.get('init_cfg'):
        raise SystemExit(
            f'{args.config} trains from scratch: its batch norms store nothing yet. Name weights '
            'with --checkpoint'
        )
    model = MODELS.build(cfg.model).to(args.device)
    if args.checkpoint is None:
        model.backbone.init_weights()
    else:
        load_pretrained(model.backbone, args.checkpoint)
    loader = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
    drifts = measure_drift(model.backbone, read_images(model, loader, args.images))
    columns = ('shift, mean', 'worst', 'variance ratio, mean', '5 %', '95 %', '')
    table = Table(Column('batch norm', no_wrap=True), *columns)
    for drift in drifts:
        low, high = torch.quantile(drift.ratio, torch.tensor([0.05, 0.95], dtype=torch.float64))
        numbers = (drift.mean_shift, drift.shift.max(), drift.typical_ratio, low, high)
        mark = '' if drift.is_small else '<-'
        table.add_row(drift.name, *(f'{float(number):.2f}' for number in numbers), mark)
    console = Console()
    console.print(table)
    console.print(
        'Shift in stored standard deviations; ratio to the stored variance, geometric mean.'
    )
    console.print(verdict(drifts))


if __name__ == '__main__':
    run(main)
