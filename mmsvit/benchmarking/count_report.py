"""Counts as tables on the terminal, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from ..atomic_file import atomic_file
from .candidates import FLAGS, Candidate
from .counting import Counts, count_case
from .report import markdown_table
from .workloads import Case

TRAIN_BATCH, INFERENCE_BATCH = 2, 8
COLUMNS = ['candidate', 'launches', 'GB moved', 'GB saved for backward', 'GB at the peak']
EXPLANATION = """\
**Counted, not measured:** each model ran once over CUDA tensors without data, on a machine that
need not have a GPU, and its operations were counted. An operation reads what it is given once and
writes its result once; what caches save is not seen. The rules: `mmsvit/benchmarking/counting.py`.

- *train*: forward and backward of the backbone as detectors train it (drop path, frozen parts),
  under autocast. *inference*: weights and images in the dtype.
- *GB* are 10^9 bytes. *Saved* is what the forward pass keeps for the backward pass. *Peak* is of
  activations and gradients. Neither has weights, the optimizer, neck or heads.
- `auto` chooses plain PyTorch on CUDA until the kernels are proven on the GPU; `+triton` are the
  kernels.
"""


def count_cases(
    candidates: Sequence[Candidate],
    shapes: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    batch: int | None = None,
) -> Iterator[tuple[Case, dict[str, Counts]]]:
    """Count a training step and inference, case by case.

    Args:
        candidates: What to count.
        shapes: Heights and widths of images.
        dtypes: Of :data:`.workloads.DTYPES`.
        batch: Images; by default 2 in training and 8 in inference.
    """
    for mode, images in (('train', TRAIN_BATCH), ('backbone', INFERENCE_BATCH)):
        for dtype in dtypes:
            for shape in shapes:
                case = Case(mode, shape, batch or images, dtype, 'cuda')
                fitting = [c for c in candidates if not _is_for_another(c, case)]
                if fitting:
                    yield case, {c.name: count_case(c, case) for c in fitting}


def _is_for_another(candidate: Candidate, case: Case) -> bool:
    return bool(candidate.flags & ({'deploy'} if case.trains else {'recompute', 'cp'}))


def _title(case: Case) -> str:
    what = 'train' if case.trains else 'inference'
    return f'{what} {case.shape[0]}x{case.shape[1]}, batch {case.batch}, {case.dtype}'


def _cells(name: str, counts: Counts) -> list[str]:
    if counts.error is not None:
        return [name, 'failed', '-', '-', '-']
    moved, saved, peak = (
        f'{number / 1e9:.2f}' if number else '-'
        for number in (counts.bytes_moved, counts.bytes_saved, counts.peak_bytes)
    )
    return [name, str(counts.launches), moved, saved, peak]


def _notes(found: dict[str, Counts]) -> list[str]:
    notes = []
    for name, counts in found.items():
        if counts.error is not None:
            notes.append(f'{name} failed: {counts.error}')
        for what, where in (
            ('waits for the GPU', counts.host_syncs),
            ('makes tensors on the CPU', counts.cpu_tensors),
        ):
            if where:
                notes.append(f'{name} {what}: {", ".join(where)}')
    return notes


def counts_table(case: Case, found: dict[str, Counts]) -> Table:
    """The table of a case for the terminal."""
    table = Table(title=f'counted: {_title(case)}', title_justify='left', caption_justify='left')
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify='right' if i else 'left', no_wrap=not i)
    for name, counts in found.items():
        table.add_row(*_cells(name, counts))
    table.caption = '\n'.join(_notes(found)) or None
    return table


def write_counts(
    out: Path,
    command: str,
    environment: dict[str, str],
    cases: Sequence[tuple[Case, dict[str, Counts]]],
) -> list[Path]:
    """Write ``out`` with .json and .md, and return both paths."""
    versions = {key: environment[key] for key in ('date', 'mmsvit', 'torch', 'triton')}
    flags = {flag for _, found in cases for name in found for flag in name.split('+')[1:]}
    lines = ['# CUDA: counted, not measured', '', '```shell', command, '```', '']
    lines += [f'- {key}: {value}' for key, value in versions.items()]
    lines += ['', EXPLANATION]
    lines += [f'- *+{flag}*: {meaning}.' for flag, meaning in FLAGS.items() if flag in flags]
    lines.append('')
    for case, found in cases:
        rows = [_cells(name, counts) for name, counts in found.items()]
        lines += [f'## {_title(case)}', '', *markdown_table(COLUMNS, rows), '']
        lines += [f'- {note}' for note in _notes(found)] + [''] * bool(_notes(found))
    record = dict(
        command=command,
        environment=versions,
        cases=[
            dict(case=asdict(case), counts={name: vars(c) for name, c in found.items()})
            for case, found in cases
        ],
    )
    files = [out.with_name(f'{out.name}.{suffix}') for suffix in ('json', 'md')]
    for file, text in zip(files, (json.dumps(record, indent=1) + '\n', '\n'.join(lines))):
        with atomic_file(file) as part:
            part.write_text(text)
    return files
