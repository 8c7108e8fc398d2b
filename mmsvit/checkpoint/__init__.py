"""Checkpoints: safe reading, the authors' files, strict loading.

Importing this package calls :func:`patch_mmengine`: from then on MMEngine reads every checkpoint
of the process by :func:`read_checkpoint`. In a config::

    custom_imports = dict(imports=['mmsvit.checkpoint'])
"""

from .files import newest_valid_checkpoint
from .loading import check_fit, check_weights_are_there, load_pretrained
from .mmengine_patch import patch_mmengine
from .published import PUBLISHED_AT, PUBLISHED_NAMES, backbone_state_dict, model_state_dict
from .reading import (
    SAFETENSORS,
    UnsafeCheckpointError,
    download,
    read_checkpoint,
    save_weights,
    trust_checkpoints,
)
from .safe_globals import allow_runner_checkpoints

__all__ = [
    'PUBLISHED_AT',
    'PUBLISHED_NAMES',
    'SAFETENSORS',
    'UnsafeCheckpointError',
    'allow_runner_checkpoints',
    'backbone_state_dict',
    'check_fit',
    'check_weights_are_there',
    'download',
    'load_pretrained',
    'model_state_dict',
    'newest_valid_checkpoint',
    'patch_mmengine',
    'read_checkpoint',
    'save_weights',
    'trust_checkpoints',
]

patch_mmengine()
