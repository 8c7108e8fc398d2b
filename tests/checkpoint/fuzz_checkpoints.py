"""Read many spoilt checkpoints, each in a process that may only refuse or read it.

    python tests/checkpoint/fuzz_checkpoints.py NUMBER SEED

A real checkpoint is changed at random: bytes and opcodes of its pickle, names that it calls, dtypes of its
arrays, the structure of the zip archive. The process of a file fails if it crashes, hangs, takes too
much memory, runs code, or raises anything but a ValueError. A thousand files take about a minute, and run
in CI; 100,000 on demand:

    python tests/checkpoint/fuzz_checkpoints.py 100000 1
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import traceback
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MessageHub

from mmsvit.checkpoint import read_checkpoint

SECONDS, GIGABYTES = 20, 8
MARKER = 'code ran'
NAMES = (
    'numpy ndarray',
    'numpy dtype',
    'numpy._core.multiarray _reconstruct',
    'numpy._core.multiarray scalar',
    'numpy.core.multiarray scalar',
    'builtins getattr',
    'builtins bytearray',
    'builtins set',
    'builtins eval',
    'os system',
    'posix system',
    'torch Tensor',
    'torch FloatTensor',
    'torch Size',
    'torch.storage UntypedStorage',
    'torch._utils _rebuild_tensor_v2',
    'argparse Namespace',
    'mmengine.logging.history_buffer HistoryBuffer',
    '_codecs encode',
    'collections OrderedDict',
)
CODES = ('O8', 'V8', 'U4', 'S9', 'M8', 'c8', 'f8', 'i8', 'b1', 'f4,O8', '|O')


def real_pickle() -> tuple[bytes, dict[str, bytes]]:
    """The pickle of a runner's checkpoint, and the other records of the archive."""
    hub = MessageHub.get_instance('fuzz')
    for value in (0.5, 0.25):
        hub.update_scalar('train/loss', value)
    hub.update_info('iter', 3)
    buffer = BytesIO()
    content = dict(
        state_dict=dict(weight=torch.arange(12.0).reshape(3, 4), half=torch.ones(5).half()),
        meta=dict(epoch=1, iter=2, seed=np.int64(7)),
        message_hub=hub.state_dict(),
        array=np.arange(6, dtype=np.float32).reshape(2, 3),
    )
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in records if name.endswith('data.pkl'))
    return records.pop(name), records


def unsafe_call(rng: random.Random) -> bytes:
    """A call of some global with some arguments."""
    module, name = rng.choice(NAMES).split()
    arguments = [
        (f'touch "{MARKER}"',),
        (10**6, 10**6),
        (10**11,),
        (rng.choice(CODES), False, True),
        ((2, 3), 'O'),
        (b'x' * rng.randrange(64),),
        (),
        ({},),
    ]
    called = pickle.dumps(rng.choice(arguments), 2)[2:-1]
    end = rng.choice([b'R', b'\x81', b'R' + pickle.dumps({'a': 1}, 2)[2:-1] + b'b'])
    return b'c' + f'{module}\n{name}\n'.encode() + called + end


def doubled_tuples(depth: int) -> bytes:
    """A tuple of 2**depth elements, as the key of a dict."""
    steps = (
        b'h' + bytes([i]) * 1 + b'h' + bytes([i]) + b'\x86q' + bytes([i + 1]) for i in range(depth)
    )
    return b'}(' + b')q\x00' + b'0' * 0 + b''.join(steps) + b'Nu'


def doubled_lists(rng: random.Random) -> bytes:
    """Lists or dicts that hold the one before twice, or that are filled where they are used."""
    empty, filled = rng.choice([(b']', b'(**e'), (b'}', b'(K\x01*K\x02*u')])
    steps = [empty + b'q' + bytes([i]) for i in range(rng.randrange(2, 120))]
    fill = [filled.replace(b'*', b'h' + bytes([i])) for i in range(len(steps) - 1)]
    if rng.random() < 0.5:
        return b'(' + steps[0] + b''.join(map(bytes.__add__, steps[1:], fill)) + b't'
    later = b''.join(b'h' + bytes([i + 1]) + part for i, part in enumerate(fill))
    return b'(' + b''.join(steps) + later + b't'


def spoil(data: bytes, rng: random.Random) -> bytes:
    """One change of a pickle."""
    kind = rng.randrange(8)
    at = rng.randrange(2, len(data))
    if kind == 0:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if kind == 2:
        part = rng.randrange(2, len(data))
        return data[:at] + data[part : part + rng.randrange(1, 40)] + data[at:]
    if kind == 3:  # A name is exchanged for another.
        parts = data.split(b'c', 1 + rng.randrange(8))
        end = parts[-1].find(b'\n', parts[-1].find(b'\n') + 1)
        module, name = rng.choice(NAMES).split()
        return b'c'.join(parts[:-1]) + b'c' + f'{module}\n{name}'.encode() + parts[-1][end:]
    if kind == 4:  # A dtype is exchanged for another.
        code = rng.choice(CODES).encode()
        for old in (b'f8', b'f4', b'i8'):
            found = data.find(b'X\x02\x00\x00\x00' + old)
            if found >= 0 and rng.random() < 0.7:
                new = b'X' + len(code).to_bytes(4, 'little') + code
                return data[:found] + new + data[found + 7 :]
        return data
    if kind == 5:  # Something is built beside the content: popped again, or left in its place.
        return data[:2] + unsafe_call(rng) + rng.choice([b'0' + data[2:], b'.'])
    if kind == 6:
        return data[:2] + doubled_lists(rng) + b'.'
    return data[:2] + doubled_tuples(rng.randrange(20, 120)) + b'.'


def write(file: Path, rng: random.Random, real: tuple[bytes, dict[str, bytes]]) -> None:
    """Write a spoilt checkpoint."""
    data, records = real
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = spoil(data, rng)
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', data)
        for name, record in records.items():
            if rng.random() < 0.98:
                archive.writestr('archive/' + name.partition('/')[2], record)
    if rng.random() < 0.1:
        content = bytearray(file.read_bytes())
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content)


def touch(value: object, seen: set[int]) -> None:
    """Read every number, so that memory that does not belong to it would be noticed."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        if value.numel() < 10**8:
            value.double().sum() if value.is_floating_point() else value.sum()
    elif isinstance(value, np.ndarray):
        value.tobytes()
    elif isinstance(value, dict):
        for part in value.values():
            touch(part, seen)
    elif isinstance(value, (list, tuple)):
        for part in value:
            touch(part, seen)
    elif hasattr(value, '__dict__'):
        touch(vars(value), seen)


def read_in_child(file: Path) -> int:
    """Status of a process that reads the file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 3
    try:
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30,) * 2)
        with suppress(ValueError):
            content = read_checkpoint(file)
            touch(content, set())
            json.dumps(content, default=lambda _: None, skipkeys=True)  # walks, remembering nothing
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    number, seed = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    real = real_pickle()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        file = Path('checkpoint.pth')
        for i in range(number):
            write(file, random.Random(f'{seed} {i}'), real)
            status = read_in_child(file)
            if status or Path(MARKER).exists():
                bad.append(i)
                print(
                    f'file {i} of seed {seed}: status {status}, {MARKER}: {Path(MARKER).exists()}'
                )
                Path(MARKER).unlink(missing_ok=True)
    print(f'{number} files, {len(bad)} failures')
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
