"""Find settings that nothing reads: a misspelt key is otherwise ignored without a word."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator

from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.runner import FlexibleRunner, Runner

# What the runners read of the top level beside their arguments, what MMEngine's config and the tools do.
READ = {
    *inspect.signature(Runner).parameters,
    *inspect.signature(FlexibleRunner).parameters,
    *('activation_checkpointing', 'compile', 'custom_imports', 'efficient_conv_bn_eval'),
    *('find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn'),
    *('test_pipeline', 'tta_model', 'tta_pipeline'),
} - {'cfg'}
# Of dicts that have no constructor to refuse an unknown key.
READ_OF = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'optim_wrapper.paramwise_cfg': {
        *('custom_keys', 'lr_mult', 'decay_mult', 'bias_lr_mult', 'bias_decay_mult'),
        *('norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult', 'dcn_offset_lr_mult'),
        *('bypass_duplicate', 'layer_decay_rate', 'backbone_lr_mult'),
    },
}
# Variables of a config file have any name; this close, one is a misspelt setting.
MISSPELT, NEAR, SIMILAR = 0.85, 0.75, 0.6
FORCE = '(--allow-unknown-keys accepts it)'


def _meant(key: str, known: Collection[str], cutoff: float = SIMILAR) -> str | None:
    """The known key that is nearest, if one is near."""
    return next(iter(difflib.get_close_matches(key, sorted(known), 1, cutoff)), None)


def _hint(meant: str | None) -> str:
    return f'; did you mean {meant!r}?' if meant else '.'


def check_options(cfg: Config, options: dict) -> None:
    """Check the settings of ``--cfg-options`` against the config that they go into.

    Args:
        cfg: The config file, before they are written into it.
        options: Values by keys with dots, such as ``'train_cfg.max_epochs'``.

    Raises:
        ValueError: Nothing reads one of them.
    """
    for option in options:
        top, *rest = option.split('.')
        if top not in READ:
            why = f'is no setting{_hint(_meant(top, READ))}'
            if top in cfg:
                why = f'is a variable of the config file, used before{_uses(cfg, top)}'
            raise ValueError(f'--cfg-options {option}: nothing reads it, {top!r} {why} {FORCE}')
        node, path = cfg.get(top), top
        for name in rest:
            if isinstance(node, (list, tuple)) and name.isdigit():
                node = node[int(name)] if int(name) < len(node) else None
            elif isinstance(node, dict):
                if name not in node:
                    _check_new(option, path, name, node)
                node = node.get(name)
            else:
                break  # Made by the option, or replaced: MMEngine says so.
            path = f'{path}.{name}'


def _check_new(option: str, path: str, name: str, node: dict) -> None:
    """Check a key that a dict does not have yet; what has a type refuses it by itself, when built."""
    if path in READ_OF:
        known = READ_OF[path]
        if name not in known:
            raise ValueError(
                f'--cfg-options {option}: nothing reads {name!r} of {path}, which has '
                f'{", ".join(sorted(known))}{_hint(_meant(name, known))} {FORCE}'
            )
    elif 'type' not in node and name != 'type' and (meant := _meant(name, node, NEAR)):
        raise ValueError(
            f'--cfg-options {option}: {path} has no {name!r} so far{_hint(meant)} {FORCE}'
        )


def _uses(cfg: Config, name: str) -> str:
    """Where the value of a variable is, or a setting of its name, as far as can be seen."""
    settings = cfg.to_dict()
    read = {key: value for key, value in settings.items() if key in READ}
    places = [
        key
        for key, value in _flatten(read, '')
        if key.endswith(f'.{name}') or (value == settings[name] and isinstance(value, (dict, list)))
    ]
    return f'; set {places[0]} instead.' if places else '.'


def _flatten(node: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for name, value in node.items():
            path = f'{key}.{name}' if key else str(name)
            yield path, value
            yield from _flatten(value, path)


def check_keys(cfg: Config) -> None:
    """Check a config for misspelt settings.

    Raises:
        ValueError: A key is nearly one that is read, and not that one.
    """
    for key in cfg:
        # A variable may be named after what it is for, such as val_evaluator_small.
        if key in READ or any(key.startswith(f'{name}_') for name in READ):
            continue
        if meant := _meant(key, READ, MISSPELT):
            raise ValueError(f'nothing reads {key!r} of the config{_hint(meant)} {FORCE}')
    for path, known in READ_OF.items():
        if path.endswith('paramwise_cfg') and not _is_stock(cfg):
            continue
        first, *rest = path.split('.')
        node = cfg.get(first)
        for name in rest:
            node = node.get(name) if isinstance(node, dict) else None
        for name in node if isinstance(node, dict) else ():
            if name not in known:
                raise ValueError(
                    f'nothing reads {name!r} of {path}{_hint(_meant(name, known))} {FORCE}'
                )


def _is_stock(cfg: Config) -> bool:
    """Whether a constructor whose settings are known reads ``paramwise_cfg``."""
    constructor = (cfg.get('optim_wrapper') or {}).get('constructor')
    name = getattr(constructor, '__name__', str(constructor)).rpartition('.')[2]
    own = 'LayerDecayOptimWrapperConstructor'
    stock = DefaultOptimWrapperConstructor.__name__
    return constructor is None or (name in (stock, own) and 'mmpretrain' not in str(constructor))
