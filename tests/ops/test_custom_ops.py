"""Which backend computes, and what compilers, exporters and FLOP counters see of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import OPS_PLACES, ROOT, run_python, small_arch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch._dynamo import lookup_backend, register_backend
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mmsvit.ops
from mmsvit.models.super_token_attention import SuperTokenAttention
from mmsvit.models.svit import ConvFFN
from mmsvit.ops import backend as backend_module
from mmsvit.ops import (
    channels_first,
    choose_backend,
    conv_ffn,
    custom_ops,
    distribute,
    sample,
    torch_backend,
)

SVIT_FILE = str(Path('mmsvit') / 'models' / 'svit.py')
CPU, CUDA = torch.device('cpu'), torch.device('cuda')


@pytest.fixture(autouse=True)
def forget_choices(monkeypatch):
    """Choices are made once; here, each test makes its own."""
    monkeypatch.delenv('MMSVIT_OPS_BACKEND', raising=False)
    backend_module._choose.cache_clear()
    yield
    backend_module._choose.cache_clear()


def random(*shape, device='cpu', dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def one_step_of_a_segmentor(shapes: Path, work_dir: Path, compile_options: dict | bool) -> Config:
    """One iteration of the example's data for a small SViT with a small head."""
    cfg = Config.fromfile(ROOT / 'configs' / 'svit_upernet_shapes.py')
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = f'{shapes}/'
    return Config(
        dict(
            default_scope='mmseg',
            experiment_name=f'compiled {bool(compile_options)}',
            work_dir=str(work_dir),
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
                backbone=dict(type='mmsvit.SViT', arch=small_arch()),
                decode_head=dict(
                    type='FCNHead', in_channels=24, channels=8, num_convs=1, num_classes=6
                ),
            ),
            train_dataloader=cfg.train_dataloader,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            randomness=dict(seed=0),
            compile=compile_options,
            log_level='WARNING',
        )
    )


def make_attention(place) -> SuperTokenAttention:
    backend, device = place
    torch.manual_seed(0)
    return SuperTokenAttention(8, 2, (4, 4), num_iters=2, ops_backend=backend).to(device)


