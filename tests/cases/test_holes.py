"""Files that were written to do harm: lists that grow when they are walked, and depth without end.

More attacks are in ``tests/checkpoint/test_attacks.py``; ``fuzz_checkpoints.py`` there makes new ones.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from mmsvit.checkpoint import UnsafeCheckpointError, read_checkpoint
from mmsvit.checkpoint import archive as checked


def written(tmp_path: Path, pickled: bytes, legacy: bool = False) -> Path:
    """A torch file with this pickle, after its protocol and before its end."""
    file = tmp_path / 'attack.pth'
    if legacy:
        torch.save({}, file, _use_new_zipfile_serialization=False)
        content = file.read_bytes()
        empty = pickle.dumps({}, 2)
        file.write_bytes(content.replace(empty, b'\x80\x02' + pickled + b'.'))
        return file
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + pickled + b'.')
        archive.writestr('archive/version', '3')
    return file


def doubled(empty: bytes, filled: bytes, levels: int = 100) -> bytes:
    """Lists or dicts, each of which holds the one before twice."""
    steps = [empty + b'q\x00']
    for i in range(levels):
        inner = b'h' + bytes([i])
        steps.append(empty + b'q' + bytes([i + 1]) + filled.replace(b'*', inner))
    return b'}U\x01a(' + b''.join(steps) + b'ts'


LISTS = doubled(b']', b'(**e')
DICTS = doubled(b'}', b'(K\x01*K\x02*u')
# All of them are in a list before they are filled.
EMPTY = b'](' + b''.join(b']q' + bytes([i]) for i in range(100)) + b'e'
FILL = b''.join(b'h' + bytes([i]) + b'(' + (b'h' + bytes([i + 1])) * 2 + b'e' for i in range(99))
FILLED_LATER = b'}U\x01a(' + EMPTY + FILL + b'ts'


@pytest.mark.promise(
    'Safety', 'Checkpoints cannot build objects, take memory or time without bounds'
)
@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    ('pickled', 'why'),
    [
        (LISTS, 'inside of each other without end'),
        (DICTS, 'inside of each other without end'),
        (FILLED_LATER, 'lists that grow where they are used'),
        (b'}U\x01a' + b']' * 10**5 + b'a' * (10**5 - 1) + b's', 'levels inside of each other'),
        (b'}U\x01a)' + b'\x85' * 10**5 + b's', 'levels inside of each other'),
    ],
    ids=['lists', 'dicts', 'filled later', 'deep lists', 'deep tuples'],
)
def test_what_grows_when_it_is_walked_is_refused(pickled, why, legacy, tmp_path):
    with pytest.raises(UnsafeCheckpointError, match=why):
        read_checkpoint(written(tmp_path, pickled, legacy))


def test_what_torch_writes_is_followed_to_its_end(tmp_path):
    shared = [1.5, 'text', None, True, 2**40, (1, 2, 3, 4)]
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    content = dict(
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        meta=dict(
            shared=[shared, shared], nothing=[(), [], {}], long={i: [i] for i in range(3000)}
        ),
    )
    torch.save(content, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['meta'] == content['meta']
    torch.save(content, tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / 'b.pth')['meta'] == content['meta']
    data = pickle.dumps(content['meta'], 2)
    assert checked.check_pickle(data + b'more', 0, len(data)) == len(data)


def test_a_name_without_end_ends(tmp_path):
    with pytest.raises(ValueError, match='the pickle is damaged'):
        read_checkpoint(written(tmp_path, b'cnumpy\nndarray'))


def test_opcodes_have_the_arguments_that_pickle_gives_them():
    for name, code in pickletools.code2op.items():
        size = checked.ARGUMENT_SIZES[ord(name)]
        if size:
            kind = code.arg.n
            lengths = {-2: 1, -3: 4, -4: 4}  # pickletools.TAKEN_FROM_ARGUMENT1, 4 and 4U
            assert size == lengths.get(kind, kind), code.name


@pytest.mark.skipif(os.name != 'posix', reason='shell scripts')
@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_a_number_of_gpus_is_no_program(script, tmp_path):
    if not (ROOT / 'tools' / script).exists():
        pytest.skip(f'{script} is gone')
    command = ['bash', ROOT / 'tools' / script, 'partition', 'job', 'config.py', 'checkpoint.pth']
    harmful = f'x[$(touch {tmp_path}/ran)]'
    for name in ('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK'):
        env = {**os.environ, name: harmful}
        subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert not list(tmp_path.iterdir())
