"""The report of a GPU machine: each part a process with a limit, results kept, one page."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, import_tool

from mmsvit import prove_gpu


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The tool, on a machine that seems to have a GPU, with parts of its own."""
    module = import_tool('gpu_report')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(module, 'parse_args', lambda: arguments)
    arguments = Namespace(only=None, out=tmp_path / 'out', again=False, list=False, limit=30)
    module.arguments = arguments
    code = 'from pathlib import Path; p = Path("OUT/ran"); p.touch(); '
    module.PARTS = (
        module.Part('good', 'Good part', ('-c "print(6 * 7)"', f'-c \'{code}print("second")\'')),
        module.Part('bad', 'Bad part', ('-c "raise SystemExit(3)"', '-c "print(0)"')),
        module.Part('gone', 'Killed part', ('-c "import os; os.kill(os.getpid(), 11)"',)),
    )
    return module


def test_a_part_that_fails_is_a_result_and_the_others_go_on(report, capsys, tmp_path):
    report.main()
    out = capsys.readouterr().out
    assert '[1/3] Good part ... passed' in out and '[3/3] Killed part ... failed' in out
    page = (tmp_path / 'out' / 'report.md').read_text()
    assert '| Good part | passed |' in page and '| Bad part | failed |' in page
    assert '42\n' in page and 'second' in page and (tmp_path / 'out' / 'ran').is_file()
    assert 'exit status 3' in page and 'exit status -11' in page
    # After a command that failed, the next of its part is not run.
    assert 'print(0)' not in page


def test_a_part_that_does_not_end_is_killed_with_its_children(report, tmp_path, capsys):
    child = 'import time; time.sleep(60)'
    code = (
        'import subprocess, sys, time; '
        f'c = subprocess.Popen([sys.executable, "-c", "{child}"]); print(c.pid, flush=True); '
        'time.sleep(60)'
    )
    report.PARTS = (report.Part('slow', 'Slow part', (f'-c {shlex.quote(code)}',)),)
    report.arguments.limit = 3
    report.main()
    assert 'Slow part ... out of time, 3 s' in capsys.readouterr().out
    pid = (tmp_path / 'out' / 'slow.log').read_text().splitlines()[1]
    state = Path('/proc', pid, 'stat')
    assert not state.exists() or state.read_text().split()[2] == 'Z'


def test_parts_with_a_result_are_not_run_again(report, capsys, tmp_path):
    report.arguments.only = ['good']
    report.main()
    page = (tmp_path / 'out' / 'report.md').read_text()
    assert '| Bad part | not run |' in page
    report.arguments.only = None
    (tmp_path / 'out' / 'ran').unlink()
    report.main()
    assert 'Good part: has a result' in capsys.readouterr().out
    assert not (tmp_path / 'out' / 'ran').exists()
    report.arguments.again = True
    report.main()
    assert (tmp_path / 'out' / 'ran').exists()


def test_ap_and_tables_are_in_the_page(report, tmp_path):
    folder = tmp_path / 'out'
    (folder / 'good' / '1' / 'vis_data').mkdir(parents=True)
    scores = [{'loss': 1.0}, {'coco/bbox_mAP': 0.1234, 'coco/segm_mAP': 0.2}]
    (folder / 'good' / '1' / 'vis_data' / 'scalars.json').write_text(
        '\n'.join(map(json.dumps, scores))
    )
    (folder / 'bad.md').write_text('# Heading\n\n| a |\n')
    report.main()
    page = (folder / 'report.md').read_text()
    assert 'box AP 0.123, mask AP 0.200' in page
    assert '### Heading\n\n| a |' in page and 'exit status 3' in page


def test_without_a_gpu_it_says_what_it_would_do(report, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    report.main()
    out = capsys.readouterr().out
    assert 'torch finds no CUDA GPU' in out and 'good: Good part, at most 30 s' in out
    assert not (tmp_path / 'out').exists()


PARTS = import_tool('gpu_report').PARTS


@pytest.mark.parametrize('part', PARTS, ids=lambda part: part.name)
def test_commands_are_what_their_tools_take(part, monkeypatch):
    for command in part.commands:
        program, *rest = shlex.split(command)
        monkeypatch.setattr(sys, 'argv', ['program', *rest])
        if program == '-m':
            assert rest[0] in ('pytest', 'mmsvit.check_env', 'mmsvit.prove_gpu')
            if rest[0] == 'mmsvit.prove_gpu':
                found = prove_gpu.wanted_kernels([str(ROOT / rest[1])], ['float32'])
                first = {'small': 64, 'base': 96, 'large': 96}[part.name.removeprefix('prove-')]
                assert first in {kernel.channels for kernel in found}
            continue
        sys.argv[1:] = ['cpu' if word == 'cuda' else word for word in rest if 'OUT' not in word]
        while '--out' in sys.argv:
            sys.argv.remove('--out')
        if '--work-dir' in sys.argv:
            sys.argv.remove('--work-dir')
        args = import_tool(Path(program).stem).parse_args()
        for model in getattr(args, 'models', ()):
            # As mmsvit/benchmarking/workloads.py refuses it.
            assert not ('graph' in model.flags and 'detector' in args.modes)
