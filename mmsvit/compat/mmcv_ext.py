"""Detectors without mmcv's compiled ops: torchvision's kernels in their place.

mmcv's ops do not build on every machine. What Mask R-CNN and its kin need of them
torchvision has, compiled for CPU and CUDA. :func:`install` makes Python import
``torchvision_ops.py`` for ``mmcv._ext`` where no other ``mmcv._ext`` is to be found; no
file of another package is touched.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

EXTENSION = 'mmcv._ext'
STAND_IN = Path(__file__).resolve().with_name('torchvision_ops.py')
# Importing one of these imports mmcv's ops, or remembers that they were not there.
_USERS = ('mmdet.structures', 'mmdet.models', 'mmdet.utils', 'mmdet.apis')


class StandInFinder(MetaPathFinder):
    """Finds the stand-in. Asked last, so only where there is no compiled extension."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The stand-in's spec for mmcv's extension, None for anything else."""
        if fullname == EXTENSION:
            return importlib.util.spec_from_file_location(fullname, STAND_IN)
        return None


def install() -> None:
    """Let ``mmcv.ops`` be imported without its compiled extension, in this process.

    Costs nothing until mmcv is imported. Warns where it comes too late, because
    MMDetection was imported before and found no ops.
    """
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        return
    sys.meta_path.append(StandInFinder())
    late = [name for name in _USERS if name in sys.modules]
    if late and EXTENSION not in sys.modules:
        warnings.warn(
            f"{late[0]} was imported before mmsvit and without mmcv's compiled ops, so its heads "
            "will raise on use. Import mmsvit first (mmsvit's tools do), or build mmcv's ops.",
            stacklevel=3,
        )


def is_stand_in() -> bool:
    """Whether ``mmcv._ext`` is the stand-in; imports mmcv."""
    spec = importlib.util.find_spec(EXTENSION)
    return spec is not None and spec.origin == str(STAND_IN)
