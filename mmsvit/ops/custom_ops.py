"""Super token sampling as operators of PyTorch, ``torch.ops.mmsvit``, whichever backend computes it.

To compilers and exporters each is one node of the graph, for maps of any size;
gradients and FLOPs are known. With a constant association Q and the mass m of
each super token, ``aggregate`` is ``x -> Q x`` and ``distribute`` its adjoint,
``s -> Q^T s``, both optionally with super tokens divided by m: each is the
gradient of the other, and ``distribute`` is that of ``sample``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import CustomOpDef, custom_op
from torch.utils.flop_counter import register_flop_formula

from .backend import backend_for
from .modes import operators_are_seen


def _as_promised(x: Tensor) -> Tensor:
    """``x`` laid out as the operators' fake outputs say: contiguous, at the start of its memory."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    if x.storage_offset() == 0 and list(x.stride()) == strides:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _compute_sample(
    tokens: Tensor, super_token_size: Sequence[int], num_iters: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Super tokens, association and mass ``(N, Gh, Gw, 1)``, see :func:`mmsvit.ops.sample`."""
    chosen = backend_for(tokens, backend, 'sample', tokens.shape[3], super_token_size)
    outputs = chosen.sample(tokens, super_token_size, num_iters)
    super_tokens, association, mass = map(_as_promised, outputs)
    return super_tokens, association, mass


sample = custom_op(
    'mmsvit::sample',
    mutates_args=(),
    schema='(Tensor tokens, int[] super_token_size, int num_iters, str backend) '
    '-> (Tensor, Tensor, Tensor)',
)(_compute_sample)


def _compute_aggregate(
    association: Tensor,
    tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    backend: str,
) -> Tensor:
    """Sum tokens by association, ``(N, H, W, C)`` to ``(N, Gh, Gw, C)``; over mass if given."""
    chosen = backend_for(tokens, backend, 'sample', tokens.shape[3], super_token_size)
    return _as_promised(chosen.aggregate(association, tokens, mass, super_token_size))


aggregate = custom_op(
    'mmsvit::aggregate',
    mutates_args=(),
    schema='(Tensor association, Tensor tokens, Tensor? mass, int[] super_token_size, str backend) '
    '-> Tensor',
)(_compute_aggregate)


def _compute_distribute(
    association: Tensor,
    super_tokens: Tensor,
    mass: Tensor | None,
    super_token_size: Sequence[int],
    token_shape: Sequence[int],
    backend: str,
) -> Tensor:
    """See :func:`mmsvit.ops.distribute`; super tokens are divided by mass first if it is given."""
    chosen = backend_for(super_tokens, backend, 'sample', super_tokens.shape[3], super_token_size)
    return _as_promised(
        chosen.distribute(association, super_tokens, mass, super_token_size, token_shape)
    )


distribute = custom_op(
    'mmsvit::distribute',
    mutates_args=(),
    schema='(Tensor association, Tensor super_tokens, Tensor? mass, int[] super_token_size, '
    'SymInt[] token_shape, str backend) -> Tensor',
)(_compute_distribute)


@sample.register_fake
def _(tokens, super_token_size, num_iters, backend):
    n, height, width, channels = tokens.shape
    h, w = super_token_size
    grid = n, (height + h - 1) // h, (width + w - 1) // w
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return (
        tokens.new_empty(*grid, channels),
        tokens.new_empty(*grid, 9, h * w, dtype=dtype),
        tokens.new_empty(*grid, 1, dtype=dtype),
    )


@aggregate.register_fake
def _(association, tokens, mass, super_token_size, backend):
    return tokens.new_empty(*association.shape[:3], tokens.shape[3])


@distribute.register_fake
def _(association, super_tokens, mass, super_token_size, token_shape, backend):
    return super_tokens.new_empty(super_tokens.shape[0], *token_shape, super_tokens.shape[3])


def _setup_sample(ctx, inputs, output):
    tokens, ctx.super_token_size, _, ctx.backend = inputs
    _, association, mass = output
    ctx.token_shape = tokens.shape[1:3]
    ctx.save_for_backward(association, mass)
    ctx.mark_non_differentiable(association, mass)


def _setup_aggregate(ctx, inputs, output):
    association, tokens, mass, ctx.super_token_size, ctx.backend = inputs
    ctx.token_shape = tokens.shape[1:3]
    ctx.save_for_backward(association, mass)


def _setup_distribute(ctx, inputs, output):
    association, _, mass, ctx.super_token_size, _, ctx.backend = inputs
    ctx.save_for_backward(association, mass)


def _gradient_of_tokens(ctx, grad):
    if grad is None:  # A gradient of a gradient that nothing was made of.
        return None
    association, mass = ctx.saved_tensors
    inputs = association, grad, mass, ctx.super_token_size, ctx.token_shape, ctx.backend
    return call(distribute, *inputs)


def _backward_of_distribute(ctx, grad):
    if grad is None:
        return None, None, None, None, None, None
    association, mass = ctx.saved_tensors
    gradient = call(aggregate, association, grad, mass, ctx.super_token_size, ctx.backend)
    return None, gradient, None, None, None, None


def _backward_of_sample(ctx, grad, *_):
    return _gradient_of_tokens(ctx, grad), None, None, None


def _backward_of_aggregate(ctx, grad):
    return None, _gradient_of_tokens(ctx, grad), None, None, None


def _eager_function(compute: Callable, setup: Callable, backward: Callable) -> type[Function]:
    class Eager(Function):
        @staticmethod
        def forward(ctx, *inputs):
            # No zeros in the size of the association for a gradient that it does not have.
            ctx.set_materialize_grads(False)
            output = compute(*inputs)
            setup(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Eager


_EAGER: dict[CustomOpDef, type[Function]] = {}
_STEPS: tuple[tuple[CustomOpDef, Callable, Callable, Callable], ...] = (
    (sample, _compute_sample, _setup_sample, _backward_of_sample),
    (aggregate, _compute_aggregate, _setup_aggregate, _backward_of_aggregate),
    (distribute, _compute_distribute, _setup_distribute, _backward_of_distribute),
)
for _operator, _compute, _setup, _backward in _STEPS:
    _operator.register_autograd(_backward, setup_context=_setup)
    _EAGER[_operator] = _eager_function(_compute, _setup, _backward)


def call(operator: CustomOpDef, *inputs: Any) -> Any:
    """Call ``sample``, ``aggregate`` or ``distribute``, as an operator only where one is looked at.

    PyTorch's dispatcher takes longer on the host to call an operator written in Python than small
    kernels take on a GPU: in eager mode the same functions are called without it.
    """
    if operators_are_seen(*(x for x in inputs if isinstance(x, Tensor))):
        return operator(*inputs)
    return _EAGER[operator].apply(*inputs)


def _product_flops(association_shape: Sequence[int], channels: int) -> int:
    """Each token of each cell, padding included, times nine super tokens of C channels.

    A multiplication and an addition are two.
    """
    n, grid_h, grid_w, neighbours, cell = association_shape
    return 2 * n * grid_h * grid_w * neighbours * cell * channels


@register_flop_formula(torch.ops.mmsvit.sample)
def _sample_flops(tokens_shape, super_token_size, num_iters, *args, out_shape, **kwargs) -> int:
    """Two products an iteration: association and aggregation."""
    return 2 * num_iters * _product_flops(out_shape[1], tokens_shape[3])


@register_flop_formula([torch.ops.mmsvit.aggregate, torch.ops.mmsvit.distribute])
def _linear_flops(association_shape, features_shape, *args, **kwargs) -> int:
    return _product_flops(association_shape, features_shape[3])
