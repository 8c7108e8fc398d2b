"""Read checkpoints without running code from them, and write weights alone."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import socket
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from torch import Tensor

from ..atomic_file import atomic_file
from .archive import UnsafeStructureError, check_pickles, check_records, check_sums
from .safe_globals import allow_runner_checkpoints

SAFETENSORS = '.safetensors'
WEB = ('http://', 'https://')
TIMEOUT = 60  # seconds that a server may say nothing


class UnsafeCheckpointError(ValueError):
    """A checkpoint that cannot be read without running code from it."""


_trusted = False


def _first_line(error: Exception) -> str:
    return str(error).partition('\n')[0]


def _why_unsafe(error: Exception, path: str) -> str | None:
    """What is unsafe about a file that could not be read; None if it is corrupt or incomplete."""
    if isinstance(error, UnsafeStructureError):
        return str(error)
    refused = re.search(r'GLOBAL (\S+) (?:was not an allowed|whose module)', str(error))
    if refused:
        return refused.group(1)
    refused = re.search(r'(\S.*) is not allowed in a checkpoint', str(error))
    if refused:
        return refused.group(1)
    # Records with the right checksum are no damage: somebody wrote them so.
    if isinstance(error, pickle.UnpicklingError) and '://' not in path and zipfile.is_zipfile(path):
        return 'a pickle that torch.save does not write'
    return None


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
    parts = urlsplit(url)
    # Keyed by the whole address: files of other places may have the same name.
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    file = Path(torch.hub.get_dir(), 'checkpoints', key, Path(parts.path).name or 'checkpoint')
    if file.is_file():
        print_log(f'{url} was downloaded before: {file} is used', logger='current')
        return str(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    print_log(f'Downloading {url} to {file}', logger='current')
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
    except (OSError, HTTPException) as error:
        raise OSError(f'cannot download the checkpoint {url!r}: {error}') from error
    finally:
        socket.setdefaulttimeout(before)
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
        ValueError: It is corrupt or incomplete.
    """
    path, repeat = str(path), ''
    if path.startswith(WEB):
        repeat = f' Remove the file to download {path} again.'
        path = download(path)
    elif '://' not in path:
        path = str(Path(path).expanduser())
        if not Path(path).exists():
            raise FileNotFoundError(f'the checkpoint {path!r} does not exist')
        if not Path(path).is_file():  # To open a pipe would wait for its other end.
            raise ValueError(f'the checkpoint {path!r} is a folder, pipe or device, not a file')
    try:
        with get_local_path(path) as file:
            if path.endswith(SAFETENSORS):
                checkpoint = _read_safetensors(file)
            else:
                # At every call: torch's context manager of safe globals, used by others, resets the list.
                allow_runner_checkpoints()
                checkpoint = _read_torch(file, map_location)
    except (PermissionError, ImportError, MemoryError):
        raise
    except Exception as error:  # Corrupt bytes raise almost anything.
        reason = _why_unsafe(error, path)
        if reason is not None:
            raise UnsafeCheckpointError(
                f'{path!r} is refused: to read it, torch would have to run code from it, or work '
                f'without bounds ({reason}). Get it from a source that you trust, as '
                '.safetensors or with its tensors alone. Only if you would also run any program of '
                'whoever made the file: --trust-checkpoint, or '
                'mmsvit.checkpoint.trust_checkpoints() in a program of your own.'
            ) from None  # torch's own message advises to switch the check off.
        raise ValueError(
            f'{path!r} is corrupt or incomplete ({type(error).__name__}: {_first_line(error)}); a '
            'download that broke off, a damaged disk, or a web page saved under that name? Expected '
            f'a file written by torch.save, or one that ends in {SAFETENSORS}.{repeat}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path!r} holds {type(checkpoint).__name__}, expected a dict with the weights under '
            "'model' or 'state_dict', or the weights themselves"
        )
    meta = checkpoint.get('meta', {})
    if not isinstance(meta, (dict, Tensor)):
        print_log(
            f"'meta' in {path!r} is ignored: expected a dict, found {type(meta).__name__}",
            logger='current',
            level=logging.WARNING,
        )
        checkpoint['meta'] = {}
    elif isinstance(meta, dict) and 'config' in meta:
        # Runner.resume would run this text as Python, to compare numbers of GPUs.
        del meta['config']
    return checkpoint


def _read_torch(file: str | Path, map_location: str | torch.device | None) -> Any:
    if _trusted:
        return torch.load(file, map_location=map_location, weights_only=False)
    entries = check_records(file)
    before = sys.getswitchinterval()
    with ThreadPoolExecutor(1) as pool:  # Beside reading, on another core.
        # Between records it needs the interpreter, for which it would wait up to 5 ms each.
        sys.setswitchinterval(1e-5)
        try:
            sums = pool.submit(check_sums, file, entries)
            try:
                check_pickles(file, entries)
                return torch.load(file, map_location=map_location, weights_only=True)
            finally:
                sums.result()  # Where they are wrong, it is damage, whatever else was found.
        finally:
            sys.setswitchinterval(before)


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
        # Copies: the format does not allow two names for the same memory.
        tensors = {key: value.contiguous().clone() for key, value in weights.items()}
        metadata = dict(format='pt', meta=json.dumps(meta))
        package = _import_safetensors()
        with atomic_file(path) as part:
            package.torch.save_file(tensors, part, metadata=metadata)
    else:
        with atomic_file(path) as part:
            torch.save(dict(state_dict=dict(weights), meta=meta), part)
