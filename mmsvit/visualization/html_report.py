"""A report of text, tables and pictures in one HTML file, which also opens offline."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from matplotlib.figure import Figure

from ..atomic_file import atomic_file

STYLE = """
body { margin: 2.5rem auto; max-width: 68rem; padding: 0 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
img { max-width: 100%; height: auto; }
figure { margin: 0; } figcaption { color: #666; font-size: .9rem; }
table { border-collapse: collapse; } td, th { padding: .25rem 1.1rem .25rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #bbb; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class HtmlReport:
    """A page to which parts are added from top to bottom.

    Args:
        title: Heading of the page.
    """

    def __init__(self, title: str) -> None:
        self._title = escape(title)
        self._parts = [f'<h1>{self._title}</h1>']

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._parts.append(f'<h2>{escape(text)}</h2>')

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f'<p>{escape(text)}</p>')

    def code(self, text: str) -> None:
        """Add commands."""
        self._parts.append(f'<pre>{escape(text)}</pre>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; its first column holds names, the others numbers."""
        lines = [
            f'<tr>{"".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)}</tr>'
            for tag, row in (('th', head), *(('td', row) for row in rows))
        ]
        self._parts.append(f'<table>{"".join(lines)}</table>')

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a matplotlib figure."""
        buffer = BytesIO()
        figure.savefig(buffer, format='png')
        self._image(buffer.getvalue(), 'png', caption)

    def picture(self, picture: np.ndarray, caption: str) -> None:
        """Add a picture, RGB, uint8."""
        _, encoded = cv2.imencode('.jpg', picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        self._image(encoded.tobytes(), 'jpeg', caption)

    def _image(self, data: bytes, kind: str, caption: str) -> None:
        source = f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
        caption = escape(caption)
        self._parts.append(
            f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        )

    def write(self, path: str | Path) -> None:
        """Write the file."""
        body = '\n'.join(self._parts)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{self._title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
            f'<body>\n{body}\n</body></html>\n'
        )
        with atomic_file(path) as part:
            part.write_text(page, encoding='utf-8')
