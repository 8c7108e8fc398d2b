"""Counting without a GPU: the rules on operations that can be counted by hand, and the table."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, run_python

from mmsvit.benchmarking.candidates import parse_candidate
from mmsvit.benchmarking.counting import count_case
from mmsvit.benchmarking.workloads import Case

BY_HAND = """
import contextlib
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from mmsvit.benchmarking.counting import Recorder
from mmsvit.benchmarking.fake_cuda import move_to_fake_cuda, prepare_process

prepare_process()
mode = FakeTensorMode()

def count(what, name):
    with mode, Recorder() as recorder, contextlib.suppress(DataDependentOutputException):
        what()
    counts = recorder.counts
    print(name, counts.launches, counts.bytes_moved, counts.peak_bytes, dict(counts.host_syncs),
          dict(counts.cpu_tensors), sep=';')

with mode:
    x = torch.empty(2, 8, 16, 16, device='cuda')
    last = x.contiguous(memory_format=torch.channels_last)
conv = nn.Conv2d(8, 8, 3, padding=1)
depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
for model in (conv, depthwise):
    move_to_fake_cuda(model, mode)
count(lambda: x.view(-1), 'a view')
count(lambda: x + x, 'one operand twice')
count(lambda: x.expand(2, 2, 8, 16, 16).add(1), 'expanded')
count(lambda: x.zero_(), 'filled')
count(lambda: conv(x).sum().item(), 'waits')
count(lambda: torch.zeros(3), 'on the CPU')
with torch.no_grad():
    count(lambda: conv(x), 'convolution and bias')
    count(lambda: conv(last), 'a weight converted')
    count(lambda: depthwise(last), 'depthwise')
"""
N = 2 * 8 * 16 * 16 * 4


def test_rules_by_hand(tmp_path):
    script = tmp_path / 'by_hand.py'
    script.write_text(BY_HAND)
    rows = [line.split(';') for line in run_python(script).stdout.splitlines() if ';' in line]
    found = {name: (int(launches), int(moved)) for name, launches, moved, *_ in rows}
    weight, bias = 8 * 8 * 9 * 4, 8 * 4
    assert found['a view'] == (0, 0)
    assert found['one operand twice'] == (1, 2 * N)
    assert found['expanded'] == (1, N + 2 * N)
    assert found['filled'] == (1, N)
    assert found['convolution and bias'] == (2, N + weight + N + bias + 2 * N)
    assert found['a weight converted'] == (3, N + weight + N + bias + 2 * N + 2 * weight)
    assert found['depthwise'] == (1, 2 * N + 8 * 9 * 4)
    peaks = {row[0]: int(row[3]) for row in rows}
    assert peaks['one operand twice'] == N
    waiting, on_cpu = ({row[0]: row[i] for row in rows} for i in (4, 5))
    assert [name for name, what in waiting.items() if what != '{}'] == ['waits']
    assert [name for name, what in on_cpu.items() if what != '{}'] == ['on the CPU']


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'mode'),
    [
        ('svit-s:16-8-1-1', 'train'),
        ('svit-s:16-8-1-1+triton', 'train'),
        ('svit-s:16-8-1-1+triton+recompute', 'train'),
        ('svit-b:16-8-1-1+triton', 'train'),
        ('svit-s:16-8-1-1+triton', 'backbone'),
        ('swin-t', 'train'),
    ],
)
def test_the_table_is_what_is_counted(name, mode):
    table = json.loads((ROOT / 'docs' / 'benchmarks' / 'cuda_counts.json').read_text())
    cases = [c for c in table['cases'] if (c['case']['mode'], c['case']['shape'][0]) == (mode, 512)]
    (recorded,) = cases
    case = Case(**dict(recorded['case'], shape=tuple(recorded['case']['shape'])))
    counts = count_case(parse_candidate(name), case)
    assert counts.error is None
    expected = recorded['counts'][name]
    for key in ('launches', 'bytes_moved', 'bytes_saved'):
        assert getattr(counts, key) == expected[key], key
    assert counts.launches_of == expected['launches_of']


def test_what_cannot_be_counted_says_why():
    counts = count_case(parse_candidate('svit-s+compile'), Case('train', (64, 64), device='cuda'))
    assert '+compile' in counts.error
