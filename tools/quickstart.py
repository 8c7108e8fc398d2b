"""Make a data set, train, evaluate, draw, and report: what quickstart.sh does after installation.

Runs the commands that a user would run, and shows them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from mmsvit.cli import make_parser
from mmsvit.cli import run as run_tool
from mmsvit.visualization.drawing import Sheet, fit
from mmsvit.visualization.html_report import HtmlReport
from mmsvit.visualization.training_curves import choose_metrics, draw_curves, read_curves

CONFIG = 'configs/svit_maskrcnn_shapes.py'
DATA = Path('data/shapes')
WORK_DIR = Path('work_dirs/quickstart')
NUM_PICTURES = 4
TILE, GAP, HEADING = 240, 6, 26  # pixels
COLUMNS = ('truth', 'prediction', 'super tokens of stage 1', 'their mean colours', 'attention')
SCORES = ('', 'AP', 'AP50', 'AP75')

console = Console()


def run(title: str, *arguments: str | int | Path) -> float:
    """Run a tool with this Python, its output on the terminal; return the seconds it took."""
    command = ['python', *map(str, arguments)]
    console.rule(title)
    console.print(f'$ {shlex.join(command)}', style='bold', highlight=False, soft_wrap=True)
    start = time.monotonic()
    result = subprocess.run([sys.executable, *command[1:]])
    if result.returncode != 0:
        sys.exit(f'\n{title} failed, see above')
    return time.monotonic() - start


def settings() -> str:
    """What a run depends on: a result of others is not shown for it."""
    return str(Config.fromfile(CONFIG).to_dict()) + (DATA / 'settings.json').read_text()


def latest_checkpoint() -> Path | None:
    """The last checkpoint of a training run with these settings that came to its end."""
    record = WORK_DIR / 'last_checkpoint'
    finished = WORK_DIR / 'finished'
    if not finished.is_file() or finished.read_text() != settings() or not record.is_file():
        return None
    path = Path(record.read_text())
    return path if path.is_file() else None


def contact_sheet(images: list[Path], predictions: Path, super_tokens: Path) -> np.ndarray:
    """Truth, prediction, and stage 1's super tokens and attention: a row for each image, RGB."""
    step = TILE + GAP
    sheet = Sheet(len(COLUMNS) * step - GAP, HEADING + len(images) * step - GAP)
    for i, name in enumerate(COLUMNS):
        sheet.text(name, i * step, HEADING // 2, 10)
    for row, image in enumerate(images):
        tiles = np.hsplit(cv2.imread(str(predictions / image.name)), 2)
        for name in ('borders', 'colours', 'attention'):
            tiles.append(cv2.imread(str(super_tokens / f'{image.stem}_stage1_{name}.png')))
        for i, tile in enumerate(tiles):
            tile = cv2.cvtColor(fit(tile, TILE), cv2.COLOR_BGR2RGB)
            sheet.picture(tile, i * step, HEADING + row * step)
    return sheet.render()


def write_report(file: Path, scores: list[list[str]], sheet: np.ndarray, checkpoint: Path) -> None:
    """Results, curves and pictures in one HTML file."""
    report = HtmlReport('SViT Mask R-CNN on generated shapes')
    report.text(
        f'A small model, trained from scratch on {DATA} by {CONFIG}. It shows that everything '
        'works together, and says nothing about COCO.'
    )
    report.heading('AP on the validation images, which training has not seen')
    report.table(SCORES, scores)
    report.heading('Training')
    curves = read_curves(WORK_DIR)
    figure = draw_curves({'': curves}, ['loss'], choose_metrics(sorted(curves)))
    report.figure(figure, 'Loss of each step, and AP on the validation images after each epoch.')
    report.heading('Predictions and super tokens')
    report.picture(sheet, 'Attention: where stage 1 looks from the white marker (bright: more).')
    report.heading('Your own picture')
    report.code(
        f'python tools/visualize_super_tokens.py photo.jpg --config {CONFIG} \\\n'
        f'    --checkpoint {checkpoint}'
    )
    report.write(file)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--retrain', action='store_true', help='train again although it is done')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    seconds = {}
    seconds['data'] = run('1/4 Data', 'tools/make_shapes_dataset.py', DATA)
    checkpoint = None if args.retrain else latest_checkpoint()
    if checkpoint is None:
        (WORK_DIR / 'finished').unlink(missing_ok=True)
        training = ('tools/train.py', CONFIG, '--work-dir', WORK_DIR, '--overwrite')
        seconds['training'] = run('2/4 Training', *training)
        (WORK_DIR / 'finished').write_text(settings())
        checkpoint = latest_checkpoint()
    else:
        console.print(f'2/4 Training: skipped, {checkpoint} exists (--retrain trains again)')
    predictions, super_tokens = WORK_DIR / 'predictions', WORK_DIR / 'super_tokens'
    seconds['evaluation'] = run(
        '3/4 Evaluation',
        *('tools/test.py', CONFIG, checkpoint, '--work-dir', WORK_DIR / 'test'),
        *('--show-dir', predictions),
    )
    images = sorted((DATA / 'val').glob('*.jpg'))[:NUM_PICTURES]
    seconds['super tokens'] = run(
        '4/4 Super tokens',
        *('tools/visualize_super_tokens.py', *images, '--config', CONFIG),
        *('--checkpoint', checkpoint, '--out-dir', super_tokens, '--size', TILE),
    )

    newest = max((WORK_DIR / 'test').glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    metrics = json.loads(newest.read_text())
    scores = [
        [name, *(f'{metrics[f"coco/{kind}_mAP{suffix}"]:.3f}' for suffix in ('', '_50', '_75'))]
        for name, kind in (('box', 'bbox'), ('mask', 'segm'))
    ]
    sheet = contact_sheet(images, predictions, super_tokens)
    picture = cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(WORK_DIR / 'pictures.jpg'), picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
    report = WORK_DIR / 'report.html'
    write_report(report, scores, sheet, checkpoint)
    table = Table(title='AP on the validation images, which training has not seen')
    for column in SCORES:
        table.add_column(column, justify='right' if column else 'left')
    for row in scores:
        table.add_row(*row)
    console.rule('Summary')
    console.print(table)
    took = ', '.join(f'{name} {value:.0f}' for name, value in seconds.items())
    console.print(
        f'Seconds:      {took}\n'
        f'Checkpoint:   {checkpoint}\n'
        f'Report:       {report} (curves, predictions, super tokens; opens in any browser)\n'
        f'Pictures:     {predictions}/ and {super_tokens}/\n\n'
        'Next, on COCO: put the data under data/coco/ and the ImageNet weights under checkpoints/,\n'
        f'then  {sys.executable} tools/train.py configs/svit_maskrcnn_coco.py',
        highlight=False,
        soft_wrap=True,
    )


if __name__ == '__main__':
    run_tool(main)
