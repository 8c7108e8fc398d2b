"""SViT, the Super Token Vision Transformer, as a backbone for the OpenMMLab libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compat.mmcv_ext import install as _install_stand_in
from .config_path import config_path

if TYPE_CHECKING:
    from .models.svit import SViT

__version__ = '0.1.0'
__all__ = ['SViT', 'config_path']


# Before anybody imports mmcv.ops: torchvision's kernels where mmcv has none of its own.
_install_stand_in()


def __getattr__(name: str) -> object:
    # Torch and MMEngine are imported by those who need them: `python -m mmsvit.check_env`
    # must run where they are missing or broken, to say so.
    if name == 'SViT':
        from .models.svit import SViT

        return SViT
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
