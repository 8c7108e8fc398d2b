"""Finding the configs that come with mmsvit, installed or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def config_path(name: str) -> str:
    """Path of a config of mmsvit, to inherit from or to build.

    In a config of your own: ``_base_ = [__import__('mmsvit').config_path('NAME.py')]``.

    Args:
        name: Path below ``configs/``, such as ``'svit_maskrcnn_coco.py'``.

    Raises:
        FileNotFoundError: There is no such config; the message lists those there are.
    """
    # A wheel has the configs where MIM looks for them, a checkout at its top.
    folders = [_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'configs']
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    found = sorted(
        str(path.relative_to(folder)) for folder in folders for path in folder.rglob('*.py')
    )
    raise FileNotFoundError(f'mmsvit has no config {name!r}; it has {", ".join(found) or "none"}')
