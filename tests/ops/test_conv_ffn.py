"""The FFN by rows computes what it computes at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmsvit.ops import conv_ffn, cpu_conv_ffn

HIDDEN = 12


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (HIDDEN, shape[-1]), (HIDDEN,), (HIDDEN, 1, 3, 3), (HIDDEN,)]
    shapes += [(shape[-1], HIDDEN), (shape[-1],)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def layer_by_layer(x, w1, b1, kernel, bias, w2, b2):
    hidden = F.gelu(x @ w1.T + b1)
    maps = hidden.permute(0, 3, 1, 2)
    maps = maps + F.conv2d(maps, kernel, bias, padding=1, groups=HIDDEN)
    return maps.permute(0, 2, 3, 1) @ w2.T + b2


def with_weights(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    del layer.weight, layer.bias
    layer.weight, layer.bias = weight, bias
    return layer


def run(x, w1, b1, kernel, bias, w2, b2, residual=False):
    return conv_ffn(
        x,
        with_weights(nn.Linear(w1.shape[1], HIDDEN), w1, b1),
        nn.GELU(),
        with_weights(nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN), kernel, bias),
        with_weights(nn.Linear(HIDDEN, w2.shape[0]), w2, b2),
        nn.Dropout(0.0),
        residual=residual,
        backend='cpu',
    )


@pytest.fixture(params=['at once', 2, 3, 7])
def rows(request, monkeypatch):
    """How many rows make a piece of the hidden map."""

    def choose(x, *parameters):
        return x.shape[1] if request.param == 'at once' else request.param

    monkeypatch.setattr(cpu_conv_ffn, '_rows_of_a_piece', choose)


@pytest.mark.parametrize('shape', [(2, 14, 5, 6), (1, 15, 1, 6), (3, 8, 4, 6), (1, 1, 9, 6)])
def test_values_and_gradients(rows, shape):
    tensors = inputs(*shape)
    found, expected = run(*tensors), layer_by_layer(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, gradient),
        torch.autograd.grad(expected, tensors, gradient),
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(rows, dtype):
    tensors = inputs(2, 9, 5, 6, dtype=dtype)
    found = run(*tensors)
    assert found.dtype == dtype
    exact = layer_by_layer(*[tensor.double() for tensor in tensors])
    plain = layer_by_layer(*tensors)
    slack = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack


def test_a_layout_that_is_not_contiguous(rows):
    x, *parameters = inputs(2, 9, 5, 6)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(run(turned, *parameters), run(x, *parameters))


@pytest.mark.parametrize('shape', [(2, 14, 5, 6), (1, 15, 1, 6), (1, 1, 9, 6)])
def test_residual(rows, shape):
    """A tensor that takes part in a gradient is left alone; one that does not becomes the sum."""
    x, *weights = inputs(*shape)
    expected = (x + layer_by_layer(x, *weights)).detach()
    before = x.detach().clone()
    found = run(x, *weights, residual=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    with torch.no_grad():
        found = run(x, *weights, residual=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.data_ptr() == x.data_ptr()


@pytest.mark.parametrize('frozen', [(0,), (1, 2, 3, 4, 5, 6), (3, 5), (2, 4, 6)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(rows, frozen):
    tensors = inputs(2, 9, 5, 6)
    expected = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    for index in frozen:
        tensors[index].requires_grad_(False)
    run(*tensors).square().sum().backward()
    for index, (tensor, one) in enumerate(zip(tensors, expected)):
        if index in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, one, rtol=1e-12, atol=1e-10)


def test_a_backward_pass_under_autocast_keeps_the_precision_of_the_forward_pass(monkeypatch):
    monkeypatch.setattr(cpu_conv_ffn, '_rows_of_a_piece', lambda x, *parameters: 3)
    tensors = inputs(2, 9, 5, 6, dtype=torch.float32)
    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    output = run(*tensors).sum()
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(output, tensors)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
