"""What docs/reliability.md promises is held by tests that exist."""

from __future__ import annotations

import re
from functools import cache

from conftest import ROOT


def test_every_test_that_is_named_exists():
    text = (ROOT / 'docs' / 'reliability.md').read_text()
    named = re.findall(r'`((?:\w+/)?test_\w+\.py)::(test_\w+)`', text)
    # Each with its file, or it would not be looked at.
    assert len(named) == len(re.findall(r'`[^`\n]*\btest_[^`\n]*`', text)) > 50
    source = cache(lambda file: (ROOT / 'tests' / file).read_text())
    absent = [f'{file}::{name}' for file, name in named if f'\ndef {name}(' not in source(file)]
    assert not absent


def test_every_promise_names_a_test():
    text = (ROOT / 'docs' / 'reliability.md').read_text()
    promises = text.split('## Promises')[1].split('### Twenty kills')[0]
    rows = [line for line in promises.splitlines() if re.match(r'\| (?!promise |---)', line)]
    assert len(rows) > 40
    assert not [row for row in rows if '::test_' not in row.split(' | ')[1]]
