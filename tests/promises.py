"""Write docs/promises.md: what mmsvit promises, and the tests that check it.

    python tests/promises.py

A test says what it checks: ``@pytest.mark.promise('SECTION', 'promise', 'figures')``. Tests of the
same promise share a row. The figures are those of the last run of the test.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / 'docs' / 'promises.md'
SECTIONS = ('Runs', 'Numbers', 'Safety', 'Load')
ON_DEMAND = ('slow', 'stress', 'peers')
HEADER = """\
# Promises, and the tests that check them

Written by `python tests/promises.py` from the marks of the tests. Tests without a mark and those marked
`slow` run in CI; `stress` and `peers` run on demand (`python -m pytest -m stress tests/stress -s`). All ran
on a CPU with torch 2.11, distributed runs as two ranks with gloo; **nothing here has run on a CUDA GPU**.
Figures are those of the last run: November 2026, onedl-mmengine 0.10.12.
"""


class Promise(NamedTuple):
    """What one test checks."""

    section: str
    text: str
    figures: str
    test: str


def _marks(node: ast.FunctionDef) -> Iterator[tuple[str, list]]:
    """Names and arguments of the marks of a test."""
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        target = call.func if call else decorator
        if ast.unparse(target).startswith('pytest.mark.'):
            name = ast.unparse(target).removeprefix('pytest.mark.')
            yield name, [ast.literal_eval(a) for a in call.args] if name == 'promise' else []


def promises_of(file: Path) -> Iterator[Promise]:
    """The promises of a test file, in its order."""
    tree = ast.parse(file.read_text())
    whole = ' '.join(
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'pytestmark'
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = list(_marks(node))
        names = [name for name, _ in marks] + whole.replace('pytest.mark.', '').split()
        runs = [name for name in ON_DEMAND if name in names]
        for name, arguments in marks:
            if name == 'promise':
                section, text, figures = (*arguments, '')[:3]
                test = f'`{file.relative_to(TESTS)}::{node.name}`'
                yield Promise(section, text, figures, ' '.join([test, *(f'({r})' for r in runs)]))


def page() -> str:
    """The text of docs/promises.md.

    Raises:
        ValueError: A test names a section that there is not.
    """
    rows: dict[str, dict[str, list[Promise]]] = {name: defaultdict(list) for name in SECTIONS}
    for file in sorted(TESTS.rglob('test_*.py')):
        for promise in promises_of(file):
            if promise.section not in rows:
                raise ValueError(f'{promise.test}: section {promise.section!r} is unknown')
            rows[promise.section][promise.text].append(promise)
    lines = [HEADER]
    for section, promises in rows.items():
        lines += [f'## {section}\n', '| promise | tests | figures |', '| --- | --- | --- |']
        for text, tests in promises.items():
            figures = '; '.join(one.figures for one in tests if one.figures) or 'passed'
            lines.append(f'| {text} | {", ".join(one.test for one in tests)} | {figures} |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    PAGE.write_text(page())
