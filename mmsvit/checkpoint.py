"""Reading checkpoints without running code from them, and fitting them to :class:`mmsvit.SViT`.

Three kinds of file hold an SViT backbone: one that the authors published
(``model`` beside optimizer state and an ``argparse.Namespace``, with a
classifier and constants among the weights), the same converted by
``tools/convert_checkpoint.py``, and one that an MMEngine runner saved. What is
known not to belong to the backbone is dropped by name. Everything else must
fit exactly. The classifier around the backbone, as the authors published it, is
``backbone``, ``neck`` and ``head`` of an mmpretrain ``ImageClassifier``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.dist import barrier, is_distributed, is_main_process
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

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
SAFETENSORS = '.safetensors'
_WEB = ('http://', 'https://')


def _history_buffer_method(owner: type, name: str) -> Any:
    """Stand in for ``getattr``, which MMEngine's log history pickles for its own methods."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint')
    return getattr(owner, name)


def _allowed_globals() -> list:
    """What a checkpoint may hold beside tensors and plain Python data; nothing here runs code."""
    multiarray = (np.core if int(np.__version__.split('.')[0]) < 2 else np._core).multiarray
    dtypes = [type(np.dtype(name)) for name in ('?', *np.typecodes['AllInteger'], *'efd')]
    # numpy 2 renamed the module; files of either generation are read under both.
    functions = [
        (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    ]
    return [
        argparse.Namespace,
        HistoryBuffer,
        (_history_buffer_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        *functions,
        *dtypes,
    ]


def allow_runner_checkpoints() -> None:
    """Let torch's weights-only mode read what MMEngine's runner saves, in this process.

    Since torch 2.6 that mode is the default, and OpenMMLab's own MMEngine relies on the
    default: without this it cannot read its own checkpoints.
    """
    torch.serialization.add_safe_globals(_allowed_globals())


class UnsafeCheckpointError(ValueError):
    """A checkpoint that cannot be read without running code from it."""


_trusted = False


def _first_line(error: Exception) -> str:
    return str(error).partition('\n')[0]


def _check_sums(file: str) -> None:
    # torch writes checksums, but does not look at them when it reads.
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f'checksum of {damaged}')


def trust_checkpoints() -> None:
    """Let every checkpoint that this process reads from now on run code.

    This is for files of a source that you trust as you trust its programs, and that cannot be
    read otherwise. ``--trust-checkpoint`` of the tools is this. There is no way back.
    """
    global _trusted
    _trusted = True
    print_log(
        'CHECKPOINTS ARE TRUSTED: whatever program is hidden in a checkpoint that is read from now '
        'on will run, with all your rights: it can read, change and send away your files and keys. '
        'Read the weights once and save them as .safetensors (tools/convert_checkpoint.py), '
        'and you will not need this again.',
        logger='current',
        level=logging.WARNING,
    )


def download(url: str) -> str:
    """Fetch a file once, into the folder where torch and MMEngine keep what they download.

    Args:
        url: Beginning with ``http://`` or ``https://``.

    Returns:
        The path of the file.

    Raises:
        OSError: It cannot be fetched.
    """
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    file = folder / Path(urlsplit(url).path).name
    if file.is_file():
        print_log(f'{url} was downloaded before: {file} is used', logger='current')
        return str(file)
    folder.mkdir(parents=True, exist_ok=True)
    print_log(f'Downloading {url} to {file}', logger='current')
    try:
        torch.hub.download_url_to_file(url, str(file), progress=os.isatty(0))
    except (OSError, HTTPException) as error:
        raise OSError(f'cannot download the checkpoint {url!r}: {error}') from error
    return str(file)


def read_checkpoint(
    path: str | Path, map_location: str | torch.device | None = 'cpu'
) -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Files of torch are read in its weights-only mode, those that end in ``.safetensors`` by the
    package of that name (``pip install safetensors``); they hold tensors and text alone.

    Args:
        path: A file, an address on the web (:func:`download`), or a URL that MMEngine's file
            clients know.
        map_location: Where a torch file's tensors go, see ``torch.load``; on the CPU by default.

    Returns:
        The checkpoint as saved; of a safetensors file, ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: It is a safetensors file, and the package is missing.
        OSError: It cannot be downloaded.
        UnsafeCheckpointError: It needs code to be run to be read; a ValueError.
        ValueError: It is not a whole checkpoint.
    """
    path, repeat = str(path), ''
    if path.startswith(_WEB):
        repeat = f' Remove the file to download {path} again.'
        path = download(path)
    elif '://' not in path:
        path = str(Path(path).expanduser())
        if not Path(path).is_file():
            raise FileNotFoundError(f'the checkpoint {path!r} does not exist')
    try:
        with get_local_path(path) as file:
            if path.endswith(SAFETENSORS):
                checkpoint = _read_safetensors(file)
            else:
                # Again: torch's context manager, where others use it, takes away what was there.
                allow_runner_checkpoints()
                _check_sums(file)
                checkpoint = torch.load(file, map_location=map_location, weights_only=not _trusted)
    except (PermissionError, ImportError, MemoryError):
        raise
    except Exception as error:  # Damaged bytes can mean anything to a reader.
        refused = re.search(
            r'GLOBAL (\S+) (?:was not an allowed|whose module)|getattr\(.*\) is not', str(error)
        )
        if refused:
            raise UnsafeCheckpointError(
                f'{path!r} is refused: to read it, torch would have to run code from it '
                f'({refused.group(1) or refused.group(0)}). Get it from a source that you trust, as '
                '.safetensors or with its tensors alone. Only if you would also run any program of '
                'whoever made the file: --trust-checkpoint, or '
                'mmsvit.checkpoint.trust_checkpoints() in a program of your own.'
            ) from error
        raise ValueError(
            f'{path!r} is not a whole checkpoint ({type(error).__name__}: {_first_line(error)}); a '
            'download that broke off, a damaged disk, or a web page saved under that name? Expected '
            f'a file written by torch.save, or one that ends in {SAFETENSORS}.{repeat}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path!r} holds {type(checkpoint).__name__}, expected a dict with the weights under '
            "'model' or 'state_dict', or the weights themselves"
        )
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and 'config' in meta:
        # Runner.resume would run this text as Python, to compare numbers of GPUs.
        del meta['config']
    return checkpoint


def _import_safetensors() -> ModuleType:
    """The package, which is not needed otherwise."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f'{SAFETENSORS} files need the safetensors package: pip install safetensors'
        ) from error
    return safetensors


