"""Records of proven kernels: read only where they hold, written by a process that survives kernels."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import OPS_PLACES, ROOT, small_arch
from mmengine.config import Config

from mmsvit import SViT, prove_gpu
from mmsvit.models.kernels import kernels_of
from mmsvit.ops import backend as backend_module
from mmsvit.ops import choose_backend, proofs, proving
from mmsvit.ops.backend import fix_choice
from mmsvit.ops.proofs import Kernel

CUDA = torch.device('cuda', 0)
HERE = dict(gpu='A GPU', capability='9.0', driver='580', torch='2', triton='3', kernels='abc')
SAMPLE = Kernel('sample', torch.float16, 64, (8, 8))
RIGHT = dict(proven=True, problem=None, speedup=1.5)
needs_triton = pytest.mark.skipif(
    ('triton', 'cpu') not in OPS_PLACES, reason='Triton is not installed, or there is a GPU'
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU that is not there, and an empty folder of records."""
    monkeypatch.setenv('MMSVIT_PROOFS', str(tmp_path / 'proofs'))
    monkeypatch.setattr(proofs, 'environment', lambda device: HERE)
    monkeypatch.setattr(backend_module, '_why_not', lambda *_: None)
    for cached in (proofs.records, backend_module._choose):
        cached.cache_clear()
    yield
    fix_choice(None)
    proofs.records.cache_clear()


def write(content: object, folder=None) -> None:
    folder = folder or proofs.folder()
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / proofs.file_name(HERE)).write_text(text)


def choose(kernel: Kernel = SAMPLE) -> tuple[str, str]:
    return choose_backend(CUDA, kernel.dtype, 'auto', kernel)


def test_a_record_decides():
    write(dict(environment=HERE, kernels={str(SAMPLE): RIGHT}))
    name, reason = choose()
    assert name == 'triton' and '1.50 times as fast' in reason


@pytest.mark.parametrize(
    ('other', 'why'),
    [
        (SAMPLE._replace(channels=96), 'no record'),
        (SAMPLE._replace(cell=(4, 8)), 'no record'),
        (SAMPLE._replace(dtype=torch.bfloat16), 'no record'),
        (SAMPLE._replace(operation='conv_ffn'), 'no record'),
    ],
)
def test_a_record_holds_for_its_kernel_alone(other, why):
    write(dict(environment=HERE, kernels={str(SAMPLE): RIGHT}))
    name, reason = choose(other)
    assert name == 'torch' and why in reason


@pytest.mark.parametrize(
    ('entry', 'why'),
    [
        (dict(proven=False, problem='off by 1', speedup=None), 'it failed here: off by 1'),
        (dict(proven=True, problem=None, speedup=1.04), 'it is right here, but 1.04 times as fast'),
        (dict(proven=True, problem=None, speedup=None), 'it is right here, but was not timed'),
    ],
)
def test_wrong_and_slow_kernels_are_not_taken(entry, why):
    write(dict(environment=HERE, kernels={str(SAMPLE): entry}))
    name, reason = choose()
    assert name == 'torch' and why in reason


@pytest.mark.parametrize('key', HERE)
def test_a_record_of_elsewhere_counts_for_nothing(key):
    write(dict(environment={**HERE, key: 'other'}, kernels={str(SAMPLE): RIGHT}))
    assert choose()[0] == 'torch'
    assert proofs.file_name({**HERE, key: 'other'}) != proofs.file_name(HERE)


@pytest.mark.parametrize(
    'content',
    [
        '',
        '{"environment": ',
        '[]',
        dict(environment=HERE),
        dict(environment=HERE, kernels=[RIGHT]),
        dict(environment=HERE, kernels={str(SAMPLE): dict(proven='yes', speedup=2)}),
        dict(environment=HERE, kernels={str(SAMPLE): dict(RIGHT, speedup='fast')}),
        dict(environment=HERE, kernels={str(SAMPLE): True}),
    ],
    ids=str,
)
def test_a_damaged_record_is_named_and_counts_for_nothing(monkeypatch, content):
    said = []
    monkeypatch.setattr(proofs, 'print_log', lambda text, **_: said.append(text))
    write(content)
    assert choose()[0] == 'torch'
    assert len(said) == 1 and str(proofs.folder()) in said[0] and 'prove_gpu' in said[0]


