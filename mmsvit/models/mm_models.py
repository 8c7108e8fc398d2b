"""Models of MMDetection, MMSegmentation and MMPretrain: building one, and finding things in it."""

from __future__ import annotations

import copy

from mmengine.config import Config
from mmengine.model import (
    BaseModel,
    MMDistributedDataParallel,
    is_model_wrapper,
    revert_sync_batchnorm,
)
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from .svit import SViT


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a config as the runner does, for use by one process.

    The config stays as it is. SyncBN, which is for training on several GPUs, becomes BN.

    Raises:
        ValueError: The config has no model, or one of a type that is not registered.
    """
    if cfg.get('model') is None:
        raise ValueError('the config has no model')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    model_cfg = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:  # Where mmpretrain's configs have it.
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    try:
        model = MODELS.build(model_cfg)
    except KeyError as error:  # Its text is one long sentence, which str() would quote.
        raise ValueError(f'the model cannot be built: {error.args[0]}') from error
    return revert_sync_batchnorm(model)


def unwrap(model: BaseModel | MMDistributedDataParallel) -> BaseModel:
    """The model itself, without what distributes it over processes."""
    return model.module if is_model_wrapper(model) else model


def backbones_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The backbones of a model, of any type, by name, such as ``'student.backbone'``."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition('.')[2] == 'backbone'
    }


def find_svit(model: nn.Module) -> SViT:
    """The SViT in a model, wherever it is.

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        if isinstance(module, SViT):
            return module
    raise ValueError(
        f'{type(model).__name__} has no mmsvit.SViT; its backbone is '
        f'{type(getattr(model, "backbone", None)).__name__}'
    )


def takes_rgb(preprocessor: nn.Module) -> bool:
    """Whether a ``data_preprocessor`` turns the BGR of image files into RGB for the model."""
    # MMEngine, MMSegmentation and MMPretrain, in this order, name it so.
    flags = ('_channel_conversion', 'channel_conversion', 'to_rgb')
    return any(getattr(preprocessor, flag, False) for flag in flags)