def _read_safetensors(file: str | Path) -> dict[str, Any]:
    safetensors = _import_safetensors()
    try:
        weights = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, framework='pt') as content:
            meta = json.loads((content.metadata() or {}).get('meta', '{}'))
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    return dict(state_dict=weights, meta=meta)


def save_weights(weights: Mapping[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
    """Write weights alone, in the format that the name of the file asks for.

    Args:
        weights: By name.
        path: The file; ``.safetensors`` for that format, anything else for torch's.
        meta: What else to keep, made of plain Python data that JSON knows.

    Raises:
        ImportError: A safetensors file is wanted, and the package is missing.
    """
    if path.suffix == SAFETENSORS:
        # Copies, because the format knows no two names of the same memory.
        tensors = {key: value.contiguous().clone() for key, value in weights.items()}
        metadata = dict(format='pt', meta=json.dumps(meta))
        _import_safetensors().torch.save_file(tensors, path, metadata=metadata)
    else:
        torch.save(dict(state_dict=dict(weights), meta=meta), path)


def load_from_weights_only(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What MMEngine calls to read a checkpoint, in all processes: :func:`read_checkpoint`."""
    if is_distributed() and str(filename).startswith(_WEB):
        if is_main_process():
            download(filename)
        barrier()  # The others find what it has fetched.
    return read_checkpoint(filename, map_location)


def install() -> None:
    """Have MMEngine read checkpoints by :func:`read_checkpoint`, in this process.

    By itself MMEngine unpickles what it downloads with all that is in it, and the onedl release
    reads whatever weights-only mode refuses once more without that mode: both run the code in it.
    """
    allow_runner_checkpoints()
    prefixes = ['', *_WEB, r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    CheckpointLoader.register_scheme(prefixes, load_from_weights_only, force=True)
    # What its loaders of names (torchvision://, open-mmlab://, mmcls://, pavi://) end in.
    mmengine_checkpoint.load_from_http = load_from_weights_only
    mmengine_checkpoint._safe_torch_load = load_from_weights_only  # onedl's


# On import, which the configs ask for: inferencers read a checkpoint before they build the model.
install()


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights of a checkpoint under the names it gives them, but for DDP's prefix."""
    weights = checkpoint
    for container in ('state_dict', 'model'):
        if isinstance(checkpoint.get(container), Mapping):
            weights = checkpoint[container]
            break
    if not all(isinstance(key, str) and not key.startswith('module.') for key in weights):
        weights = {str(key).removeprefix('module.'): value for key, value in weights.items()}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(
            f'the checkpoint holds no weights: found the keys {_some(checkpoint)}, expected weights '
            "under 'model' (the authors' files) or 'state_dict' (a runner's)"
        )
    return weights


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
            raise ValueError(f'no weights start with {prefix!r}; found {_some(weights)}')
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


def load_pretrained(backbone: nn.Module, path: str | Path, prefix: str | None = None) -> None:
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
        raise FileNotFoundError(
            f'{error}. The authors of SViT publish ImageNet weights ({PUBLISHED_NAMES}) through the '
            f'links at {PUBLISHED_AT}: download one by hand and put it there, or name another with '
            '--cfg-options model.backbone.init_cfg.checkpoint=PATH. To train from scratch instead: '
            '--cfg-options model.backbone.init_cfg=None model.backbone.norm_eval=False'
        ) from None
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

    check_fit(found, expected, repr(str(path)))
    backbone.load_state_dict(found)
    print_log(f'SViT: loaded {len(found)} backbone weights from {path}', logger='current')


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
            f'{len(keys)} weights are {what}: {_some(keys)}' for what, keys in problems if keys
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


def _some(keys: Any) -> str:
    keys = [str(key) for key in keys]
    more = f', ... ({len(keys) - _KEYS_SHOWN} more)' if len(keys) > _KEYS_SHOWN else ''
    return ', '.join(keys[:_KEYS_SHOWN]) + more