def test_shipped_records_hold_and_those_of_the_machine_come_first(monkeypatch, tmp_path):
    monkeypatch.setattr(proofs, 'SHIPPED', tmp_path / 'shipped')
    write(dict(environment=HERE, kernels={str(SAMPLE): RIGHT}), tmp_path / 'shipped')
    assert choose()[0] == 'triton'
    for cached in (proofs.records, backend_module._choose):
        cached.cache_clear()
    write(dict(environment=HERE, kernels={str(SAMPLE): dict(RIGHT, proven=False)}))
    assert choose()[0] == 'torch'


def test_a_fixed_choice_is_no_other():
    write(dict(environment=HERE, kernels={str(SAMPLE): RIGHT}))
    fix_choice([])
    assert choose() == ('torch', f'{SAMPLE}: the run began so')
    fix_choice([str(SAMPLE._replace(channels=96))])
    assert choose(SAMPLE._replace(channels=96))[0] == 'triton'
    fix_choice(None)
    assert choose()[0] == 'triton'


def test_the_operations_of_a_backbone_ask_for_the_kernels_that_are_proven(monkeypatch):
    """What a forward and backward pass asks for is what `kernels_of` lists."""
    model, asked = SViT(small_arch()), []

    def choose(device, dtype, backend, kernel):
        asked.append(kernel)
        return 'torch', ''

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(backend_module, 'choose_backend', choose)
    original = backend_module.backend_for
    for module in (sys.modules['mmsvit.ops.layers'], sys.modules['mmsvit.ops.custom_ops']):
        monkeypatch.setattr(
            module, 'backend_for', lambda x, *args: original(x.detach().as_subclass(OnGPU), *args)
        )
    sum(y.sum() for y in model(torch.randn(1, 3, 64, 96))).backward()
    assert {kernel for kernel in asked if kernel} == set(kernels_of(model, [torch.float32]))


def test_kernels_of_a_model():
    small = kernels_of(SViT(small_arch()), [torch.float16])
    assert small[Kernel('sample', torch.float16, 12, (2, 3))] == 8
    assert small[Kernel('conv_ffn', torch.float16, 96)] == 32
    assert len(small) == 2 + 4 + 4
    assert not kernels_of(SViT(small_arch(), ops_backend='torch'), [torch.float16])


@needs_triton
@pytest.mark.parametrize(
    'kernel',
    [
        Kernel('sample', torch.float32, 8, (2, 3)),
        Kernel('conv_ffn', torch.float16, 16),
        Kernel('add_depthwise_conv', torch.bfloat16, 8),
    ],
    ids=str,
)
def test_right_kernels_are_proven_and_wrong_ones_found(monkeypatch, kernel):
    sizes, device = [(1, 5, 7)], torch.device('cpu')
    assert proving.prove(kernel, sizes, device) is None
    original, calls = proving.results, []

    def spoilt(how, trial):
        found = original(trial)
        if trial.backend == 'triton':
            calls.append(0)
            found[-1] = how(found[-1])
        return found

    for how, problem in {
        lambda x: x + x.abs().max() / 20: 'is off by',
        lambda x: x * float('nan'): 'two runs differ|is off by nan',
        lambda x: x + len(calls) * 1e-2: 'two runs differ',
    }.items():
        monkeypatch.setattr(proving, 'results', lambda trial, how=how: spoilt(how, trial))
        with_problem = proving.prove(kernel, sizes, device)
        assert with_problem and any(part in with_problem for part in problem.split('|'))
        assert 'maps of 5x7' in with_problem


FAKE_WORKER = """
import json, os, sys
print(json.dumps(dict(environment={here})), flush=True)
for line in sys.stdin:
    content = json.loads(line)
    if content['operation'] == 'sample':
        os.kill(os.getpid(), 11)
    if content['operation'] == 'conv_ffn':
        print(json.dumps(dict(unknown='not enough memory')), flush=True)
        continue
    print(json.dumps(dict(problem=None, speedup=2.0)), flush=True)
"""


@pytest.fixture
def worker(monkeypatch):
    """Let a script stand in for the process that uses the GPU."""
    start = prove_gpu.subprocess.Popen

    def use(script: str) -> None:
        module = SimpleNamespace(
            **{name: getattr(prove_gpu.subprocess, name) for name in ('PIPE', 'TimeoutExpired')},
            Popen=lambda command, **options: start([sys.executable, '-c', script], **options),
        )
        monkeypatch.setattr(prove_gpu, 'subprocess', module)

    return use


