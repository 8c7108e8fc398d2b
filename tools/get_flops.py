"""Count the parameters and FLOPs (multiply-adds) of the models of configs, without data or weights.

    python tools/get_flops.py configs/svit_maskrcnn_coco.py
    python tools/get_flops.py configs/svit_maskrcnn_coco.py --shape 640 640
    python tools/get_flops.py model-index.yml --markdown docs/complexity.md --zoo docs/model_zoo.md

A metafile, or an index of them, stands for the configs that it lists, and brings the paper's
figures.
--zoo replaces what is between the lines "<!-- zoo: begin -->" and "<!-- zoo: end -->" by tables of
the configs with their results, as docs/model_zoo.md has them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from rich import print as rich_print
from rich.progress import track
from rich.table import Table

from mmsvit.analysis.config_flops import (
    ConfigFlopCounts,
    MetafileEntry,
    count_config,
    read_metafile,
)
from mmsvit.atomic_file import atomic_file
from mmsvit.cli import add_config_options, make_parser, read_config, run

EXPLANATION = """\
FLOPs are multiply-adds of inference on one image (height x width), in two ways. *Layers* are
convolutions and linear layers: the paper's figures for detectors and segmentors are these. *With
products* adds what attention and super token sampling multiply, and so is what really runs; the
paper's figures for classifiers are these. In brackets, the difference from the paper's figure.
Segmentors are counted without their auxiliary head, which only training needs.
"""
COLUMNS = (
    'config',
    'input',
    'parameters, M',
    'paper, M',
    'layers, G',
    'with products, G',
    'paper, G',
    'backbone: parameters, M',
    'layers, G',
    'with products, G',
)
ZOO_BEGIN, ZOO_END = '<!-- zoo: begin -->', '<!-- zoo: end -->'
ZOO = re.compile(f'{ZOO_BEGIN}.*{ZOO_END}', re.DOTALL)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('configs', nargs='+', type=Path, help='config files or metafiles')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='image to count for; by default 800 1280 for detectors, 512 2048 for segmentors, '
        'and what the test pipeline crops to for classifiers',
    )
    add_config_options(parser)
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='also write a table for docs')
    parser.add_argument(
        '--zoo', type=Path, metavar='FILE', help='also update the tables of results in this file'
    )
    args = parser.parse_args()
    absent = [str(path) for path in args.configs if not path.is_file()]
    if absent:
        parser.error(f'no such file: {", ".join(absent)}')
    if args.zoo is not None and not ZOO.search(args.zoo.read_text()):
        parser.error(f'{args.zoo} has no place for the tables: {ZOO_BEGIN} and {ZOO_END}')
    return args


def list_entries(paths: list[Path]) -> list[MetafileEntry]:
    entries = []
    for path in paths:
        is_metafile = path.suffix in ('.yml', '.yaml')
        entries += read_metafile(path) if is_metafile else [MetafileEntry(path)]
    return entries


def millions(number: float) -> str:
    return f'{number / 1e6:.2f}'


def billions(number: float) -> str:
    return f'{number / 1e9:.2f}'


def not_counted(figures: ConfigFlopCounts) -> str:
    return ', '.join(f'{name} ({times} times)' for name, times in figures.uncounted.items())


def terminal_table(config: Path, figures: ConfigFlopCounts) -> Table:
    table = Table(
        'part',
        title=f'{config}\n{figures.workload}',
        caption='' if not figures.uncounted else f'Not counted: {not_counted(figures)}',
        title_justify='left',
        caption_justify='left',
    )
    for column in ('parameters, M', 'trainable, M', 'layers, G', 'with products, G'):
        table.add_column(column, justify='right')
    for name, part in (('model', figures.model), ('backbone', figures.backbone)):
        counts = (billions(part.layers), billions(part.total))
        table.add_row(name, millions(part.parameters), millions(part.trainable), *counts)
    return table


def published(number: float | None, unit: float) -> str:
    return '-' if number is None else f'{number / unit:g}'


def difference(number: int, paper: float | None) -> str:
    return '' if paper is None else f' ({100 * (number / paper - 1):+.1f}%)'


def markdown_row(entry: MetafileEntry, figures: ConfigFlopCounts) -> str:
    model, backbone = figures.model, figures.backbone
    cells = (
        entry.config.stem,
        figures.workload,
        millions(model.parameters) + difference(model.parameters, entry.parameters),
        published(entry.parameters, 1e6),
        billions(model.layers) + difference(model.layers, entry.flops),
        billions(model.total) + difference(model.total, entry.flops),
        published(entry.flops, 1e9),
        millions(backbone.parameters),
        billions(backbone.layers),
        billions(backbone.total),
    )
    return f'| {" | ".join(cells)} |'


def markdown_page(results: list[tuple[MetafileEntry, ConfigFlopCounts]]) -> str:
    lines = [
        '# Parameters and FLOPs\n',
        f'Written by `{shlex.join(["python", "tools/get_flops.py", *sys.argv[1:]])}`.\n',
        EXPLANATION,
        f'| {" | ".join(COLUMNS)} |',
        f'| --- | --- |{" ---: |" * (len(COLUMNS) - 2)}',
        *(markdown_row(entry, figures) for entry, figures in results),
        '',
    ]
    lines += [
        f'Not counted in {entry.config.stem}: {not_counted(figures)}.\n'
        for entry, figures in results
        if figures.uncounted
    ]
    return '\n'.join(lines)


def zoo_tables(results: list[tuple[MetafileEntry, ConfigFlopCounts]], folder: Path) -> str:
    """A table of the configs of each metafile, with their results beside the paper's.

    Links lead from a file in ``folder``.
    """
    collections: dict[str, list] = {}
    for entry, figures in results:
        collections.setdefault(entry.collection, []).append((entry, figures))
    lines = []
    for collection, members in collections.items():
        trained = any(entry.ours for entry, _ in members)
        lines += [
            f'\n**{collection}**\n',
            '| config | parameters, M | FLOPs, G: layers / all | paper |' + ' ours |' * trained,
            '| --- | ---: | ---: | --- |' + ' --- |' * trained,
        ]
        for entry, figures in members:
            model = figures.model
            cells = [
                f'[{entry.config.stem}]({Path(os.path.relpath(entry.config, folder)).as_posix()})',
                f'{model.parameters / 1e6:.1f}',
                f'{model.layers / 1e9:.1f} / {model.total / 1e9:.1f}',
                list_metrics(entry.paper),
            ]
            if trained:
                cells.append(list_metrics(entry.ours))
            lines.append(f'| {" | ".join(cells)} |')
        lines += [
            f'\nNot counted in {entry.config.stem}: {not_counted(figures)}.'
            for entry, figures in members
            if figures.uncounted
        ]
    return '\n'.join(lines)


def list_metrics(metrics: dict[str, float]) -> str:
    """The main ones, without those at single thresholds."""
    shown = {k: v for k, v in metrics.items() if not k.endswith(('50', '75'))}
    return ', '.join(f'{name} {value}' for name, value in shown.items()) or '-'


def main() -> None:
    args = parse_args()
    results = []
    for entry in track(list_entries(args.configs), description='counting', transient=True):
        cfg = read_config(entry.config, args)
        try:
            figures = count_config(cfg, args.shape)
        except ValueError as error:
            raise SystemExit(f'{entry.config}: {error}') from error
        results.append((entry, figures))
        rich_print(terminal_table(entry.config, figures))
    if args.markdown is not None:
        with atomic_file(args.markdown) as part:
            part.write_text(markdown_page(results))
        print(f'wrote {args.markdown}')
    if args.zoo is not None:
        tables = f'{ZOO_BEGIN}\n{zoo_tables(results, args.zoo.parent)}\n\n{ZOO_END}'
        page = ZOO.sub(lambda _: tables, args.zoo.read_text())
        with atomic_file(args.zoo) as part:
            part.write_text(page)
        print(f'updated {args.zoo}')


if __name__ == '__main__':
    run(main)
