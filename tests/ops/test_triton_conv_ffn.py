"""The fused FFN and position embedding: exact, repeatable, and of no more memory than they say."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import OPS_PLACES
from torch import nn

from mmsvit import ops
from mmsvit.models.svit import ConvFFN

DEVICE = dict(OPS_PLACES).get('triton')
pytestmark = [
    pytest.mark.skipif(DEVICE is None, reason='Triton is not installed'),
    pytest.mark.cuda,
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Images, height, width, channels, hidden channels: rows and columns of one, a width of an odd
# pair, strips in several programs, strips of several chunks of rows, two blocks of channels.
CASES = [(2, 1, 7, 5, 9), (1, 9, 1, 4, 8), (1, 5, 3, 6, 33), (1, 5, 25, 4, 8)]
LARGE = (1, 84, 19, 4, 8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_ffn(x, hidden, dtype, backend, **options):
    """Output, and gradients of the input and all parameters, in float64."""
    torch.manual_seed(0)
    ffn = ConvFFN(x.shape[3], hidden).to(x.dtype).to(DEVICE, dtype)
    layers = (ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2, ffn.drop)
    x = x.to(DEVICE, dtype).requires_grad_()
    output = ops.conv_ffn(x, *layers, backend=backend, **options)
    return results(output, (x, *ffn.parameters()))


def run_conv(x, hidden, dtype, backend):
    torch.manual_seed(0)
    conv = (
        nn.Conv2d(x.shape[3], x.shape[3], 3, padding=1, groups=x.shape[3])
        .to(x.dtype)
        .to(DEVICE, dtype)
    )
    x = x.to(DEVICE, dtype).requires_grad_()
    return results(ops.add_depthwise_conv(x, conv, backend), (x, *conv.parameters()))


def results(output, inputs):
    weights = random(*output.shape, seed=1).to(output)
    grads = torch.autograd.grad(output, inputs, weights)
    for grad, tensor in zip(grads, inputs):
        assert grad.dtype == tensor.dtype
    return [tensor.detach().double().cpu() for tensor in (output, *grads)]


@pytest.mark.parametrize(
    ('case', 'dtype'), [*itertools.product(CASES, DTYPES), (LARGE, torch.float16)], ids=str
)
@pytest.mark.parametrize('run', [run_ffn, run_conv])
def test_error_is_at_most_twice_that_of_plain_pytorch(run, case, dtype):
    x = random(*case[:4]).to(dtype)
    exact = run(x, case[4], torch.float64, 'torch')
    plain, found = run(x, case[4], dtype, 'torch'), run(x, case[4], dtype, 'triton')
    for one, other, truth in zip(found, plain, exact):
        slack = torch.finfo(dtype).eps * truth.abs().max()
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + slack


@pytest.mark.parametrize('run', [run_ffn, run_conv])
def test_the_same_bits_twice(run):
    first, second = (run(random(2, 5, 6, 4), 8, torch.float16, 'triton') for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradients_of_the_reference():
    ffn = ConvFFN(2, 3).double()
    layers = (ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2, ffn.drop)
    x = random(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, *_: ops.conv_ffn(x, *layers, backend='torch'), (x, *ffn.parameters())
    )


@pytest.mark.parametrize('backend', ['torch', 'cpu', 'triton'])
def test_recomputing_changes_nothing(backend):
    x = random(1, 4, 5, 4)
    kept, again = (run_ffn(x, 8, torch.float32, backend, recompute=r) for r in (False, True))
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize(('recompute', 'expected'), [(False, 1), (True, 0)])
def test_how_many_wide_maps_are_saved(recompute, expected):
    ffn, wide, x = ConvFFN(4, 16).to(DEVICE), [], random(1, 4, 5, 4).float().to(DEVICE)
    layers = (ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2, ffn.drop)

    def pack(tensor):
        if tensor.numel() >= 4 * 5 * 16:
            wide.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.conv_ffn(x, *layers, recompute=recompute, backend='triton')
    assert len(wide) == expected


@pytest.mark.parametrize('trained', ['fc1.weight', 'fc1.bias', 'dwconv.bias', 'fc2.weight', 'x'])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(trained):
    torch.manual_seed(0)
    ffn, x = ConvFFN(4, 8, ops_backend='triton').to(DEVICE), random(1, 3, 4, 4).float().to(DEVICE)
    tensors = dict(ffn.named_parameters(), x=x.requires_grad_())
    expected = torch.autograd.grad(ffn(x).square().sum(), tensors[trained])
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    ffn(x).square().sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]
    torch.testing.assert_close(tensors[trained].grad, *expected)


def test_under_autocast_products_are_halves_and_parameters_keep_their_precision():
    ffn, x = ConvFFN(4, 8).to(DEVICE), random(1, 5, 6, 4).float().to(DEVICE)
    outputs, grads = [], []
    for backend in ('torch', 'triton'):
        ffn.ops_backend = backend
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs.append(ffn(leaf))
        grads.append(torch.autograd.grad(outputs[-1].float().sum(), (leaf, *ffn.parameters())))
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs, rtol=0.03, atol=0.03)
    for one, other in zip(*grads):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * one.abs().max().item())


def test_a_second_derivative_is_refused():
    ffn, x = ConvFFN(2, 4, ops_backend='triton').to(DEVICE), random(1, 2, 3, 2).float().to(DEVICE)
    output = ffn(x.requires_grad_())
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_forward_mode_and_compilers_get_pytorchs_operations():
    ffn = ConvFFN(2, 4, ops_backend='triton').to(DEVICE)
    x, direction = (random(1, 3, 4, 2, seed=s).float().to(DEVICE) for s in (0, 1))
    output, tangent = torch.func.jvp(ffn, (x,), (direction,))
    torch.testing.assert_close(output, ffn(x))
    step = (ffn(x + 1e-2 * direction) - ffn(x - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(tangent, step, rtol=1e-2, atol=1e-3)
    graph = torch.export.export(ffn, (x,))
    assert all('mmsvit' not in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph.module()(x), ffn(x))


def test_a_watched_layer_runs_as_written():
    ffn, heard = ConvFFN(2, 4, ops_backend='triton').to(DEVICE), []
    ffn.dwconv.register_forward_hook(lambda *_: heard.append('dwconv'))
    ffn(random(1, 3, 4, 2).float().to(DEVICE))
    assert heard == ['dwconv']
