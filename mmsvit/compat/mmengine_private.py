"""Every private piece of MMEngine that mmsvit overrides, sets or calls, with a check of them.

MMEngine may change such a piece in any release. :func:`check_mmengine` then fails with a sentence
when mmsvit is imported, instead of a hook that is silently never called again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import ModuleType

import mmengine
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.visualization import Visualizer

# Overridden, replaced or called: the owner, the name, and its first parameters.
METHODS: tuple[tuple[type | ModuleType, str, tuple[str, ...]], ...] = (
    (BaseModel, '_run_forward', ('self', 'data', 'mode')),
    (CheckpointHook, '_save_best_checkpoint', ('self', 'runner', 'metrics')),
    (CheckpointHook, '_save_checkpoint_with_step', ('self', 'runner', 'step', 'meta')),
    (DefaultOptimWrapperConstructor, '_validate_cfg', ('self',)),
    (OptimWrapper, '_clip_grad', ('self',)),
    (mmengine_checkpoint, 'load_from_http', ('filename', 'map_location')),
)
# Attributes of instances, which a method of the class must mention.
ATTRIBUTES: tuple[tuple[type, str], ...] = (
    (CheckpointHook, 'best_ckpt_path'),
    (CheckpointHook, 'best_ckpt_path_dict'),
    (CheckpointHook, 'file_client_args'),
    (CheckpointHook, 'keep_ckpt_ids'),
    (CheckpointHook, 'key_indicators'),
    (IterBasedTrainLoop, 'dataloader_iterator'),
    (Runner, '_load_from'),
    (Runner, '_resume'),
    (Visualizer, '_vis_backends'),
)


def _attributes_of(owner: type) -> set[str]:
    """The attributes that the methods of a class mention."""
    functions = (getattr(value, 'fget', value) for value in vars(owner).values())
    codes = (function.__code__ for function in functions if hasattr(function, '__code__'))
    return {name for code in codes for name in code.co_names}


def _differences() -> Iterator[str]:
    for owner, name, expected in METHODS:
        found = getattr(owner, name, None)
        if found is None:
            yield f'{owner.__name__}.{name} is gone'
            continue
        parameters = tuple(inspect.signature(found).parameters)
        if parameters[: len(expected)] != expected:
            yield f'{owner.__name__}.{name} takes {parameters}, expected {expected}'
    for owner, name in ATTRIBUTES:
        if name not in _attributes_of(owner):
            yield f'{owner.__name__} has no attribute {name}'


@functools.cache
def check_mmengine() -> None:
    """Compare the installed MMEngine with what mmsvit was written for; once in a process.

    Raises:
        ImportError: A private piece is not what it was; the message names it.
    """
    differences = list(_differences())
    if differences:
        raise ImportError(
            f'mmsvit does not fit MMEngine {mmengine.__version__}: {"; ".join(differences)}. '
            'Install the release that mmsvit pins in requirements.txt.'
        )
