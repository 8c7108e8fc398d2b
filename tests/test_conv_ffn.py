"""The FFN by rows computes what it computes at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmsvit.ops import conv_ffn
from mmsvit.svit import ConvFFN

HIDDEN = 12


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (HIDDEN, shape[-1]), (HIDDEN,), (HIDDEN, 1, 3, 3), (HIDDEN,)]
    shapes += [(5, HIDDEN), (5,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def layer_by_layer(x, w1, b1, kernel, bias, w2, b2):
    hidden = F.gelu(x @ w1.T + b1)
    maps = hidden.permute(0, 3, 1, 2)
    maps = maps + F.conv2d(maps, kernel, bias, padding=1, groups=HIDDEN)
    return maps.permute(0, 2, 3, 1) @ w2.T + b2


def run(x, w1, b1, kernel, bias, w2, b2):
    return conv_ffn.conv_ffn(x, (w1, b1), (kernel, bias), (w2, b2))


@pytest.fixture(params=['at once', 2, 3, 7])
def rows(request, monkeypatch):
    """How many rows make a piece of the hidden map."""

    def choose(x, *parameters):
        return x.shape[1] if request.param == 'at once' else request.param

    monkeypatch.setattr(conv_ffn, '_rows_of_a_piece', choose)


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


def test_large_maps_go_by_rows_and_small_ones_do_not():
    weight = torch.empty(256, 64)
    assert conv_ffn._rows_of_a_piece(torch.empty(1, 400, 672, 64), weight) < 100
    assert conv_ffn._rows_of_a_piece(torch.empty(1, 14, 14, 64), weight) >= 14


@pytest.mark.parametrize('shape', [(2, 14, 5, 6), (1, 15, 1, 6), (1, 1, 9, 6)])
def test_residual(rows, shape):
    """A tensor that takes part in a gradient is left alone; one that does not becomes the sum."""
    x, w1, b1, kernel, bias, w2, b2 = inputs(*shape)
    w2, b2 = torch.cat([w2, w2[:1]]), torch.cat([b2, b2[:1]])
    expected = (x + layer_by_layer(x, w1, b1, kernel, bias, w2, b2)).detach()
    before = x.detach().clone()
    weights = (w1, b1), (kernel, bias), (w2, b2)
    found = conv_ffn.conv_ffn(x, *weights, residual=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    with torch.no_grad():
        found = conv_ffn.conv_ffn(x, *weights, residual=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.data_ptr() == x.data_ptr()


def test_a_layer_put_in_the_place_of_ours_is_used():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    ffn, x = ConvFFN(6, 12), torch.randn(1, 4, 4, 6)
    expected = 2 * ffn(x)
    ffn.fc2.__class__ = Doubled
    torch.testing.assert_close(ffn(x), expected)


def test_an_activation_put_in_the_place_of_ours_is_used():
    torch.manual_seed(0)
    ffn, x = ConvFFN(6, 12), torch.randn(1, 4, 4, 6)
    ours = ffn(x)
    ffn.act = nn.ReLU()
    hidden = ffn.act(ffn.fc1(x)).permute(0, 3, 1, 2)
    expected = ffn.fc2((hidden + ffn.dwconv(hidden)).permute(0, 2, 3, 1))
    torch.testing.assert_close(ffn(x), expected)
    assert (expected - ours).abs().max() > 0.01


@pytest.mark.parametrize('name', ['fc1', 'act', 'dwconv', 'fc2'])
@pytest.mark.parametrize(
    'register',
    [
        'register_forward_hook',
        'register_forward_pre_hook',
        'register_full_backward_hook',
        'register_full_backward_pre_hook',
    ],
)
def test_who_listens_to_a_layer_hears_it(name, register):
    ffn, heard = ConvFFN(6, 12), []
    getattr(ffn.get_submodule(name), register)(lambda *_: heard.append(name))
    ffn(torch.randn(1, 4, 4, 6, requires_grad=True)).sum().backward()
    assert heard == [name]


def test_the_sum_keeps_the_precision_of_x_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, 9, 4, generator=generator) + 100
    kernel, bias = torch.randn(4, 1, 3, 3, generator=generator) / 100, torch.zeros(4)
    exact = conv_ffn.convolve_and_add(x, kernel, bias)
    with torch.autocast('cpu', torch.bfloat16):
        found = conv_ffn.convolve_and_add(x, kernel, bias)
    # 100 itself would be rounded by up to 0.25, the convolution's few units are by 0.02.
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 0.1


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
    monkeypatch.setattr(conv_ffn, '_rows_of_a_piece', lambda x, *parameters: 3)
    tensors = inputs(2, 9, 5, 6, dtype=torch.float32)
    expected = torch.autograd.grad(run(*tensors).sum(), tensors)
    output = run(*tensors).sum()
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(output, tensors)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
