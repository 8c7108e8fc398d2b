"""Models of MMDetection, MMSegmentation and MMPretrain: building one, and finding things in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

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


def check_channels(model: nn.Module) -> None:
    """Check that the neck of an SViT, or the heads where there is none, take its channels.

    Args:
        model: With ``backbone``, ``neck`` and heads as in MMDetection and MMSegmentation; models
            inside of it are checked as well. A neck or head that does not tell its channels is not.

    Raises:
        ValueError: One takes others; the message names the setting.
    """
    for name, backbone in backbones_by_name(model).items():
        if not isinstance(backbone, SViT):
            continue
        outputs = [feature.channels for feature in backbone.feature_info]
        outer = name.rpartition('.')[0]
        for taker, module in _first_after(model.get_submodule(outer)):
            _check_taker('.'.join(filter(None, ('model', outer, taker))), module, outputs)


def _check_taker(name: str, module: nn.Module, outputs: list[int]) -> None:
    """Check a neck or head against the channels of a backbone's outputs."""
    found: Any = module.in_channels
    index: Any = getattr(module, 'in_index', None)
    expected = outputs
    if index is not None:
        chosen = [index] if isinstance(index, int) else index
        if not all(-len(outputs) <= i < len(outputs) for i in chosen):
            raise ValueError(
                f'{name}.in_index is {index}, but the backbone has {len(outputs)} outputs'
            )
        expected = [outputs[i] for i in chosen]
        if isinstance(found, int):  # Of one output, or of several as one map.
            found, expected = [found], [sum(expected)]
    if list(found) != expected:
        raise ValueError(
            f'{name}.in_channels is {list(found)}, but the outputs of the backbone that it takes have '
            f'{expected} channels: set it to these'
        )


def _first_after(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What takes the outputs of a backbone and tells how many channels it expects, by name."""
    neck = getattr(model, 'neck', None)
    if neck is not None:
        if isinstance(getattr(neck, 'in_channels', None), (list, tuple)):
            yield 'neck', neck
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads: Any = getattr(model, name, None)
        several = isinstance(heads, nn.ModuleList)
        for i, head in enumerate(heads if several else [heads]):
            # mmseg's; a cascade's later heads take what the first gives, too.
            if hasattr(head, 'in_channels') and hasattr(head, 'in_index'):
                yield f'{name}[{i}]' if several else name, head


def takes_rgb(preprocessor: nn.Module) -> bool:
    """Whether a ``data_preprocessor`` turns the BGR of image files into RGB for the model."""
    # MMEngine, MMSegmentation and MMPretrain, in this order, name it so.
    flags = ('_channel_conversion', 'channel_conversion', 'to_rgb')
    return any(getattr(preprocessor, flag, False) for flag in flags)
