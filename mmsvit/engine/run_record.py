"""What a run is: the settings that matter for continuing it, and how a resumed run compares them.

A checkpoint brings back the state of optimizer, schedules and gradient scaler, with the settings
that they were saved with; what the config says now has no effect on them. So a changed setting is
either used from now on, and named in the log, or it would be ignored or put the schedule out of
step, and the run is refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.runner import IterBasedTrainLoop, Runner

# Settings (regular expressions of whole keys) that a resumed run cannot change, and those that
# change nothing that is learned. All others are used from then on; docs/reliability.md lists them.
REFUSED = (
    r'optim_wrapper\.(optimizer|paramwise_cfg|constructor)(\..*)?',
    r'param_scheduler(\..*)?',
    r'train_cfg\.(type|by_epoch|max_epochs|max_iters)',
    'auto_scale_lr',
    'images in a step',
    'iterations in an epoch',
    'EMA',
)
SILENT = (
    r'model\.(.*\.)?init_cfg(\..*)?',  # The weights come from the checkpoint.
    r'train_dataloader\.(num_workers|persistent_workers|pin_memory|prefetch_factor)',
)
SECTIONS = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader')
PACKAGES = ('mmsvit', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


def _text(value: object) -> str:
    """A setting; classes and functions of pure Python configs by name, long ones by their hash."""
    if callable(value) and hasattr(value, '__name__'):
        return value.__name__
    text = repr(value)
    if len(text) > 200:
        return f'{text[:100]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]})'
    return text


def _flatten(node: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            if name == 'type' and isinstance(value, str):
                yield f'{key}.type', value.rpartition('.')[2]
            else:
                yield from _flatten(value, f'{key}.{name}')
    elif isinstance(node, (list, tuple)) and any(isinstance(value, dict) for value in node):
        for index, value in enumerate(node):
            yield from _flatten(value, f'{key}.{index}')
    else:
        yield key, _text(node)


def _length(sized: object) -> int | None:
    try:
        return len(sized)  # type: ignore[arg-type]
    except TypeError:  # a data set without a length
        return None


def averages_of(cfg: Config) -> list[dict]:
    """The hooks of a config that average weights."""
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    return [
        hook
        for hook in hooks
        if isinstance(hook, dict) and _text(hook.get('type')).strip("'").endswith('EMAHook')
    ]


def settings_of(runner: Runner) -> dict[str, str]:
    """The settings of a run that matter for continuing it, by the names of :data:`RULES`.

    Args:
        runner: With its training loop built.
    """
    cfg, loop = runner.cfg, runner.train_loop
    settings = {
        key: value for name in SECTIONS if name in cfg for key, value in _flatten(cfg[name], name)
    }
    loader = cfg.get('train_dataloader') or {}
    accumulated = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    scaling, randomness = cfg.get('auto_scale_lr') or {}, cfg.get('randomness') or {}
    averages = averages_of(cfg)
    by_epoch = not isinstance(loop, IterBasedTrainLoop)
    numbers = {
        'auto_scale_lr': scaling.get('base_batch_size') if scaling.get('enable') else None,
        'images in a step': loader.get('batch_size', 0) * get_world_size() * accumulated,
        'iterations in an epoch': _length(loop.dataloader) if by_epoch else None,
        'training images': _length(loop.dataloader.dataset),
        'ranks': get_world_size(),
        'EMA': len(averages),
        'randomness.seed': randomness.get('seed'),
        'randomness.deterministic': randomness.get('deterministic', False),
    }
    settings.update({key: repr(value) for key, value in numbers.items()})
    for hook in averages:
        settings.update(_flatten(dict(hook), 'EMA'))
    for name in PACKAGES:
        if name in sys.modules:
            settings[f'version of {name}'] = str(sys.modules[name].__version__)
    return settings


def compare(old: dict[str, str], new: dict[str, str]) -> tuple[list[str], list[str]]:
    """What a resumed run changes.

    Args:
        old: The settings of the run (:func:`settings_of`).
        new: Those of its resumption.

    Returns:
        Lines ``key: old -> new`` of what cannot be changed, and of what is used from now on.
    """
    refused: list[str] = []
    used: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, 'not set'), new.get(key, 'not set')
        if before == after or any(re.fullmatch(pattern, key) for pattern in SILENT):
            continue
        if key.startswith('version of') and 'not set' in (before, after):
            continue  # A package that one of the two did not need.
        cannot = any(re.fullmatch(pattern, key) for pattern in REFUSED)
        (refused if cannot else used).append(f'{key}: {before} -> {after}')
    return refused, used
