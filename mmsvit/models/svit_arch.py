"""The published architectures, and the check of SViT's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmengine.model import PretrainedInit
from torch import nn

from ..ops.backend import BACKENDS
from .super_token_attention import ATTENTIONS

ARCHS: dict[str, dict] = {
    'small': dict(
        embed_dims=(64, 128, 320, 512),
        depths=(3, 5, 9, 3),
        num_heads=(1, 2, 5, 8),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, None, None),
    ),
    'base': dict(
        embed_dims=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
    'large': dict(
        embed_dims=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
}
"""The published architectures, one entry for each of the four stages.

``super_token_sizes`` are in tokens of the stage, an int or (height, width);
``layer_scale`` is the initial value, or None for no layer scale.
"""

NUM_STAGES = 4
MIN_INPUT_SIZE = 32
NORM_LAYERS = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def resolve_arch(
    arch: str | dict, super_token_sizes: Sequence | None, num_iters: Sequence[int] | None
) -> dict[str, tuple]:
    """Check ``arch`` and return it with a tuple of four under each key."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch {arch!r} is unknown; use one of {list(ARCHS)} or a dict')
        arch = ARCHS[arch]
    elif not isinstance(arch, dict):
        raise TypeError(f'arch must be a name or a dict, found {type(arch).__name__}: {arch!r}')
    keys = set(ARCHS['small'])
    if set(arch) != keys:
        raise ValueError(
            f'arch has wrong keys: missing {sorted(keys - set(arch))}, '
            f'unknown {sorted(set(arch) - keys)}; a dict needs exactly {sorted(keys)}'
        )
    own = arch not in ARCHS.values()
    arch = dict(arch)
    for key, value in (('super_token_sizes', super_token_sizes), ('num_iters', num_iters)):
        if value is None:
            continue
        if own and isinstance(value, (list, tuple)) and list(arch[key]) != list(value):
            raise ValueError(
                f'{key} is set twice: {arch[key]} in arch, {value} beside it. Keep one; '
                f'{key}=None beside it keeps that of arch'
            )
        arch[key] = value
    for key, values in arch.items():
        if not isinstance(values, (list, tuple)) or len(values) != NUM_STAGES:
            raise ValueError(
                f'{key} needs {NUM_STAGES} entries, one for each stage, found {values!r}'
            )
        arch[key] = tuple(values)
    for key in ('embed_dims', 'depths', 'num_heads', 'num_iters'):
        if not all(_is_int(value) and value >= 1 for value in arch[key]):
            raise ValueError(f'{key} must be whole numbers of 1 or more, found {arch[key]}')
    for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
        if dims % heads:
            raise ValueError(
                f'num_heads must divide embed_dims in every stage: {heads} does not divide {dims} '
                f'(num_heads={arch["num_heads"]}, embed_dims={arch["embed_dims"]})'
            )
    if arch['embed_dims'][0] % 2:
        raise ValueError(
            f'embed_dims[0] must be even, half of it is the width of the stem, '
            f'found {arch["embed_dims"][0]}'
        )
    sizes = [
        tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        for size in arch['super_token_sizes']
    ]
    if not all(len(size) == 2 and all(_is_int(s) and s >= 1 for s in size) for size in sizes):
        raise ValueError(
            'super_token_sizes must be whole numbers of 1 or more, or pairs (height, width) of '
            f'them, found {arch["super_token_sizes"]}'
        )
    arch['super_token_sizes'] = tuple(sizes)
    for value in arch['layer_scale']:
        if value is not None and not _is_number(value):
            raise ValueError(
                'layer_scale holds the initial value of each stage or None for no layer scale, '
                f'found {arch["layer_scale"]}'
            )
    return arch


def find_pretrained(init_cfg: dict | list | None) -> dict | None:
    """The entry of ``init_cfg`` that names a checkpoint, in any of the ways MMEngine allows."""
    entries = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    found = [
        entry
        for entry in entries
        if isinstance(entry, dict)
        and (
            entry.get('type') is PretrainedInit
            or str(entry.get('type')).rpartition('.')[2] in ('Pretrained', 'PretrainedInit')
        )
    ]
    if not found:
        return None
    if len(entries) > 1:
        raise ValueError(
            f'init_cfg of type Pretrained must be alone: it sets every weight; found {init_cfg}'
        )
    if not found[0].get('checkpoint'):
        raise ValueError(f'init_cfg of type Pretrained needs a checkpoint, found {found[0]}')
    return found[0]


def check_arguments(
    embed_dims: tuple[int, ...],
    token_sampling: str,
    ops_backend: str,
    in_channels: int,
    mlp_ratio: float,
    rates: dict[str, float],
    out_indices: Sequence[int],
    frozen_stages: int,
    norm_cfg: dict,
    out_norm_cfg: dict | None,
) -> None:
    """Check what :class:`mmsvit.SViT` is given, but for ``arch``.

    Raises:
        ValueError: An argument is not as described there; the message names it.
    """
    if token_sampling not in ATTENTIONS:
        raise ValueError(
            f'token_sampling must be one of {list(ATTENTIONS)}, found {token_sampling!r}'
        )
    if ops_backend not in BACKENDS:
        raise ValueError(f'ops_backend must be one of {list(BACKENDS)}, found {ops_backend!r}')
    if not _is_int(in_channels) or in_channels < 1:
        raise ValueError(f'in_channels must be a whole number of 1 or more, found {in_channels!r}')
    if not _is_number(mlp_ratio) or int(mlp_ratio * min(embed_dims)) < 1:
        raise ValueError(f'mlp_ratio must make the FFN at least 1 wide, found {mlp_ratio!r}')
    for name, rate in rates.items():
        if not _is_number(rate) or not 0 <= rate < 1:
            raise ValueError(f'{name} must be in [0, 1), found {rate!r}')
    if (
        not isinstance(out_indices, (list, tuple))
        or not out_indices
        or not all(_is_int(i) and 0 <= i < NUM_STAGES for i in out_indices)
        or list(out_indices) != sorted(set(out_indices))
    ):
        raise ValueError(
            f'out_indices must be ascending stage numbers from 0 to {NUM_STAGES - 1}, '
            f'found {out_indices!r}'
        )
    if not _is_int(frozen_stages) or not -1 <= frozen_stages <= NUM_STAGES:
        raise ValueError(
            f'frozen_stages must be from -1 (none) to {NUM_STAGES}, found {frozen_stages!r}'
        )
    allowed = tuple(NORM_LAYERS)
    if not isinstance(norm_cfg, dict) or norm_cfg.get('type') not in allowed:
        raise ValueError(f'norm_cfg needs a type out of {allowed}, found {norm_cfg!r}')
    allowed = ('LN', *NORM_LAYERS)
    if out_norm_cfg is not None and (
        not isinstance(out_norm_cfg, dict) or out_norm_cfg.get('type') not in allowed
    ):
        raise ValueError(
            f'out_norm_cfg must be None or have a type out of {allowed}, found {out_norm_cfg!r}'
        )


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """The batch norm that ``norm_cfg`` describes."""
    cfg = dict(norm_cfg)
    requires_grad = cfg.pop('requires_grad', True)
    norm = NORM_LAYERS[cfg.pop('type')](channels, **cfg)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return norm
