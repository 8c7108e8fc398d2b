r"""Do super tokens follow the borders of things better than a grid? In numbers, on labelled images.

    python tools/measure_super_tokens.py configs/camvid/svit-s_fpn_cpu_camvid.py \
        --checkpoint work_dirs/svit-s_fpn_cpu_camvid/iter_800.pth

Each pixel of a test image belongs to one super token most. Boundary recall and achievable
segmentation accuracy of these regions are compared with the test labels, for the last block of
each stage with super tokens, beside plain grids (of the same cells, and of as many as there are
regions: a super token that no pixel belongs to most has none) and SLIC, asked for as many
(pip install scikit-image). Borders are the share of all pixels on a border of a region: more of
them find more of the truth by chance.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmsvit.analysis.superpixels import achievable_accuracy, borders, boundary_recall, grid, grid_of
from mmsvit.apis.inference import ImageModel
from mmsvit.cli import add_config_options, make_parser, read_config, run
from mmsvit.datasets.quick_checks import check_data
from mmsvit.visualization.super_token_maps import SuperTokenRecorder

try:
    from skimage.segmentation import slic
except ImportError:
    slic = None


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', help='config of a segmentor around SViT')
    parser.add_argument('--checkpoint', help='without one, weights are random')
    parser.add_argument('--images', type=int, help='how many test images; by default all')
    parser.add_argument('--no-slic', action='store_true', help='without SLIC')
    parser.add_argument('--out', type=Path, help='write the table as Markdown')
    add_config_options(parser)
    args = parser.parse_args()
    if slic is None and not args.no_slic:
        parser.error('SLIC needs scikit-image: pip install scikit-image, or --no-slic')
    return args


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args)
    check_data(cfg, ('test',))
    torch.manual_seed(0)
    model = ImageModel(cfg)
    if args.checkpoint is not None:
        model.load(args.checkpoint)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    number = min(args.images or len(dataset), len(dataset))
    scores: dict[str, list[tuple[float, float, float, int]]] = defaultdict(list)
    for i in track(range(number), 'Images', console=Console(stderr=True)):
        sample = dataset[i]
        truth = sample['data_samples'].gt_sem_seg.data[0].numpy().astype(np.int64)
        if sample['inputs'].shape[1:] != truth.shape:
            raise SystemExit(
                f'{args.config}: the test pipeline must leave images as large as their labels, found '
                f'{tuple(sample["inputs"].shape[1:])} and {truth.shape}'
            )
        with SuperTokenRecorder(model.backbone) as recorder, torch.no_grad():
            model.model.test_step(pseudo_collate([sample]))
        regions = {}
        for found in recorder.maps()[0]:
            cell = tuple(found.stride * side for side in found.super_token_size)
            name = f'stage {found.stage + 1}'
            mine = found.hard_assignment(truth.shape).numpy()
            regions[f'super tokens of {name}'] = mine
            regions[f'grid of as many, {name}'] = grid_of(truth.shape, len(np.unique(mine)))
            regions[f'grid of {cell[0]}x{cell[1]} pixels'] = grid(truth.shape, cell)
            if not args.no_slic:
                picture = sample['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
                rows, columns = found.grid
                regions[f'SLIC, {rows * columns} regions'] = slic(
                    picture, rows * columns, start_label=0
                )
        for name, each in regions.items():
            scores[name].append(
                (
                    boundary_recall(each, truth, dataset.ignore_index),
                    achievable_accuracy(each, truth, dataset.ignore_index),
                    float(borders(each).mean()),
                    len(np.unique(each)),
                )
            )
    header = ['regions', 'number', 'boundary recall, %', 'achievable accuracy, %', 'borders, %']
    rows = []
    for name, values in scores.items():
        recall, accuracy, density, count = np.nanmean(values, 0)
        numbers = (f'{100 * value:.1f}' for value in (recall, accuracy, density))
        rows.append([name, f'{count:.0f}', *numbers])
    table = Table(*header, title=f'{number} images')
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if args.out is not None:
        lines = [header, ['---', *['---:'] * 4], *rows]
        args.out.write_text(''.join(f'| {" | ".join(line)} |\n' for line in lines))


if __name__ == '__main__':
    run(main)
