"""Results as tables on the terminal, JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from ..atomic_file import atomic_file
from .candidates import FLAGS
from .measure import COPY, CaseResult, Result, Settings, Spread
from .workloads import MODES

EXPLANATION = """\
Times are medians over the rounds, with first and third quartile in brackets. In each round every
candidate ran once, in turns; the ratio is taken round by round. Peak memory is that of weights
and of what a run needs on top. FLOPs are multiply-adds of inference of one image: of
convolutions and linear layers, and with what attention and super token sampling multiply. How to
read this and how to repeat it: [README.md](README.md).
"""


def list_files(out: Path, scaling: bool) -> list[Path]:
    """The files of a report: ``out`` with .json and .md, and .png for a series of image sizes."""
    suffixes = ('json', 'md', 'png') if scaling else ('json', 'md')
    return [out.with_name(f'{out.name}.{suffix}') for suffix in suffixes]


@dataclass
class Report:
    """All results of a benchmark.

    Attributes:
        command: The command line.
        environment: From :func:`describe_environment`.
        settings: How it was measured.
        cases: The results.
        scaling: Whether the cases are a series over image sizes.
    """

    command: str
    environment: dict[str, str]
    settings: Settings
    cases: list[CaseResult]
    scaling: bool = False

    def write(self, out: Path) -> list[Path]:
        """Write the files that :func:`list_files` names, and return them."""
        files = list_files(out, self.scaling)
        with atomic_file(files[0]) as part:
            part.write_text(json.dumps(self.as_dict(), indent=1) + '\n')
        plot = files[2] if self.scaling else None
        if plot is not None:
            with atomic_file(plot) as part:
                plot_scaling(self.cases, part)
        with atomic_file(files[1]) as part:
            part.write_text(self.as_markdown(plot))
        return files

    def as_dict(self) -> dict:
        """Everything, including all single times."""
        return dict(
            command=self.command,
            environment=self.environment,
            settings=asdict(self.settings),
            cases=[
                dict(
                    case=asdict(found.case),
                    reference=found.reference,
                    results=[
                        dict(asdict(result), peak_bytes=result.peak_bytes)
                        for result in found.results
                    ],
                )
                for found in self.cases
            ],
        )

    def as_markdown(self, plot: Path | None) -> str:
        """Command, environment, the plot if any, and a table for each case."""
        lines = ['# Benchmark', '', '```shell', self.command, '```', '']
        lines += [f'- {name}: {value}' for name, value in self.environment.items() if value]
        lines += ['', EXPLANATION]
        modes = dict.fromkeys(found.case.mode for found in self.cases)
        lines += [f'- *{mode}*: {MODES[mode]}.' for mode in modes]
        used = {
            flag for found in self.cases for r in found.results for flag in r.name.split('+')[1:]
        }
        lines += [f'- *+{flag}*: {meaning}.' for flag, meaning in FLAGS.items() if flag in used]
        lines.append('')
        if plot is not None:
            lines += [f'![Time and memory against image size]({plot.name})', '']
            for title, header, rows in scaling_tables(self.cases):
                lines += [f'## {title}', '', *markdown_table(header, rows), '']
        for found in self.cases:
            rows = [cells(found, r) for r in found.results]
            lines += [f'## {found.case}', '', *markdown_table(columns(found), rows), '']
            lines += [f'- {note}' for note in notes(found)] + [''] * bool(notes(found))
        return '\n'.join(lines)


def columns(found: CaseResult) -> list[str]:
    """Headings of the table of a case."""
    first = ['candidate', 'time, ms', f'ratio to {found.reference or "reference"}']
    if found.case.is_op:
        return [*first, 'bytes to move, MiB', 'of copy bandwidth', 'peak memory, MiB', 'GFLOPs']
    return [
        *first,
        'images/s',
        'peak memory, MiB',
        'parameters, M',
        'layers, GFLOPs',
        'with products, GFLOPs',
    ]


def cells(found: CaseResult, result: Result) -> list[str]:
    """A row of the table of a case."""
    if result.error is not None:
        return [result.name, 'failed', *['-'] * (len(columns(found)) - 2)]
    row = [result.name, _spread(result.time, 1e3), _spread(result.ratio)]
    if found.case.is_op:
        return [
            *row,
            _number(result.bytes_to_move, 2**-20),
            _spread(result.bandwidth_share, 100, '%'),
            _number(result.run_bytes, 2**-20),
            _number(result.total, 1e-9),
        ]
    return [
        *row,
        _number(found.case.batch / result.time.median if result.time else None),
        _number(result.peak_bytes, 2**-20),
        _number(result.parameters, 1e-6),
        _number(result.layers, 1e-9),
        _number(result.total, 1e-9),
    ]


def notes(found: CaseResult) -> list[str]:
    """Errors and other remarks below the table of a case."""
    failed = [f'{r.name} failed: {r.error}' for r in found.results if r.error is not None]
    not_counted = [
        f'Not in the FLOPs of {r.name}: {r.not_counted}'
        for r in found.results
        if r.not_counted is not None
    ]
    observed = [
        f'{r.name} found {", ".join(f"{number} {what}" for what, number in r.observed.items())}'
        for r in found.results
        if r.observed and r.error is None
    ]
    backends: dict[str, list[str]] = {}
    for r in found.results:
        if r.backend and r.error is None:
            backends.setdefault(r.backend, []).append(r.name)
    computed = [
        f'Super token operations by the {backend} backend in {", ".join(names)}'
        for backend, names in backends.items()
    ]
    return failed + not_counted + observed + computed


def terminal_table(found: CaseResult) -> Table:
    """The table of a case for the terminal."""
    table = Table(title=str(found.case), title_justify='left', caption_justify='left')
    for i, column in enumerate(columns(found)):
        table.add_column(column, justify='right' if i else 'left', no_wrap=i < 3)
    for result in found.results:
        table.add_row(*cells(found, result))
    table.caption = '\n'.join(notes(found)) or None
    return table


def scaling_tables(cases: Sequence[CaseResult]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of time and memory by image size: title, headings and rows of each."""
    tables = []
    for title, series in _series(cases):
        names = [r.name for r in series[0].results if r.name != COPY]
        header = ['pixels', 'tokens at stride 4', *names]
        for what, value in _QUANTITIES.items():
            rows = []
            for found in series:
                values = {r.name: _number(value(r)) for r in found.results}
                size = '{}x{}'.format(*found.case.shape)
                rows.append([size, str(_tokens(found)), *(values[name] for name in names)])
            tables.append((f'{title}: {what}', header, rows))
    return tables


