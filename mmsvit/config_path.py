"""Finding configs, those of mmsvit and those of the OpenMMLab libraries, to inherit from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def _config_folders(package: str) -> list[Path]:
    """Where the configs of an installed package are: a wheel has them where MIM looks for them."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f'the package {package!r} is not installed, so it has no configs')
    folder = Path(spec.origin).resolve().parent
    return [folder / '.mim' / 'configs', folder.parent / 'configs']  # the second in a checkout


def config_path(name: str) -> str:
    """Path of a config, to inherit from or to build.

    In a config of your own: ``_base_ = [__import__('mmsvit').config_path('NAME.py')]``.

    Args:
        name: Path below mmsvit's ``configs/``, such as ``'svit_maskrcnn_coco.py'``. With a
            package in front, ``'mmseg::_base_/datasets/ade20k.py'``, a config of that
            package. (MMEngine's own ``package::`` finds mmdet's configs only in some
            releases, and neither mmseg's nor ours.)

    Raises:
        FileNotFoundError: There is no such package or config; the message lists those of
            the same folder that there are.
    """
    package, _, path = name.rpartition('::')
    folders = _config_folders(package or 'mmsvit')
    for folder in folders:
        if (folder / path).is_file():
            return str(folder / path)
    found = sorted(
        {str(config.relative_to(folder)) for folder in folders for config in folder.rglob('*.py')}
    )
    near = [config for config in found if Path(config).parent == Path(path).parent] or found
    raise FileNotFoundError(
        f'{package or "mmsvit"} has no config {path!r}; it has {", ".join(near[:50]) or "none"}'
    )
