"""Load weights into an :class:`mmsvit.SViT`: all of them, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor

from .published import PUBLISHED_AT, PUBLISHED_NAMES, backbone_state_dict, some_names
from .reading import read_checkpoint

WAYS_OUT = (
    f'The authors of SViT publish ImageNet weights ({PUBLISHED_NAMES}) through the links at '
    f'{PUBLISHED_AT}: download one by hand and put it there, or name another with '
    '--cfg-options model.backbone.init_cfg.checkpoint=PATH. To train from scratch instead: '
    '--cfg-options model.backbone.init_cfg=None model.backbone.norm_eval=False'
)


def check_weights_are_there(node: object, key: str = 'model') -> None:
    """Check that the files which ``init_cfg`` of type ``Pretrained`` names exist, before anything is built.

    Args:
        node: A config's ``model``, or a part of it.
        key: Where in the config it is.

    Raises:
        FileNotFoundError: A file on this machine does not exist; the message names key and file.
    """
    if isinstance(node, (list, tuple)):
        for place, value in enumerate(node):
            check_weights_are_there(value, f'{key}.{place}')
    if not isinstance(node, dict):
        return
    kind = str(getattr(node.get('type'), '__name__', node.get('type'))).rpartition('.')[2]
    path = node.get('checkpoint') if kind in ('Pretrained', 'PretrainedInit') else None
    if isinstance(path, str) and '://' not in path and not Path(path).expanduser().exists():
        more = f'. {WAYS_OUT}' if key == 'model.backbone.init_cfg' else ''
        raise FileNotFoundError(f'{key}.checkpoint is {path!r}, which does not exist{more}')
    for name, value in node.items():
        check_weights_are_there(value, f'{key}.{name}')


def load_pretrained(backbone: BaseModule, path: str | Path, prefix: str | None = None) -> None:
    """Load a checkpoint into an :class:`mmsvit.SViT`, all of it or nothing.

    Weights of stages that the backbone does not have (``out_indices``) are left out, and
    norms of its outputs (``out_norm_cfg``) keep their initial values if the checkpoint
    has none.

    Args:
        backbone: The model.
        path: See :func:`read_checkpoint`.
        prefix: See :func:`backbone_state_dict`.

    Raises:
        FileNotFoundError: There is no such file; the message says where to get one.
        ValueError: It cannot be read, or weights are missing, unexpected or of another
            shape; the message names them.
    """
    try:
        found = backbone_state_dict(read_checkpoint(path), prefix)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}. {WAYS_OUT}') from None
    except ValueError as error:
        raise ValueError(f'cannot load {str(path)!r}: {error}') from error
    stages = len(backbone.stages)
    beyond = re.compile(
        rf'stages\.({stages - 1}\.downsample|[{stages}-9])\.|out_norms\.[{stages}-9]\.'
    )
    found = {key: value for key, value in found.items() if not beyond.match(key)}
    expected = backbone.state_dict()
    if not any(key.startswith('out_norms.') for key in found):
        found.update((k, v) for k, v in expected.items() if k.startswith('out_norms.'))

    empty = [key for key, value in found.items() if value.ndim > 1 and not value.any()]
    found = inside_wrappers(found, expected)
    check_fit(found, expected, repr(str(path)))
    if empty:  # No layer of SViT is initialised so.
        raise ValueError(f'{str(path)!r} holds nothing but zeros in {some_names(empty)}')
    backbone.load_state_dict(found)
    print_log(f'SViT: loaded {len(found)} backbone weights from {path}', logger='current')


def inside_wrappers(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give weights the names that they have where a wrapper keeps a layer, as LoRA's do.

    ``qkv.weight`` is then ``qkv.base_layer.weight`` of the model, for example. What such a wrapper adds
    keeps its initial values.

    Args:
        found: Weights to load.
        expected: Those of the model.
    """
    kept: dict[str, list[str]] = {}
    for key in expected.keys() - found.keys():
        *layer, _, last = key.split('.')
        plain = '.'.join([*layer, last])
        if plain in found and plain not in expected and found[plain].shape == expected[key].shape:
            kept.setdefault(plain, []).append(key)
    names = {plain: keys[0] for plain, keys in kept.items() if len(keys) == 1}
    wrappers = tuple(f'{plain.rpartition(".")[0]}.' for plain in names)
    layers = tuple(f'{key.rpartition(".")[0]}.' for key in names.values())
    added = {
        k: v for k, v in expected.items() if k.startswith(wrappers) and not k.startswith(layers)
    }
    return {**added, **{names.get(key, key): value for key, value in found.items()}}


def check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of weights.

    Args:
        found: Weights to load.
        expected: Those of the model.
        source: What ``found`` is from, for the message.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; the message names
            them.
    """
    problems = [
        ('missing from the file', [key for key in expected if key not in found]),
        ('in the file but not in the model', [key for key in found if key not in expected]),
        (
            'of another shape',
            [
                f'{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}'
                for key, value in expected.items()
                if key in found and found[key].shape != value.shape
            ],
        ),
    ]
    if any(keys for _, keys in problems):
        lines = [
            f'{len(keys)} weights are {what}: {some_names(keys)}' for what, keys in problems if keys
        ]
        raise ValueError(
            f'{source} does not fit this SViT ({_describe(expected)}; the file: '
            f'{_describe(found)}). Nothing was loaded.\n  ' + '\n  '.join(lines)
        )


def _describe(weights: Mapping[str, Tensor]) -> str:
    """Widths and depths as the weights tell them, so that a wrong arch can be seen at once."""
    blocks: dict[int, int] = {}
    widths: dict[int, int] = {}
    for key, value in weights.items():
        match = re.match(r'stages\.(\d+)\.blocks\.(\d+)\.norm1\.weight$', key)
        if match:
            stage, block = int(match.group(1)), int(match.group(2))
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
            widths[stage] = value.numel()
    if not blocks:
        return 'not an SViT'
    return (
        f'embed_dims {[widths[stage] for stage in sorted(widths)]}, '
        f'depths {[blocks[stage] for stage in sorted(blocks)]}'
    )
