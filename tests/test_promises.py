"""docs/promises.md says what the tests say."""

from __future__ import annotations

from promises import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), 'run: python tests/promises.py'
