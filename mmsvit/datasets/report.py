"""The report of an inspection: counts of each split, errors and warnings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SHOWN = 5  # examples of one kind of problem


def printable(text: str) -> str:
    """Text of others, such as a file name, without what would control a terminal."""
    return ''.join(
        letter if letter.isprintable() or letter in '\n\t' else repr(letter)[1:-1]
        for letter in text
    )


@dataclass
class Problem:
    """One kind of problem in one split.

    Attributes:
        level: ``'error'`` (training fails or learns something wrong) or ``'warning'`` (training
            runs, but the data deserve a look).
        split: For example ``'train'``.
        kind: What is wrong, in the plural.
        count: How often it occurs.
        examples: The first few, with file names.
    """

    level: str
    split: str
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Counts:
    """Counts of one data set; None, printed as a dash, is unknown."""

    split: str
    data_set: str
    images: int | None = None
    used: int | None = None  # after the data set's own filter
    labels: int | None = None  # objects, label maps or labelled images
    classes: int | None = None
    decoded: int | None = None
    loaded: int | None = None  # through the pipeline


class DatasetReport:
    """Counts and problems, in the order of their discovery."""

    def __init__(self) -> None:
        self.counts: list[Counts] = []
        self._problems: dict[tuple[str, str, str], Problem] = {}

    def error(self, split: str, kind: str, example: str) -> None:
        """Add an example of what makes training fail or learn something wrong."""
        self._add('error', split, kind, example)

    def warning(self, split: str, kind: str, example: str) -> None:
        """Add an example of what deserves a look but does not stop training."""
        self._add('warning', split, kind, example)

    def _add(self, level: str, split: str, kind: str, example: str) -> None:
        problem = self._problems.setdefault((level, split, kind), Problem(level, split, kind))
        problem.count += 1
        if len(problem.examples) < SHOWN:
            problem.examples.append(example)

    def problems(self, level: str) -> list[Problem]:
        """The problems of one level, ``'error'`` or ``'warning'``."""
        return [problem for problem in self._problems.values() if problem.level == level]

    def print(self, console: Console) -> None:
        """Write a table of the counts, the warnings, the errors, and a summary line."""
        table = Table(box=SIMPLE, pad_edge=False)
        names = [column.name for column in fields(Counts)]
        for name in names:
            table.add_column(
                name.replace('_', ' '),
                justify='left' if name in ('split', 'data_set') else 'right',
                overflow='fold',
            )
        for counts in self.counts:
            table.add_row(*[_cell(getattr(counts, name)) for name in names])
        console.print(table)
        for level, style in (('warning', 'yellow'), ('error', 'red')):
            for problem in self.problems(level):
                head = f'{level}: {problem.split}: {problem.kind} ({problem.count:,})'
                _print(console, head, style)
                for example in problem.examples:
                    _print(console, '    ' + example.replace('\n', '\n    '))
                if problem.count > len(problem.examples):
                    _print(console, f'    and {problem.count - len(problem.examples):,} more')
        kinds = {level: len(self.problems(level)) for level in ('error', 'warning')}
        summary = ', '.join(f'{n} kind{"s" * (n != 1)} of {level}' for level, n in kinds.items())
        _print(console, summary, 'red' if kinds['error'] else 'green')


def _cell(value: str | int | None) -> str:
    if value is None:
        return '-'
    return f'{value:,}' if isinstance(value, int) else escape(printable(value))


def _print(console: Console, text: str, style: str | None = None) -> None:
    """Print file names unchanged, without markup or line breaks."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
