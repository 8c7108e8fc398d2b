"""What ``mkdocs build`` does beyond ``mkdocs.yml``.

The pages are written to be read in the repository as well. So README.md and CONTRIBUTING.md
are pages of the site without a copy of them in ``docs/``, and the site takes along each file of
the repository that a page links to.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md'}
LINK = re.compile(r'\[([^][]*)\]\(([^)\s#]+)(#[^)\s]*)?\)')
ROLE = re.compile(r':(?:attr|class|data|func|meth|mod):(?=<code>)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs/``."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to files of the site."""
    folder = Path(page.file.src_uri).parent
    here = ROOT if page.file.generated_by else DOCS / folder

    def to_site(link: re.Match) -> str:
        text, target, anchor = link.group(1), link.group(2), link.group(3) or ''
        path = Path(os.path.normpath(here / target))
        if path.is_dir():
            return text
        if path.is_relative_to(DOCS):
            uri = path.relative_to(DOCS).as_posix()
        elif path.is_file():
            name = path.relative_to(ROOT).as_posix()
            uri = PAGES.get(name, name)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
        else:  # A link to elsewhere, or a broken one, which MkDocs reports.
            return link.group(0)
        return f'[{text}]({Path(os.path.relpath(uri, folder)).as_posix()}{anchor})'

    return LINK.sub(to_site, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the names of roles, which docstrings have and Markdown does not."""
    return ROLE.sub('', html)
