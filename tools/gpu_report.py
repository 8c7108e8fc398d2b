"""Find out on a machine with a CUDA GPU what holds there: tests, kernels, training, times.

    python tools/gpu_report.py                     # everything, into work_dirs/gpu_report
    python tools/gpu_report.py --only prove-small tests
    python tools/gpu_report.py --list

Each part is a process of its own, of at most nine minutes. A part that fails, or does not end in
time, is a result, and the others go on; one that has a result is not run again (--again runs it).
report.md in the folder has it all. Without a GPU, the parts are listed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mmsvit.atomic_file import atomic_file
from mmsvit.cli import make_parser, run

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540  # seconds for a part
TAIL = 25  # lines of a log in the report
SHAPES = 'configs/svit_maskrcnn_shapes.py'
# Sizes of dense models beside those of the classifier; the kernels fused, or PyTorch's alone.
FUSED, PLAIN = 'svit-s:16-8-1-1+triton', 'svit-s:16-8-1-1+torch'


class Part(NamedTuple):
    """Something to find out.

    Attributes:
        name: For ``--only``, and of its files.
        title: In the report.
        commands: Arguments of Python, one after the other; ``OUT`` is the folder of the report.
    """

    name: str
    title: str
    commands: tuple[str, ...]


def benchmark(name: str, title: str, options: str) -> Part:
    """A table of ``docs/benchmarks``."""
    return Part(name, title, (f'tools/benchmark.py {options} --device cuda --out OUT/{name}',))


def training(dtype: str) -> Part:
    """A short training of the generated data, with its AP."""
    amp = f'optim_wrapper.type=AmpOptimWrapper optim_wrapper.dtype={dtype}'
    if dtype == 'float16':
        amp += ' optim_wrapper.loss_scale=dynamic'
    return Part(
        f'train-{dtype}',
        f'Mask R-CNN on generated shapes, AMP in {dtype}',
        (
            'tools/make_shapes_dataset.py data/shapes',
            f'tools/train.py {SHAPES} --work-dir OUT/train-{dtype} --overwrite --cfg-options {amp}',
        ),
    )


PARTS = (
    Part('environment', 'Environment', ('-m mmsvit.check_env',)),
    Part('tests', 'Tests marked cuda', ('-m pytest -m cuda -q tests',)),
    *(
        Part(
            f'prove-{arch}',
            f'Kernels of SViT-{arch[0].upper()}',
            (f'-m mmsvit.prove_gpu {config}',),
        )
        for arch, config in (
            ('small', 'configs/svit_maskrcnn_coco.py'),
            ('base', 'configs/mask_rcnn/mask-rcnn_svit-b_fpn_1x_coco.py'),
            ('large', 'configs/mask_rcnn/mask-rcnn_svit-l_fpn_1x_coco.py'),
        )
    ),
    training('float16'),
    training('bfloat16'),
    benchmark(
        'cuda_op',
        'Super token sampling by itself',
        'op op-train --batch 2 --dtypes bfloat16 float16 --rounds 30 '
        '--models svit-s+torch svit-s+triton svit-s+torch+graph svit-s+triton+graph',
    ),
    benchmark(
        'cuda_backbone',
        'Inference of backbones',
        f'backbone --batch 8 --dtypes bfloat16 float16 --rounds 20 --models {PLAIN} {FUSED} '
        f'{FUSED}+deploy {FUSED}+deploy+compile svit-s+triton svit-b+triton svit-l+triton swin-t '
        'swin-t+compile swin-s r50 r50+channels-last pvtv2-b2 convnext-t',
    ),
    benchmark(
        'cuda_train',
        'A training step of backbones',
        f'train --batch 2 --dtypes bfloat16 float16 --rounds 20 --models {PLAIN} {FUSED} '
        f'{FUSED}+recompute {FUSED}+compile svit-s+triton swin-t swin-t+compile r50 pvtv2-b2 '
        'convnext-t',
    ),
    benchmark(
        'cuda_train_512',
        'A training step at the fixed size of segmentors',
        f'train --shapes 512x512 --batch 2 --dtypes bfloat16 --rounds 20 --models {PLAIN} {FUSED} '
        f'{FUSED}+compile {FUSED}+graph swin-t swin-t+compile',
    ),
    benchmark(
        'cuda_detector',
        'Inference of Mask R-CNN',
        f'detector --dtypes float16 --rounds 20 --models {PLAIN} {FUSED}+deploy '
        'svit-s:16-8-2-1+triton+deploy swin-t r50',
    ),
    benchmark(
        'cuda_scaling',
        'Time and memory by size',
        f'backbone --scaling --dtypes bfloat16 --rounds 20 --seconds 20 --models {FUSED} '
        'svit-s:16-8-2-1+triton swin-t r50 pvtv2-b2',
    ),
)


class Result(NamedTuple):
    """What came of a part.

    Attributes:
        status: ``'passed'``, ``'failed'`` or ``'out of time'``.
        seconds: How long it took.
        commands: As they were run.
    """

    status: str
    seconds: float
    commands: list[str]


def run_part(part: Part, folder: Path, limit: float) -> Result:
    """Run the commands of a part one after the other, their output in ``NAME.log``."""
    begin, commands, status = time.monotonic(), [], 'passed'
    with (folder / f'{part.name}.log').open('w') as log:
        for command in part.commands:
            words = shlex.split(command.replace('OUT', shlex.quote(str(folder))))
            commands.append(shlex.join(['python', *words]))
            print(f'$ {commands[-1]}', file=log, flush=True)
            left = limit - (time.monotonic() - begin)
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if process.wait(timeout=max(left, 0)) != 0:
                    print(f'exit status {process.returncode}', file=log)
                    status = 'failed'
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # With what it has started.
                process.wait()
                status = 'out of time'
            if status != 'passed':
                break
    return Result(status, round(time.monotonic() - begin, 1), commands)


def read_result(part: Part, folder: Path) -> Result | None:
    """The result of an earlier run; None if there is none."""
    file = folder / f'{part.name}.result.json'
    return Result(**json.loads(file.read_text())) if file.is_file() else None


def average_precision(folder: Path) -> str | None:
    """The last AP of a training run, in words."""
    found = [
        scores
        for file in sorted(folder.glob('*/vis_data/scalars.json'))
        for scores in map(json.loads, file.read_text().splitlines())
        if 'coco/bbox_mAP' in scores
    ]
    if not found:
        return None
    return f'box AP {found[-1]["coco/bbox_mAP"]:.3f}, mask AP {found[-1]["coco/segm_mAP"]:.3f}'


def describe(part: Part, result: Result, folder: Path) -> list[str]:
    """The section of a part in the report."""
    lines = [f'## {part.title}', '', f'`{part.name}`: {result.status}, {result.seconds:.0f} s', '']
    lines += ['```shell', *result.commands, '```', '']
    if scores := average_precision(folder / part.name):
        lines += [scores, '']
    table = folder / f'{part.name}.md'
    if table.is_file():  # A benchmark writes after each case, also one that is cut short.
        text = table.read_text().splitlines()
        lines += [line.replace('#', '###', 1) if line.startswith('#') else line for line in text]
    if not table.is_file() or result.status != 'passed':
        log = (folder / f'{part.name}.log').read_text(errors='replace').splitlines()
        lines += ['```text', *log[-TAIL:], '```']
    return [*lines, '']


def write_report(folder: Path) -> Path:
    """One page of all parts that have a result."""
    results = {part: read_result(part, folder) for part in PARTS}
    lines = ['# What holds on this GPU', '', 'Written by `python tools/gpu_report.py`.', '']
    lines += ['| part | result | seconds |', '| --- | --- | ---: |']
    lines += [
        f'| {part.title} | {result.status if result else "not run"} '
        f'| {f"{result.seconds:.0f}" if result else ""} |'
        for part, result in results.items()
    ]
    lines.append('')
    for part, result in results.items():
        if result is not None:
            lines += describe(part, result, folder)
    file = folder / 'report.md'
    with atomic_file(file) as page:
        page.write_text('\n'.join(lines))
    return file


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument('--only', nargs='+', choices=names, metavar='PART', help=', '.join(names))
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu_report'), metavar='DIR')
    parser.add_argument('--again', action='store_true', help='parts that have a result, too')
    parser.add_argument('--list', action='store_true', help='say what would be run')
    parser.add_argument(
        '--limit', type=float, default=LIMIT, metavar='S', help=f'seconds for a part ({LIMIT})'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import torch

    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    there = torch.cuda.is_available()
    if args.list or not there:
        if not there:
            print('torch finds no CUDA GPU. On one, this would run:\n')
        for part in chosen:
            print(f'{part.name}: {part.title}, at most {args.limit:.0f} s')
            print(*(f'    python {command}' for command in part.commands), sep='\n')
        return
    folder = args.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(chosen, 1):
        label = f'[{number}/{len(chosen)}] {part.title}'
        if read_result(part, folder) is not None and not args.again:
            print(f'{label}: has a result')
            continue
        print(f'{label} ... ', end='', flush=True)
        result = run_part(part, folder, args.limit)
        with atomic_file(folder / f'{part.name}.result.json') as file:
            file.write_text(json.dumps(result._asdict(), indent=1))
        print(f'{result.status}, {result.seconds:.0f} s')
        write_report(folder)  # A machine that is lent may be gone any time.
    print(f'wrote {write_report(folder)}')


if __name__ == '__main__':
    run(main)
