"""The checkpoints that the authors published, under mmsvit's names.

Three kinds of file hold an SViT backbone: one that the authors published
(``model`` beside optimizer state and an ``argparse.Namespace``, with a
classifier and constants among the weights), the same converted by
``tools/convert_checkpoint.py``, and one that an MMEngine runner saved. Weights that are
known not to belong to the backbone are dropped by name; all others must
fit exactly. The classifier around the backbone, as the authors published it, is
``backbone``, ``neck`` and ``head`` of an mmpretrain ``ImageClassifier``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

PUBLISHED_NAMES = 'stvit-{small,base,large}-{224,384}.pth'
PUBLISHED_AT = 'https://github.com/hhb072/STViT'

# The published model's names and ours, outer names first.
_RENAMED = (
    ('patch_embed.proj.', 'stem.'),
    ('layers.', 'stages.'),
    ('.downsample.proj.', '.downsample.'),
    ('.pos_embed.conv.', '.pos_embed.'),
    ('.norm1.norm.', '.norm1.'),
    ('.attn.stoken_refine.', '.attn.attend.'),
    ('.mlp2.conv.conv.', '.ffn.dwconv.'),
    ('.mlp2.', '.ffn.'),
)
# The published classifier, and what it is in an ImageClassifier with mmsvit.ProjectionPooling.
_CLASSIFIER = {'proj.': 'neck.proj.', 'norm.': 'neck.norm.', 'head.': 'head.fc.'}
# The one-hot kernels by which the published code gathers and scatters.
_CONSTANT = re.compile(r'.*\.attn\.(unfold|fold)\.weights$')
# 1x1 convolutions there are linear layers here, and a layer scale is a vector.
_POINTWISE = re.compile(r'.*\.(attn\.attend\.(qkv|proj)|ffn\.fc[12])\.weight$')
_LAYER_SCALE = re.compile(r'.*\.gamma_[12]$')

_KEYS_SHOWN = 8
# How names of parameters and statistics end; other floating point tensors may hold infinity.
TRAINED = ('weight', 'bias', 'running_mean', 'running_var', 'gamma_1', 'gamma_2')
WRAPPERS = ('module.', '_orig_mod.')  # what DDP and torch.compile put before names


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a checkpoint under their names, without what wrappers put before them."""
    weights = checkpoint
    for container in ('state_dict', 'model'):
        if isinstance(checkpoint.get(container), Mapping):
            weights = checkpoint[container]
            break
    if not all(isinstance(key, str) and not key.startswith(WRAPPERS) for key in weights):
        plain = {_without_wrappers(str(key)): value for key, value in weights.items()}
        if len(plain) < len(weights):
            twice = [key for key in weights if key != _without_wrappers(str(key))]
            raise ValueError(
                'the checkpoint is ambiguous: it holds the same weights with and without a prefix '
                f'of {WRAPPERS}: {some_names(twice)}. Save one of them alone'
            )
        weights = plain
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f'the checkpoint holds no weights: found the keys {some_names(checkpoint)}, expected weights '
            "under 'model' (the authors' files) or 'state_dict' (a runner's)"
        )
    _check_values(weights)
    return weights


def _without_wrappers(key: str) -> str:
    """A name without what DDP and torch.compile put before it."""
    while key.startswith(WRAPPERS):
        key = key.partition('.')[2]
    return key


def _check_values(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that nobody has trained.

    Raises:
        ValueError: Some are not finite, or larger than the memory behind them.
    """
    dense = {key: value for key, value in weights.items() if value.layout == torch.strided}
    expanded = [
        key
        for key, value in dense.items()
        if value.numel() * value.element_size() > value.untyped_storage().nbytes()
    ]
    if expanded:
        raise ValueError(
            f'the checkpoint is corrupt: {len(expanded)} weights repeat a few stored numbers: '
            f'{some_names(expanded)}'
        )
    bad = [
        key
        for key, value in dense.items()
        if value.is_floating_point()
        # Infinity can be a mask's.
        and not (value.isfinite() if key.endswith(TRAINED) else ~value.isnan()).all()
    ]
    if bad:
        raise ValueError(
            f'the checkpoint holds NaN or infinity in {len(bad)} weights: {some_names(bad)}. Use an '
            'earlier one'
        )


def _is_published(weights: Mapping[str, Tensor]) -> bool:
    return 'patch_embed.proj.0.weight' in weights


def backbone_state_dict(
    checkpoint: Mapping[str, Any], prefix: str | None = None
) -> dict[str, Tensor]:
    """Pick the backbone's weights out of a checkpoint, under mmsvit's names.

    Args:
        checkpoint: As read by :func:`read_checkpoint`.
        prefix: Where the backbone is in a larger model, such as ``'backbone.'``. By
            default ``'backbone.'`` if the checkpoint has it, else no prefix.

    Raises:
        ValueError: There are no weights, or none under ``prefix``.
    """
    weights = _weights(checkpoint)
    if prefix is None and any(key.startswith('backbone.') for key in weights):
        prefix = 'backbone.'
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        found = {key[len(prefix) :]: v for key, v in weights.items() if key.startswith(prefix)}
        if not found:
            raise ValueError(f'no weights start with {prefix!r}; found {some_names(weights)}')
        weights = found
    if _is_published(weights):
        weights = dict(
            _convert_published(key, value)
            for key, value in weights.items()
            if not key.startswith(tuple(_CLASSIFIER)) and not _CONSTANT.match(key)
        )
    return dict(weights)


def model_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a whole model, those of the authors' classifier under mmpretrain's names.

    Args:
        checkpoint: As read by :func:`read_checkpoint`.

    Returns:
        What the authors published as weights of ``backbone``, ``neck`` and ``head``, with all
        that is unknown left in; any other checkpoint's weights as they are.

    Raises:
        ValueError: There are no weights.
    """
    weights = _weights(checkpoint)
    if not _is_published(weights):
        return weights
    backbone = backbone_state_dict(weights)
    classifier = {
        ours + key[len(theirs) :]: value
        for key, value in weights.items()
        for theirs, ours in _CLASSIFIER.items()
        if key.startswith(theirs)
    }
    return {**{f'backbone.{key}': value for key, value in backbone.items()}, **classifier}


def _convert_published(key: str, value: Tensor) -> tuple[str, Tensor]:
    for theirs, ours in _RENAMED:
        key = key.replace(theirs, ours)
    if _POINTWISE.match(key):
        value = value.flatten(1)
    elif _LAYER_SCALE.match(key):
        value = value.flatten()
    return key, value


def some_names(keys: Iterable) -> str:
    """The first names of many, for a message."""
    keys = [str(key) for key in keys]
    more = f', ... ({len(keys) - _KEYS_SHOWN} more)' if len(keys) > _KEYS_SHOWN else ''
    return ', '.join(keys[:_KEYS_SHOWN]) + more