def plot_scaling(cases: Sequence[CaseResult], path: Path) -> None:
    """Draw time and memory against the number of tokens, a line for each candidate."""
    # Not pyplot, which chooses a window system and keeps the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    series = _series(cases)
    figure = Figure(figsize=(9, 3.6 * len(series)), layout='constrained')
    rows = figure.subplots(len(series), 2, squeeze=False)
    for (title, members), axes in zip(series, rows):
        tokens = [_tokens(found) for found in members]
        names = [r.name for r in members[0].results if r.name != COPY]
        for axis, (label, value) in zip(axes, _QUANTITIES.items()):
            for name in names:
                values = [
                    next(value(r) for r in found.results if r.name == name) for found in members
                ]
                points = [(x, y) for x, y in zip(tokens, values) if y is not None]
                if points:
                    axis.plot(*zip(*points), marker='.', label=name)
            axis.set(xscale='log', yscale='log', xlabel='image, by tokens', ylabel=label)
            axis.set_xticks(tokens, ['{}x{}'.format(*f.case.shape) for f in members], rotation=45)
            axis.xaxis.minorticks_off()
            for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatted(LogFormatter())
            axis.set_title(title, fontsize=8)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _series(cases: Sequence[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    """Group the cases that differ only in shape, under a title."""
    groups: dict[str, list[CaseResult]] = {}
    for found in cases:
        case = found.case
        common = f'{case.mode}, batch {case.batch}, {case.dtype}, {case.device}'
        groups.setdefault(common, []).append(found)
    return list(groups.items())


def _milliseconds(result: Result) -> float | None:
    return None if result.time is None else 1e3 * result.time.median


def _peak_mebibytes(result: Result) -> float | None:
    return None if result.error or result.peak_bytes is None else result.peak_bytes / 2**20


_QUANTITIES = {'time, ms': _milliseconds, 'peak memory, MiB': _peak_mebibytes}


def _tokens(found: CaseResult) -> int:
    """The number of tokens of an image at stride 4."""
    height, width = found.case.shape
    return -(-height // 4) * -(-width // 4)


def _number(value: float | None, unit: float = 1.0) -> str:
    return '-' if value is None else _digits(value * unit)


def _digits(value: float) -> str:
    """At least three digits, and no exponent."""
    for bound, places in ((100, 0), (10, 1), (1, 2), (0.1, 3)):
        if abs(value) >= bound:
            return f'{value:.{places}f}'
    return f'{value:.4f}'


def _spread(spread: Spread | None, unit: float = 1.0, suffix: str = '') -> str:
    if spread is None:
        return '-'
    median, q1, q3 = (_digits(value * unit) for value in (spread.median, spread.q1, spread.q3))
    return f'{median}{suffix} ({q1}-{q3})'


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table, line by line; the first column to the left, the others to the right."""
    return [
        f'| {" | ".join(header)} |',
        f'| --- |{" ---: |" * (len(header) - 1)}',
        *(f'| {" | ".join(row)} |' for row in rows),
    ]
