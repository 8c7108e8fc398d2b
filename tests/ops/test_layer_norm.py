"""The layer norm that saves no float32 copy computes what autocast does, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from mmsvit import ops
from mmsvit.ops.layers import _LayerNormOfHalf


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('frozen', [(), (1, 2), (0,)])
def test_equal_to_a_layer_norm_of_the_float32_copy(dtype, frozen):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 7, 24).to(dtype), torch.randn(24), torch.randn(24)]
    gradient = torch.randn(2, 5, 7, 24)
    found = []
    for compute in (
        lambda x, w, b: _LayerNormOfHalf.apply(x, w, b, 1e-6),
        lambda x, w, b: layer_norm(x.float(), (24,), w, b, 1e-6),
    ):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
        output = compute(*leaves)
        output.backward(gradient)
        found.append([output, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found):
        assert one is other is None or torch.equal(one, other)
    assert found[0][0].dtype == torch.float32


def test_what_is_saved_is_half():
    saved = []
    x = torch.randn(2, 5, 7, 24).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _LayerNormOfHalf.apply(x, torch.ones(24), torch.zeros(24), 1e-6)
    assert max(t.numel() * t.element_size() for t in saved) == 2 * x.numel()


def test_a_replaced_or_watched_norm_is_called():
    x = torch.randn(1, 2, 2, 8)
    assert torch.equal(ops.layer_norm(x, nn.Identity()), x)
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(ops.layer_norm(x, norm), layer_norm(x, (8,)) + 1)
