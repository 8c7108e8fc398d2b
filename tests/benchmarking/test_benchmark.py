"""The benchmark: names of candidates, what a run is, how times are taken, and what is written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from dataclasses import fields
from types import ModuleType

import pytest
import torch
from conftest import ROOT, run_python
from mmengine.registry import MODELS
from torch import nn

from mmsvit.analysis.flops import FlopCounts
from mmsvit.benchmarking import measure, memory
from mmsvit.benchmarking.candidates import (
    DEFAULT_MODELS,
    PEERS,
    known_models,
    parse_candidate,
)
from mmsvit.benchmarking.environment import describe_environment, measure_rates
from mmsvit.benchmarking.measure import CaseResult, Result, Settings, Spread, measure_case
from mmsvit.benchmarking.report import Report, cells, columns, notes
from mmsvit.benchmarking.workloads import (
    Case,
    Workload,
    build_workload,
    find_backend,
    op_bytes,
)
from mmsvit.models.super_token_attention import SuperTokenAttention

TOOL = ROOT / 'tools' / 'benchmark.py'


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def quietly(_: str) -> None:
    """Progress that nobody reads."""


# Names of candidates


def test_reads_names():
    plain, sizes, flags = map(
        parse_candidate, ('svit-b', 'svit-s:16-8-2-1', 'svit-s:8-4-2-1+deploy+compile+triton')
    )
    assert plain.backbone['arch']['super_token_sizes'] == (8, 4, 1, 1)
    assert plain.out_channels == [96, 192, 384, 512] and plain.backend == 'auto'
    assert sizes.backbone['arch']['super_token_sizes'] == (16, 8, 2, 1)
    assert sizes.backbone['arch']['depths'] == (3, 5, 9, 3)
    assert flags.flags == {'deploy', 'compile', 'triton'} and flags.backend == 'triton'
    assert not parse_candidate('r50+compile+channels-last').is_svit
    assert all(parse_candidate(name).name == name for name in DEFAULT_MODELS)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('svit-x', "no model 'svit-x'; use one of svit-s, svit-b, .*swin-t"),
        ('', 'no model'),
        ('svit-s+fast', "no flag 'fast'; use one of deploy"),
        ('svit-s+torch+triton', 'one backend, not several'),
        ('svit-s+recompute+cp', 'a part of .cp'),
        ('svit-s:8-4-1', "four whole numbers .* found '8-4-1'"),
        ('svit-s:8-4-0-1', "four whole numbers .* found '8-4-0-1'"),
        ('svit-s:', "four whole numbers .* found ''"),
        ('swin-t:8-4-1-1', "'8-4-1-1' is for SViT only"),
        ('r50+deploy', "'deploy' is for SViT only"),
    ],
)
def test_refuses_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_candidate(name)


@pytest.mark.parametrize('name', [*PEERS, 'svit-s'])
def test_backbones_are_as_detectors_use_them(name):
    candidate = parse_candidate(name)
    if name == 'convnext-t':
        pytest.importorskip('mmpretrain.models')
    model = MODELS.build(candidate.backbone)
    model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        shapes = [tuple(output.shape) for output in model(torch.randn(1, 3, 64, 96))]
    assert shapes == [
        (1, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(candidate.out_channels, (4, 8, 16, 32))
    ]


# What a run is


def test_bytes_that_an_operation_has_to_move():
    # 64 tokens of 4 channels in 4 cells: 64 * 4 for each pass; 64 * 9 associations and 4 * 4
    # numbers of super tokens, each written and read.
    between = 2 * (64 * 9 + 4 * 4)
    assert op_bytes((1, 8, 8, 4), (4, 4), 1, 4, backward=False) == 4 * (3 * 256 + between)
    assert op_bytes((1, 8, 8, 4), (4, 4), 1, 2, backward=True) == 2 * (5 * 256 + 2 * between)
    assert op_bytes((1, 8, 8, 4), (4, 4), 3, 4, backward=False) == 4 * (5 * 256 + between)
    # Cells that are not full count as super tokens, but have no more tokens.
    assert op_bytes((2, 5, 8, 4), (4, 4), 1, 1, backward=False) == 2 * (
        3 * 160 + 2 * (40 * 9 + 4 * 4)
    )


def test_the_operation_is_sampling_without_attention():
    workload = build_workload(parse_candidate('svit-s:4-4-1-1'), Case('op', (64, 96), 2, stage=2))
    assert workload.parameters == 0
    figures, uncounted = workload.count()
    # Association, its use and the way back: nine super tokens for each of 8x12 tokens.
    assert figures.products == 3 * 9 * (8 * 12) * 128 and not uncounted
    tokens = workload.runs * 2 * 8 * 12 * 128 * 4
    assert workload.runs == 64 or tokens >= 256 * 2**20


def test_training_leaves_gradients_and_inference_none():
    candidate = parse_candidate('svit-s')
    for mode, expected in (('train', True), ('backbone', False)):
        workload = build_workload(candidate, Case(mode, (64, 64), dtype='bfloat16'))
        workload.run()
        gradients = [p.grad is not None for p in workload.model.parameters()]
        assert set(gradients) == {expected}
        assert workload.model.training is expected


def test_autocast_reaches_the_backbone():
    seen = set()
    for dtype in ('float32', 'bfloat16'):
        workload = build_workload(
            parse_candidate('svit-s'), Case('backbone', (32, 32), dtype=dtype)
        )
        conv = workload.model.stem[0]
        conv.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
        workload.run()
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ('name', 'mode', 'message'),
    [
        ('svit-s+graph', 'backbone', 'needs a CUDA device'),
        ('svit-s+deploy', 'train', 'form for inference'),
        ('r50', 'op', 'r50 has no super token sampling'),
        ('svit-s:1-4-1-1', 'op', 'stage 1 of svit-s:1-4-1-1 does not sample'),
    ],
)
def test_refuses_what_cannot_be_run(name, mode, message):
    with pytest.raises(ValueError, match=message):
        build_workload(parse_candidate(name), Case(mode, (64, 64)))


def test_a_backend_is_chosen_by_name():
    for case in (Case('backbone', (32, 32)), Case('op', (32, 32))):
        for name, asked, found in (
            ('svit-s', 'auto', 'cpu'),
            ('svit-s+torch', 'torch', 'torch'),
            ('svit-s+cpu', 'cpu', 'cpu'),
        ):
            model = build_workload(parse_candidate(name), case).model
            attentions = [m for m in model.modules() if isinstance(m, SuperTokenAttention)]
            assert {m.ops_backend for m in attentions} == {asked}
            assert find_backend(parse_candidate(name), case) == found
    assert find_backend(parse_candidate('r50'), case) is None


def test_the_deployed_form_computes_the_same_and_counts_the_same():
    case = Case('backbone', (64, 64))
    plain, deployed = (
        build_workload(parse_candidate(name), case) for name in ('svit-s', 'svit-s+deploy')
    )
    assert deployed.parameters < plain.parameters  # The norms are gone.
    assert deployed.count()[0].total == plain.count()[0].total and not deployed.count()[1]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for out, expected in zip(deployed.model(images), plain.model(images)):
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


# How times are taken


def fake_workloads(runs: list[str], failing: dict[str, int]):
    """Workloads that write down their name, and fail at the given run."""

    def build(candidate, case) -> Workload:
        def run() -> None:
            runs.append(candidate.name)
            if runs.count(candidate.name) == failing.get(candidate.name):
                raise torch.OutOfMemoryError('no memory left\nand more lines')

        return Workload(nn.Identity(), run, lambda: (FlopCounts(0, 0, 1, 2), {}))

    return build


def test_rounds_take_turns_and_go_on_without_who_fails(monkeypatch):
    runs: list[str] = []
    build = fake_workloads(runs, {'r50': 1, 'swin-s': 5})
    monkeypatch.setattr(measure, 'build_workload', build)
    monkeypatch.setattr(measure, 'MIN_SECONDS', 1e-12)  # One call for a measurement.
    names = ['svit-s', 'r50', 'swin-t', 'swin-s']
    found = measure_case(
        [parse_candidate(name) for name in names],
        Case('backbone', (32, 32)),
        Settings(rounds=4, warmup=2, memory=False),
        ['r50', 'swin-t', 'svit-s'],
        quietly,
    )
    # Before the rounds three calls each, in the first of which r50 fails.
    assert runs[:10] == ['svit-s'] * 3 + ['r50'] + ['swin-t'] * 3 + ['swin-s'] * 3
    assert runs[10:] == [
        *('svit-s', 'swin-t', 'swin-s'),
        *('swin-t', 'swin-s', 'svit-s'),  # Here swin-s fails.
        *('svit-s', 'swin-t'),
        *('swin-t', 'svit-s'),
    ]
    results = {result.name: result for result in found.results}
    for name in ('r50', 'swin-s'):
        assert results[name].error == 'OutOfMemoryError: no memory left'
        assert results[name].time is None and not results[name].seconds
    assert len(results['svit-s'].seconds) == len(results['swin-t'].seconds) == 4
    assert found.reference == 'swin-t'  # The first that has times.
    assert results['swin-t'].ratio == Spread(1, 1, 1, 1, 1) and results['svit-s'].ratio is not None


def test_the_time_is_that_of_one_run(monkeypatch):
    monkeypatch.setattr(measure, 'build_workload', fake_workloads([], {}))
    case, settings = Case('backbone', (32, 32)), Settings(rounds=2, memory=False)
    found = measure_case([parse_candidate('r50')], case, settings, [], quietly)
    (result,) = found.results
    assert result.runs > 100  # Of some microseconds each.
    assert max(result.seconds) < measure.MIN_SECONDS


def test_stops_when_time_is_over_but_not_before_three_rounds(monkeypatch):
    monkeypatch.setattr(measure, 'build_workload', fake_workloads([], {}))
    case, settings = Case('backbone', (32, 32)), Settings(rounds=50, seconds=0.0, memory=False)
    found = measure_case([parse_candidate('r50')], case, settings, [], quietly)
    assert len(found.results[0].seconds) == 3 and found.reference is None


def test_ratios_are_taken_round_by_round():
    def result(name: str, *seconds: float, **more: int) -> Result:
        return Result(name, seconds=list(seconds), **more)

    results = [
        result('a', 2, 20, 3, bytes_to_move=10),
        result('reference', 1, 10, 6),
        result('b'),
        result('copy', 1, 5, 1, bytes_to_move=100),
    ]
    results[2].error = 'failed'
    measure._summarise(results, 'reference')
    a, reference, b, copy = results
    assert a.time == Spread(3, 2.5, 11.5, 2, 20)
    assert a.ratio == Spread(2, 1.25, 2, 0.5, 2)  # Not 3 to 6, the medians.
    assert a.bandwidth_share.median == pytest.approx(0.1 / 3)  # Of 1/20, 1/40 and 1/30.
    assert reference.ratio.max == 1 and reference.bandwidth_share is None
    assert b.time is None and copy.ratio is None and copy.bandwidth_share.min == 1


# Memory


@pytest.mark.skipif(not os.access('/proc/self/clear_refs', os.W_OK), reason='needs Linux')
def test_memory_is_that_of_the_run_alone():
    torch.ones(2**28, dtype=torch.uint8)  # Gone before, but a peak that the process remembers.
    held = torch.ones(2**20)
    found = memory._resident_increase(lambda: torch.ones(2**26, dtype=torch.uint8))
    assert 2**26 * 0.98 <= found <= 2**26 * 1.1
    again = memory._resident_increase(lambda: held + 1)
    assert again <= 2**26 * 0.5


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_the_system_kills_is_reported_and_not_run_here(monkeypatch):
    runs: list[str] = []
    monkeypatch.setattr(measure, 'build_workload', fake_workloads(runs, {}))
    monkeypatch.setattr(memory, '_measure_here', killed)
    case = Case('backbone', (32, 32))
    found = measure_case([parse_candidate('r50')], case, Settings(rounds=1), [], quietly)
    assert 'its process died' in found.results[0].error and not runs


# What is written


def made_up(sides: tuple[int, ...]) -> list[CaseResult]:
    """Cases in which svit-s takes a millisecond a pixel of a side, and r50 fails."""
    cases = []
    for side in sides:
        seconds = [side / 1e3] * 2
        fine = Result('svit-s+compile', weight_bytes=2**20, run_bytes=2**20 * side, seconds=seconds)
        fine.observed = {'proposals': 7}
        failed = Result('r50', error='no | memory', run_bytes=1, weight_bytes=1)
        measure._summarise([fine, failed], 'svit-s+compile')
        cases.append(CaseResult(Case('backbone', (side, side)), 'svit-s+compile', [fine, failed]))
    return cases


def test_rows_are_as_wide_as_the_heading():
    (found,) = made_up((64,))
    for mode in ('backbone', 'op'):
        case = Case(mode, (64, 64))
        as_mode = CaseResult(case, found.reference, found.results)
        assert {len(cells(as_mode, result)) for result in found.results} == {len(columns(as_mode))}
    assert notes(found) == ['r50 failed: no | memory', 'svit-s+compile found 7 proposals']


def test_scaling_has_tables_and_a_plot(tmp_path):
    report = Report('a command', describe_environment(), Settings(), made_up((64, 130)), True)
    files = report.write(tmp_path / 'out.v2')
    assert [file.name for file in files] == ['out.v2.json', 'out.v2.md', 'out.v2.png']
    markdown = files[1].read_text()
    assert '(out.v2.png)' in markdown
    assert '| 64x64 | 256 | 64.0 | - |' in markdown and '| 130x130 | 1089 | 130 | - |' in markdown
    assert '| 64x64 | 256 | 65.0 | - |' in markdown  # MiB
    assert files[2].read_bytes().startswith(b'\x89PNG') and files[2].stat().st_size < 200_000


def test_the_environment_says_what_times_depend_on():
    found = describe_environment()
    assert torch.__version__ in found['torch'] and 'threads used' in found['CPU']
    assert found['mmdet'] != 'not installed' and found['date'].endswith('UTC')


def test_tables_say_what_the_machine_reaches():
    rates = measure_rates('cpu')
    assert [re.findall('product|attention', name) for name in rates] == [['product'], ['attention']]
    assert all(int(rate.removesuffix(' GFLOP/s')) > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['speed'], 'invalid choice'),
        (['backbone', '--models', 'svit-x'], "no model 'svit-x'; use one of svit-s"),
        (['backbone', '--models', 'r50', 'r50'], 'r50 more than once'),
        (['backbone', '--models', 'r50', '--reference', 'swin-t'], 'swin-t is not one of'),
        (['backbone', '--shapes', '800'], "'800' is not HxW"),
        (['backbone', '--shapes', '16x640'], "'16x640' is not HxW"),
        (['backbone', '--rounds', '0'], 'not a whole number'),
        (['backbone', '--seconds', 'nan'], "'nan' is not a number of seconds"),
        (['backbone', '--seconds', '-1'], "'-1' is not a number of seconds"),
        (['backbone', '--seconds', 'inf'], "'inf' is not a number of seconds"),
        (['backbone', '--seconds', 'ten'], "'ten' is not a number of seconds"),
        (['backbone', '--out', '.'], "'.' is a folder; "),
        (['backbone', '--out', 'new/'], "'new/' is a folder; .* such as new/benchmark"),
        (['backbone', '--out', 'file/out'], '--out file/out: cannot write there: .*File exists'),
        (['backbone', '--out', 'taken'], '--out taken: cannot write there: .*taken.md'),
        (['backbone', '--out', '/proc/out'], '--out /proc/out: cannot write there: '),
    ],
)
def test_refuses_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'taken.md').mkdir()
    monkeypatch.setattr('sys.argv', ['benchmark.py', *arguments])
    with pytest.raises(SystemExit):
        load_tool().parse_args()
    assert re.search(message, capsys.readouterr().err)


def test_seeing_that_files_can_be_written_changes_none(tmp_path, monkeypatch):
    written = tmp_path / 'out.json'
    written.write_text('earlier results')
    monkeypatch.setattr('sys.argv', ['benchmark.py', 'op', '--out', str(tmp_path / 'out')])
    assert load_tool().parse_args().out == tmp_path / 'out'
    assert written.read_text() == 'earlier results' and list(tmp_path.iterdir()) == [written]


def test_help_names_everything():
    text = load_tool().make_parser().format_help()
    assert all(name in text for name in (*known_models(), 'channels-last', 'op-train', 'detector'))


@pytest.mark.slow
def test_measures_everything_and_writes_it_down(tmp_path):
    out = tmp_path / 'new' / 'small'
    modes = ('op', 'op-train', 'backbone', 'train', 'detector')
    models = ('svit-s:16-8-2-1', 'r50+channels-last', 'svit-s+graph')
    result = run_python(
        *(TOOL, *modes, '--models', *models, '--shapes', '64x96', '--rounds', '2', '--no-memory'),
        *('--threads', '1', '--out', out),
    )
    written = json.loads(out.with_suffix('.json').read_text())
    assert written['command'].startswith('python tools/benchmark.py op op-train backbone')
    assert set(written) == {'command', 'environment', 'settings', 'cases'}
    assert [found['case']['mode'] for found in written['cases']] == list(modes)
    for found in written['cases']:
        by_name = {entry['name']: entry for entry in found['results']}
        is_op = found['case']['mode'].startswith('op')
        assert set(by_name) == {*models, 'copy'} if is_op else set(models)
        assert 'needs a CUDA device' in by_name['svit-s+graph']['error']
        assert (by_name['r50+channels-last']['error'] is not None) == is_op
        svit = by_name['svit-s:16-8-2-1']
        assert set(svit) == {field.name for field in fields(Result)} | {'peak_bytes'}
        assert svit['error'] is None and svit['not_counted'] is None and svit['backend'] == 'cpu'
        assert len(svit['seconds']) == 2 and min(svit['seconds']) > 0
        assert svit['time']['min'] <= svit['time']['median'] <= svit['time']['max']
        assert svit['ratio']['median'] == 1 and svit['runs'] >= 1 and svit['first_seconds'] > 0
        assert (svit['bandwidth_share'] is not None) == is_op and svit['total'] > 0
        if not is_op:
            assert svit['weight_bytes'] >= 4 * svit['parameters'] > 4 * 23_000_000
            assert svit['layers'] < svit['total']
    assert written['cases'][-1]['results'][0]['observed']['masks'] == 100

    markdown = out.with_suffix('.md').read_text()
    assert written['command'] in markdown
    assert all(value in markdown for value in written['environment'].values())
    for mode in modes:
        assert f'## {mode} 64x96' in markdown
    assert 'svit-s+graph failed: ValueError: +graph needs a CUDA device' in markdown
    assert 'detector 64x96' in result.stdout and f'wrote {out}.md' in result.stdout


@pytest.mark.slow
def test_memory_on_the_cpu_comes_from_a_process_of_its_own(tmp_path):
    out = tmp_path / 'memory'
    run_python(
        *(TOOL, 'backbone', 'train', '--models', 'svit-s', '--shapes', '96x96', '--rounds', '1'),
        *('--threads', '1', '--out', out),
    )
    inference, training = (
        found['results'][0] for found in json.loads(out.with_suffix('.json').read_text())['cases']
    )
    assert 0 < inference['run_bytes'] < inference['weight_bytes']
    # Training needs gradients as large as the weights on top.
    assert training['run_bytes'] > training['weight_bytes'] + inference['run_bytes']
    assert inference['peak_bytes'] == inference['weight_bytes'] + inference['run_bytes']


def test_fails_if_nothing_could_be_measured(monkeypatch, capsys):
    arguments = ['op', '--models', 'r50', '--shapes', '32x32', '--no-memory', '--threads', '1']
    monkeypatch.setattr('sys.argv', ['benchmark.py', *arguments])
    with pytest.raises(SystemExit, match='every candidate failed'):
        load_tool().main()
    assert 'r50 has no super token sampling' in capsys.readouterr().out
