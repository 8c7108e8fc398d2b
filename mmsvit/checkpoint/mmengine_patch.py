"""Have MMEngine read checkpoints by :func:`mmsvit.checkpoint.read_checkpoint`."""

from __future__ import annotations

from typing import Any

from mmengine.dist import barrier, is_distributed, is_main_process
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from ..compat.mmengine_private import check_mmengine
from .reading import WEB, download, read_checkpoint
from .safe_globals import allow_runner_checkpoints


def load_from_weights_only(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What MMEngine calls to read a checkpoint, on every rank: :func:`read_checkpoint`."""
    if is_distributed() and str(filename).startswith(WEB):
        if is_main_process():
            download(filename)
        barrier()  # The other ranks use the downloaded file.
    return read_checkpoint(filename, map_location)


def patch_mmengine() -> None:
    """Have MMEngine read checkpoints by :func:`read_checkpoint`, in this process.

    MMEngine itself unpickles downloads without restriction, and the onedl release retries without
    weights-only mode what that mode refuses: both run code from the file. Importing
    :mod:`mmsvit.checkpoint` calls this. There is no way back.

    Raises:
        ImportError: This MMEngine is not one that mmsvit fits; the message names the difference.
    """
    check_mmengine()
    allow_runner_checkpoints()
    prefixes = ['', *WEB, r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    CheckpointLoader.register_scheme(prefixes, load_from_weights_only, force=True)
    # The loaders of names (torchvision://, open-mmlab://, mmcls://, pavi://) end in this function.
    mmengine_checkpoint.load_from_http = load_from_weights_only
    if hasattr(mmengine_checkpoint, '_safe_torch_load'):  # The onedl releases have it.
        mmengine_checkpoint._safe_torch_load = load_from_weights_only
