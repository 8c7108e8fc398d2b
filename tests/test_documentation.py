"""What the documentation names is there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / 'docs').glob('*.md'))


def test_every_test_that_reliability_names_exists():
    text = (ROOT / 'docs' / 'reliability.md').read_text()
    named = re.findall(r'`((?:\w+/)?test_\w+\.py)::(test_\w+)`', text)
    # Each with its file, or it would not be looked at.
    assert len(named) == len(re.findall(r'`[^`\n]*\btest_[^`\n]*`', text)) > 50
    source = cache(lambda file: (ROOT / 'tests' / file).read_text())
    absent = [f'{file}::{name}' for file, name in named if f'\ndef {name}(' not in source(file)]
    assert not absent


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_within_the_documentation_lead_somewhere(page: Path):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if '://' in target:
            continue
        path, _, anchor = target.partition('#')
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == '.md':
            headings = re.findall(r'^#+ (.*)$', file.read_text(), re.MULTILINE)
            anchors = [re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings]
            assert anchor in anchors, target
