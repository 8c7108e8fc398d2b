r"""Measure time and memory of SViT and of its peers, in turns, with random weights and images.

    python tools/benchmark.py backbone --shapes 512x512 800x1344 --threads 2
    python tools/benchmark.py backbone --models svit-s svit-s+deploy svit-s+deploy+compile swin-t
    python tools/benchmark.py op op-train --device cuda --dtypes bfloat16 --batch 2 \
        --models svit-s+torch svit-s+triton svit-s+triton+graph
    python tools/benchmark.py backbone --scaling --out docs/benchmarks/scaling
    python tools/benchmark.py count --models svit-s+triton swin-t --dtypes bfloat16

What can be measured:
{modes}

`count` measures nothing: it counts, without a GPU, what a GPU would have to do in training (2 images) and
inference (8) of the backbone: kernel launches, bytes moved, bytes saved for the backward pass.

Models are written NAME[:SIZES][+FLAG...]: svit-s, svit-s:16-8-2-1 (other super token sizes),
svit-s:16-8-2-1+deploy+compile. Names: {models}. Flags:
{flags}

Every case (what, shape, dtype) is measured in rounds. In a round each candidate runs once, and
rounds begin with another candidate each time. A candidate that fails is reported so, and the
others continue. How to read the results: docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from mmsvit.benchmarking.candidates import (
    DEFAULT_MODELS,
    DEFAULT_REFERENCE,
    FLAGS,
    Candidate,
    known_models,
    parse_candidate,
)
from mmsvit.benchmarking.environment import describe_environment, measure_rates
from mmsvit.benchmarking.measure import COPY, MIN_ROUNDS, Settings, measure_case
from mmsvit.benchmarking.report import Report, list_files, terminal_table
from mmsvit.benchmarking.workloads import DTYPES, MODES, Case
from mmsvit.checkpoint.files import try_writing

COUNT = 'count'
SCALING_SIDES = (224, 320, 448, 640, 800, 1024, 1280, 1600)
MIN_SIDE = 32
MIN_WIDTH = 130


def parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    shape = tuple(map(int, match.groups())) if match else (0, 0)
    if min(shape) < MIN_SIDE:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not HxW, height and width of {MIN_SIDE} pixels or more, such as 800x1344'
        )
    return shape


def parse_model(text: str) -> Candidate:
    try:
        return parse_candidate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of 1 or more')
    return int(text)


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of seconds, 0 or more')
    return number


def output_path(text: str) -> Path:
    path = Path(text)
    if text.endswith('/') or path.is_dir():
        raise argparse.ArgumentTypeError(
            f'{text!r} is a folder; files go beside each other under one name, such as '
            f'{path / "benchmark"}'
        )
    return path


def check_output(files: list[Path]) -> None:
    """Make their folder, and raise OSError if they cannot be written there."""
    try_writing(files[0].parent)
    for file in files:
        if file.exists():
            file.open('a').close()


def listing(meanings: dict[str, str]) -> str:
    return '\n'.join(f'    {name:<14} {meaning}' for name, meaning in meanings.items())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.format(
            modes=listing(MODES), models=', '.join(known_models()), flags=listing(FLAGS)
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'modes', nargs='+', choices=[*MODES, COUNT], metavar='WHAT', help='what to measure'
    )
    parser.add_argument(
        '--models',
        nargs='+',
        type=parse_model,
        default=[parse_candidate(name) for name in DEFAULT_MODELS],
        metavar='NAME[:SIZES][+FLAG...]',
        help=f'candidates; by default {" ".join(DEFAULT_MODELS)}',
    )
    parser.add_argument(
        '--reference',
        metavar='NAME',
        help=f'which of the models to divide by; by default {DEFAULT_REFERENCE} if it was '
        'measured, else the first that was',
    )
    parser.add_argument(
        '--shapes', nargs='+', type=parse_shape, metavar='HxW', help='images; 800x1344 by default'
    )
    parser.add_argument(
        '--scaling',
        action='store_true',
        help=f'a series of square images of {", ".join(map(str, SCALING_SIDES))} pixels (or of '
        '--shapes), with tables by size and a plot',
    )
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['float32'])
    parser.add_argument('--batch', type=positive, help='images in a batch; 1 by default')
    parser.add_argument(
        '--stage',
        type=int,
        choices=(1, 2, 3, 4),
        default=1,
        help='whose tokens and super token size the operation takes',
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--threads', type=positive, help='of CPU operations; as many as torch chooses by default'
    )
    parser.add_argument('--rounds', type=positive, default=10)
    parser.add_argument(
        '--seconds',
        type=seconds,
        help=f'begin no more rounds of a case after so long, but do {MIN_ROUNDS} in any case',
    )
    parser.add_argument('--warmup', type=positive, default=2, help='calls before the first round')
    parser.add_argument(
        '--no-memory',
        action='store_true',
        help='skip peak memory on the CPU, which takes a process for each candidate and case',
    )
    parser.add_argument(
        '--out', type=output_path, metavar='PATH', help='write PATH.json and PATH.md (and PATH.png)'
    )
    return parser


def parse_args() -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args()
    names = [candidate.name for candidate in args.models]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        parser.error(f'--models has {", ".join(sorted(twice))} more than once')
    if args.reference is not None and args.reference not in names:
        parser.error(f'--reference {args.reference} is not one of --models: {", ".join(names)}')
    if COUNT in args.modes and (len(args.modes) > 1 or args.scaling):
        parser.error(f'{COUNT} goes alone: it measures nothing')
    if args.shapes is None:
        args.shapes = [(s, s) for s in SCALING_SIDES] if args.scaling else [(800, 1344)]
    if args.out is not None:
        try:
            check_output(list_files(args.out, args.scaling))
        except OSError as error:
            parser.error(f'--out {args.out}: cannot write there: {error}')
    if args.device == 'cuda' and COUNT not in args.modes:  # Which needs none.
        import torch

        if not torch.cuda.is_available():
            parser.error('--device cuda: there is no CUDA device that torch can use')
    return args


def list_references(args: argparse.Namespace) -> list[str]:
    """What to divide by, the best first."""
    if args.reference is not None:
        return [args.reference]
    return [DEFAULT_REFERENCE, *(candidate.name for candidate in args.models)]


def list_cases(args: argparse.Namespace) -> Iterator[Case]:
    for mode in args.modes:
        for dtype in args.dtypes:
            for shape in args.shapes:
                yield Case(mode, shape, args.batch or 1, dtype, args.device, args.stage)


def count(args: argparse.Namespace, command: str, console: Console) -> None:
    from mmsvit.benchmarking.count_report import count_cases, counts_table, write_counts

    environment = describe_environment()
    cases, files = [], []
    for case, found in count_cases(args.models, args.shapes, args.dtypes, args.batch):
        cases.append((case, found))
        console.print(counts_table(case, found))
        if args.out is not None:
            files = write_counts(args.out, command, environment, cases)
    for file in files:
        print(f'wrote {file}')
    if all(counts.error for _, found in cases for counts in found.values()):
        sys.exit('every candidate failed')


def main() -> None:
    args = parse_args()
    import torch

    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # Before the environment is described.
    settings = Settings(args.rounds, args.seconds, args.warmup, threads, not args.no_memory)
    command = shlex.join(['python', 'tools/benchmark.py', *sys.argv[1:]])
    console = Console()
    console.width = max(console.width, MIN_WIDTH)  # Of a pipe, it knows no width.
    if COUNT in args.modes:
        count(args, command, console)
        return
    environment = describe_environment() | measure_rates(args.device)
    report = Report(command, environment, settings, [], args.scaling)
    files: list[Path] = []
    for case in list_cases(args):
        with Console(stderr=True).status('') as status:
            found = measure_case(args.models, case, settings, list_references(args), status.update)
        report.cases.append(found)
        console.print(terminal_table(found))
        if args.out is not None:  # After each case: a long run may be cut short.
            files = report.write(args.out)
    for file in files:
        print(f'wrote {file}')
    results = [r for found in report.cases for r in found.results if r.name != COPY]
    if all(result.error is not None for result in results):
        sys.exit('every candidate failed')


if __name__ == '__main__':
    main()