def test_a_kernel_that_kills_its_process_is_recorded_and_the_rest_goes_on(worker, capsys):
    worker(FAKE_WORKER.format(here=HERE))
    kernels = kernels_of(SViT(small_arch()), [torch.float16])
    entries = prove_gpu.prove_all(kernels, again=False)
    sampling = Kernel('sample', torch.float16, 8, (4, 4))
    assert 'status -11' in entries[str(sampling)]['problem']
    out = capsys.readouterr().out
    assert f'{sampling}: WRONG: its process ended with status -11' in out
    assert 'not proven, not enough memory' in out
    # What is unknown is not recorded; what is right is taken, what is wrong not.
    assert {name.split()[0] for name in entries} == {'sample', 'add_depthwise_conv'}
    assert choose(Kernel('add_depthwise_conv', torch.float16, 8))[0] == 'triton'
    assert choose(sampling)[0] == choose(Kernel('conv_ffn', torch.float16, 32))[0] == 'torch'
    prove_gpu.prove_all(kernels, again=False)
    assert capsys.readouterr().out.count('has a record') == 6


def test_a_kernel_that_loses_the_context_is_not_held_against_the_next(worker):
    """The process answers, and ends; one in its place proves the rest, and none comes after the last."""
    answer = json.dumps(dict(problem='CUDA error: illegal access', speedup=None, lost=True))
    worker(
        f'print({json.dumps(json.dumps(dict(environment=HERE)))}, flush=True)\n'
        'import json, sys\n'
        'for line in sys.stdin:\n'
        '    if json.loads(line)["channels"] == 64:\n'
        f'        print({answer!r}, flush=True); break\n'
        '    print(json.dumps(dict(problem=None, speedup=2.0)), flush=True)\n'
    )
    other = SAMPLE._replace(channels=96)
    for kernels in ({SAMPLE: 4, other: 8}, {other: 8, SAMPLE: 4}):
        entries = prove_gpu.prove_all(kernels, again=True)
        assert entries[str(SAMPLE)]['problem'] == 'CUDA error: illegal access'
        assert entries[str(other)] == dict(proven=True, problem=None, speedup=2.0)


@pytest.mark.parametrize(
    ('script', 'why'),
    [
        ('print(\'{"unable": "the GPU is in exclusive mode"}\')', 'exclusive mode'),
        ('import sys; sys.exit(3)', 'status 3'),
    ],
)
def test_a_gpu_that_cannot_be_used_is_unknown_and_never_bad(worker, script, why):
    worker(script)
    with pytest.raises(RuntimeError, match=f'nothing is recorded: .*{why}.*plain PyTorch'):
        prove_gpu.prove_all({SAMPLE: 4}, again=False)
    assert not proofs.folder().exists()
    assert choose()[0] == 'torch'


def test_a_process_that_hangs_is_killed(worker, monkeypatch):
    monkeypatch.setattr(prove_gpu, 'TIMEOUT', 3)
    worker(f'print({json.dumps(json.dumps(dict(environment=HERE)))}, flush=True)\nimport time\n'
           'time.sleep(600)')  # fmt: skip
    entries = prove_gpu.prove_all({SAMPLE: 4}, again=False)
    assert entries[str(SAMPLE)]['problem'] == 'it did not end in 3 s'


@needs_triton
def test_the_command_in_the_interpreter(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    monkeypatch.setenv('MMSVIT_PROOFS', str(tmp_path / 'records'))
    arch = dict(small_arch(), depths=(1,) * 4)
    model = dict(backbone=dict(type='mmsvit.SViT', arch=arch, out_indices=(0,)))
    Config(dict(model=model)).dump(tmp_path / 'config.py')
    arguments = ['prove_gpu', str(tmp_path / 'config.py'), '--dtypes', 'float16']
    monkeypatch.setattr(sys, 'argv', arguments)
    prove_gpu.main()
    assert '3 of 3 kernels are right, 0 wrong' in capsys.readouterr().out
    (file,) = (tmp_path / 'records').iterdir()
    record = json.loads(file.read_text())
    assert record['environment'] == prove_gpu.INTERPRETER and len(record['kernels']) == 3


def test_configs_without_a_choice_are_refused(tmp_path):
    (tmp_path / 'config.py').write_text("model = dict(backbone=dict(type='ResNet'))")
    with pytest.raises(ValueError, match=r'config.py has no mmsvit.SViT'):
        prove_gpu.wanted_kernels([str(tmp_path / 'config.py')], ['float32'])


def test_kernels_of_shipped_configs_and_of_none():
    config = str(ROOT / 'configs' / 'svit_maskrcnn_coco.py')
    of_config = prove_gpu.wanted_kernels([config], ['float32'])
    assert Kernel('sample', torch.float32, 64, (16, 16)) in of_config
    assert of_config.keys() < prove_gpu.wanted_kernels([], ['float32']).keys()