def test_argument_before_variable_before_device(monkeypatch):
    assert choose_backend(CPU, torch.float32) == ('cpu', 'the tensors are on cpu')
    assert choose_backend(torch.device('meta'), torch.float32)[0] == 'torch'
    monkeypatch.setenv('MMSVIT_OPS_BACKEND', 'torch')
    name, reason = choose_backend(CPU, torch.float32)
    assert name == 'torch' and 'MMSVIT_OPS_BACKEND=torch' in reason
    monkeypatch.setenv('MMSVIT_OPS_BACKEND', 'nonsense')
    assert choose_backend(CPU, torch.float32, 'cpu')[0] == 'cpu'
    with pytest.raises(
        ValueError, match=r"MMSVIT_OPS_BACKEND='nonsense'.*auto, torch, cpu, triton"
    ):
        sample(random(1, 4, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="backend='cuda'"):
        sample(random(1, 4, 4, 4), (2, 2), backend='cuda')


def test_cpu_by_name_where_it_cannot_run():
    with pytest.raises(RuntimeError, match=r'backend=cpu, but the tensors are on meta; use auto'):
        choose_backend(torch.device('meta'), torch.float32, 'cpu')


@pytest.mark.parametrize('by', ['argument', 'variable'])
def test_triton_by_name_where_it_cannot_run(monkeypatch, by):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    backend = 'triton' if by == 'argument' else 'auto'
    if by == 'variable':
        monkeypatch.setenv('MMSVIT_OPS_BACKEND', 'triton')
    with pytest.raises(RuntimeError, match=r'=triton, but Triton needs a CUDA device.*on cpu'):
        choose_backend(CPU, torch.float32, backend)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(RuntimeError, match=r'not in torch\.float64'):
        choose_backend(CPU, torch.float64, backend)


def test_a_config_chooses_for_the_whole_backbone(monkeypatch):
    asked = []

    def ask(x, backend, *_):
        asked.append(backend)
        return torch_backend

    monkeypatch.setattr(custom_ops, 'backend_for', ask)
    monkeypatch.setattr(mmsvit.ops.layers, 'backend_for', ask)
    cfg = dict(type='mmsvit.SViT', arch=small_arch())
    for name in ('auto', 'torch', 'cpu', 'triton'):
        MODELS.build(dict(cfg, ops_backend=name)).eval()(random(1, 3, 64, 64))
        # Of five blocks, each has two convolutions and three sample and distribute; four outputs.
        assert asked == [name] * (5 * 2 + 3 * 2 + 4)
        asked.clear()
    with pytest.raises(ValueError, match=r"ops_backend.*'auto', 'torch', 'cpu', 'triton'.*'cuda'"):
        MODELS.build(dict(cfg, ops_backend='cuda'))


def test_a_config_refuses_what_cannot_run_here(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    model = MODELS.build(dict(type='mmsvit.SViT', arch=small_arch(), ops_backend='triton'))
    with pytest.raises(RuntimeError, match=r'=triton, but Triton needs a CUDA device.*on cpu'):
        model(random(2, 3, 64, 64))


@pytest.mark.parametrize(
    ('dtype', 'capability', 'installed', 'reason'),
    [
        (torch.float64, (9, 0), True, 'not in torch.float64'),
        (torch.float32, (7, 5), True, 'compute capability 8.0 or more, and Old GPU has less'),
        (torch.float32, (9, 0), False, 'Triton does not work here'),
    ],
)
def test_auto_falls_back_and_says_why(monkeypatch, dtype, capability, installed, reason):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Old GPU')
    if not installed:
        monkeypatch.delattr(mmsvit.ops, 'triton_backend', raising=False)
        monkeypatch.setitem(sys.modules, 'mmsvit.ops.triton_backend', None)
    name, found = choose_backend(CUDA, dtype)
    assert name == 'torch' and reason in found
    with pytest.raises(RuntimeError, match='use auto'):
        choose_backend(CUDA, dtype, 'triton')


def test_choice_is_logged_once(monkeypatch):
    logged = []
    monkeypatch.setattr(backend_module, 'print_log', lambda *args, **kwargs: logged.append(kwargs))
    for _ in range(2):
        sample(random(1, 4, 4, 4), (2, 2))
    assert logged == [dict(logger='current', level=logging.DEBUG)]


def test_operators_keep_pytorchs_rules(place):
    backend, device = place
    tokens = random(1, 5, 6, 4, device=device).requires_grad_()
    _, association, mass = custom_ops.sample(tokens.detach(), (2, 3), 1, backend)
    supers = random(1, 3, 2, 4, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.mmsvit.sample, (tokens, (2, 3), 2, backend))
    for divisor in (None, mass):
        torch.library.opcheck(
            torch.ops.mmsvit.aggregate, (association, tokens, divisor, (2, 3), backend)
        )
        torch.library.opcheck(
            torch.ops.mmsvit.distribute,
            (association, supers, divisor, (2, 3), (5, 6), backend),
        )


@pytest.mark.parametrize('shape', [(4, 4), (5, 7), (1, 9), (8, 3)])
@pytest.mark.parametrize('size', [(2, 2), (3, 5), (16, 16)])  # The last is one cell.
def test_outputs_are_laid_out_as_fake_ones_say(place, shape, size):
    backend, device = place
    tokens = random(1, *shape, 4, device=device)
    supers, association, mass = custom_ops.sample(tokens, size, 1, backend)

    def compute(tokens, supers, association, mass):
        return (
            *custom_ops.sample(tokens, size, 1, backend),
            custom_ops.aggregate(association, tokens, mass, size, backend),
            custom_ops.distribute(association, supers, mass, size, shape, backend),
        )

    inputs = tokens, supers, association, mass
    with FakeTensorMode() as mode:
        expected = compute(*map(mode.from_tensor, inputs))
    for real, fake in zip(compute(*inputs), expected):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        assert (real.stride(), real.storage_offset()) == (fake.stride(), fake.storage_offset())


def test_compiled_once_for_all_sizes(place):
    attention = make_attention(place)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for shape in ((9, 14), (8, 8), (5, 9)):
        tokens = random(1, *shape, 8, device=place[1])
        results = []
        for module in (attention, compiled):
            tokens = tokens.detach().requires_grad_()
            module(tokens).square().sum().backward()
            results.append(tokens.grad)
        torch.testing.assert_close(*results)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_backbone_is_one_graph_of_a_segmentors_training_step(shapes, tmp_path):
    """MMEngine's ``compile`` option; preprocessor, head and losses break the graph elsewhere."""
    backbones = []

    @register_backend
    def noting(graph, inputs):
        traces = [node.stack_trace or '' for node in graph.graph.nodes]
        if any(SVIT_FILE in trace for trace in traces):
            backbones.append(graph)
            return lookup_backend('aot_eager')(graph, inputs)
        return graph

    weights = []
    for options in (False, dict(backend='noting')):
        runner = Runner.from_cfg(one_step_of_a_segmentor(shapes, tmp_path, options))
        torch._dynamo.reset()
        runner.train()
        weights.append(runner.model.state_dict())
    (graph,) = backbones
    assert sum('mmsvit' in str(node.target) for node in graph.graph.nodes) == 2 * 3
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize('strict', [False, True])
def test_exported_for_all_sizes(place, strict):
    attention = make_attention(place)
    sizes = {1: torch.export.Dim('height', min=8, max=400), 2: torch.export.Dim('width', min=8)}
    exported = torch.export.export(
        attention,
        (random(1, 9, 14, 8, device=place[1]),),
        dynamic_shapes=(sizes,),
        strict=strict,
    )
    names = [str(node.target) for node in exported.graph.nodes]
    assert [name for name in names if 'mmsvit' in name] == [
        'mmsvit.sample.default',
        'mmsvit.distribute.default',
    ]
    for shape in ((9, 14), (8, 16)):
        tokens = random(1, *shape, 8, device=place[1])
        torch.testing.assert_close(exported.module()(tokens), attention(tokens))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning')
def sample_and_distribute(tokens: torch.Tensor) -> torch.Tensor:
    super_tokens, association = sample(tokens, (2, 3), 1)
    return distribute(association, super_tokens**2, (2, 3), tokens.shape[1:3])


def test_forward_mode_and_function_transforms_give_the_right_derivative():
    tokens, direction = random(1, 5, 7, 4, dtype=torch.float64), torch.randn(1, 5, 7, 4).double()
    leaf = tokens.clone().requires_grad_()
    output = sample_and_distribute(leaf)
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, leaf, grad)
    value, tangent = torch.func.jvp(sample_and_distribute, (tokens,), (direction,))
    torch.testing.assert_close(value, output)
    torch.testing.assert_close((tangent * grad).sum(), (expected * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, direction)
        result = torch.autograd.forward_ad.unpack_dual(sample_and_distribute(dual))
    torch.testing.assert_close(result.tangent, tangent)
    _, pull_back = torch.func.vjp(sample_and_distribute, tokens)
    torch.testing.assert_close(pull_back(grad)[0], expected)
    maps = random(3, 1, 5, 7, 4)
    torch.testing.assert_close(
        torch.vmap(sample_and_distribute)(maps), torch.stack([*map(sample_and_distribute, maps)])
    )


def test_a_graph_recorded_for_any_batch_holds_for_another():
    def layers(x: torch.Tensor) -> torch.Tensor:
        return channels_first(conv_ffn(x, *parts, residual=True), 'cpu')

    ffn = ConvFFN(8, 16).eval()
    parts = (ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2, ffn.drop)
    other = random(4, 5, 7, 8)
    with torch.no_grad():
        graph = make_fx(layers, None, 'symbolic', True)(random(2, 5, 7, 8))
        torch.testing.assert_close(graph(other), layers(other))


def test_traced_to_operations_of_pytorch_alone():
    attention = make_attention(('torch', 'cpu'))
    tokens = random(2, 9, 14, 8)
    traced = torch.jit.trace(attention, tokens)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert 'aten::softmax' in kinds
    assert not [kind for kind in kinds if 'mmsvit' in kind or 'PythonOp' in kind]
    torch.testing.assert_close(traced(tokens), attention(tokens))


@pytest.mark.parametrize('num_iters', [1, 2])
def test_flops_are_those_of_the_products(place, num_iters):
    backend, device = place
    tokens = random(2, 5, 7, 6, device=device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        supers, association = sample(tokens, (2, 3), num_iters, backend)
        distribute(association, supers, (2, 3), (5, 7), backend).sum().backward()
    with FlopCounterMode(display=False) as products:
        supers, association, _ = torch_backend.sample(tokens, (2, 3), num_iters)
        torch_backend.distribute(association, supers, None, (2, 3), (5, 7)).sum().backward()
    assert counter.get_total_flops() == products.get_total_flops()
    # Five rows and seven columns in 3 x 3 cells of 6, nine neighbours, 6 channels; forward
    # two products an iteration and one to distribute, backward one for each linear step.
    assert counter.get_total_flops() == 2 * (2 * 9 * 6 * 9 * 6) * (2 * num_iters + 3)


def test_autocast_on_cuda_samples_halves():
    # Dtypes and the rules of autocast need no GPU; torch.autocast itself would want one.
    dtypes = []
    with FakeTensorMode(), torch.device('cuda'):
        attention, norm = SuperTokenAttention(8, 2, (4, 4)), torch.nn.LayerNorm(8)
        for autocast in (False, True):
            torch.set_autocast_enabled('cuda', autocast)
            try:
                tokens = norm(torch.empty(1, 9, 14, 8))
                dtypes.append((tokens.dtype, attention.sample(tokens)[0].dtype))
            finally:
                torch.set_autocast_enabled('cuda', False)
    single = torch.float32
    assert dtypes == [(single, single), (single, torch.get_autocast_dtype('cuda'))]


# Triton compiles for a GPU that is not there if it is told about one. The interpreter
# runs what the compiler refuses. Of all that have compute capability 8.0 or more, those of 8.6 and
# 8.9 share least memory among the threads of a program: 99 KB.
COMPILE = """
import os
os.environ.pop('TRITON_INTERPRET', None)
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Absent:
    get_current_device = get_current_stream = staticmethod(lambda *args: 0)
    get_current_target = staticmethod(lambda: GPUTarget('cuda', 90, 32))

driver.set_active(Absent())
run, kernels = JITFunction.run, set()

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert kernel.metadata.shared <= 99 * 1024, kernel.metadata
    kernels.add(kernel.hash)

JITFunction.run = compile_only
from mmsvit.ops import triton_backend
for dtype, cell, channels in (
    (torch.bfloat16, (8, 8), 64), (torch.float32, (2, 2), 320), (torch.float16, (2, 3), 5),
    (torch.bfloat16, (8, 8), 192), (torch.float32, (32, 32), 640),
):
    for shape in ((40, 56), (1, 17)):
        tokens = torch.empty(2, *shape, channels, dtype=dtype)
        supers, association, mass = triton_backend.sample(tokens, cell, 2)
        for divisor in (None, mass):
            triton_backend.aggregate(association, tokens, divisor, cell)
            triton_backend.distribute(association, supers, divisor, cell, shape)
print(len(kernels))
"""


@pytest.mark.slow
@pytest.mark.skipif(('triton', 'cpu') not in OPS_PLACES, reason='no Triton, or a GPU to run on')
def test_kernels_compile_once_for_all_sizes():
    # The mean; aggregation with and without association, and without storing it; adding up to
    # means, to super tokens with their mass, with and without division; distribution likewise.
    # Where tokens are float32, means are super tokens as well.
    found = run_python('-c', COMPILE).stdout
    assert found.split() == [str(10 + 9 + 10 + 10 + 9)]


@pytest.mark.slow
@pytest.mark.skipif(('triton', 'cpu') not in OPS_PLACES, reason='no Triton, or a GPU to run on')
@pytest.mark.parametrize('capability', ['80', '90', '120'])
def test_kernels_of_the_ffn_keep_to_registers(capability):
    program = ('tools/compile_kernels.py', '--capability', capability, '--kernels', 'ffn')
    table = run_python(*program, site=ROOT).stdout.splitlines()[2:]
    assert len(table) == 2 * 4 + 1  # The last adds up what two of four give, in float32.
    for row in table:
        _, _, _, _, spilled, shared, access, _, _ = row.split('|')
        assert int(spilled.split()[0]) == 0 and int(shared.split()[0]) <= 99 * 1024
        assert access.strip() == '128 bit'
