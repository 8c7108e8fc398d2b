"""What must hold for any map, cell, dtype and architecture, tried on many drawn at random.

Fixed cases with exact results are in test_ops.py, test_conv_ffn.py, test_svit.py and
test_deploy.py; here nothing is chosen by hand. Draws are the same in every run.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip('hypothesis')
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsvit import SViT
from mmsvit.models.super_token_attention import GlobalAttention
from mmsvit.models.svit import ConvFFN
from mmsvit.ops import cpu_conv_ffn, custom_ops, distribute, sample

settings.register_profile('mmsvit', derandomize=True, deadline=None, database=None)
settings.load_profile('mmsvit')

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
side = st.integers(1, 13)
cells = st.tuples(st.integers(1, 6), st.integers(1, 6))
iterations = st.integers(1, 3)


@st.composite
def maps(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, scale: float = 1.0) -> Tensor:
    """Tokens ``(N, H, W, C)``."""
    shape = draw(st.tuples(st.integers(1, 3), side, side, st.integers(1, 17)))
    seed, dtype = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(dtypes))
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (scale * tokens).clamp(-6e4, 6e4).to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    return 20 * torch.finfo(dtype).eps


@pytest.mark.promise(
    'Numbers',
    'For any map, cell, number of iterations and dtype, results are finite and associations '
    'sum to one',
    '60 draws, sums within 1e-6',
)
@settings(max_examples=60)
@given(
    st.sampled_from([1e-4, 1.0, 1e4]).flatmap(lambda scale: maps(scale=scale)), cells, iterations
)
def test_outputs_are_finite_and_associations_sum_to_one(tokens, cell, num_iters):
    supers, association = sample(tokens, cell, num_iters)
    back = distribute(association, supers, cell, tokens.shape[1:3])
    grid = [-(-length // size) for length, size in zip(tokens.shape[1:3], cell)]
    assert supers.shape == (len(tokens), *grid, tokens.shape[3]) and back.shape == tokens.shape
    assert supers.isfinite().all() and back.isfinite().all()
    assert association.min() >= 0
    torch.testing.assert_close(
        association.sum(3), torch.ones_like(association[:, :, :, 0]), rtol=0, atol=1e-6
    )
    # Means of tokens, and of the zeros that pad them: none is larger than the largest.
    slack = 1 + tolerance(tokens.dtype)
    assert supers.abs().max() <= tokens.abs().max() * slack
    assert back.abs().max() <= tokens.abs().max() * slack


@pytest.mark.promise(
    'Numbers',
    '`aggregate` and `distribute` are adjoint',
    '40 draws, within 1e-10 in float64',
)
@settings(max_examples=40)
@given(maps((torch.float64,)), cells, iterations, st.booleans())
def test_aggregate_and_distribute_are_adjoint(tokens, cell, num_iters, divide):
    _, association, mass = custom_ops.sample(tokens, cell, num_iters, 'auto')
    supers = torch.randn(
        *mass.shape[:3],
        tokens.shape[3],
        dtype=tokens.dtype,
        generator=torch.Generator().manual_seed(0),
    )
    mass = mass if divide else None
    left = supers * custom_ops.aggregate(association, tokens, mass, cell, 'auto')
    right = tokens * custom_ops.distribute(
        association, supers, mass, cell, tokens.shape[1:3], 'auto'
    )
    assert abs(left.sum() - right.sum()) <= 1e-10 * max(1, left.abs().sum())


@pytest.mark.promise('Numbers', 'A constant map gives what theory says', '40 draws')
@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    cells,
    iterations,
    st.sampled_from(DTYPES),
    st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=9),
)
def test_a_constant_map(grid, cell, num_iters, dtype, values):
    """Every super token is the constant; a token loses what goes outside the grid, exactly.

    With k of the nine neighbours inside and a = |v|^2 C^-0.5, the share that stays is
    k e^a / (k e^a + 9 - k), for a neighbour outside has logit 0.
    """
    value = torch.tensor(values).to(dtype).double()
    shape = (grid[0] * cell[0], grid[1] * cell[1])
    tokens = value.to(dtype).expand(1, *shape, len(values)).contiguous()
    supers, association = sample(tokens, cell, num_iters)
    # 1e-12 is added to the sum of the shares, a ninth of a token at least.
    slack = max(tolerance(dtype), 1e-11)
    torch.testing.assert_close(supers.double(), value.expand(1, *grid, -1), rtol=slack, atol=0)
    back = distribute(association, supers, cell, shape).double()
    rows, columns = (
        torch.tensor([min(i + 1, length - 1) - max(i - 1, 0) + 1 for i in range(length)])
        for length in grid
    )
    inside = (rows[:, None] * columns).double()
    inside = inside.repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)
    logit = value.square().sum() * len(values) ** -0.5
    share = inside / (inside + (9 - inside) * (-logit).exp())
    slack = max(tolerance(dtype), 20 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(back[0], share[..., None] * value, rtol=slack, atol=1e-30)


@pytest.mark.promise('Numbers', 'Images of a batch do not influence each other', '30 and 15 draws')
@settings(max_examples=30)
@given(maps((torch.float32, torch.bfloat16)), cells, iterations)
def test_a_change_of_one_image_does_not_reach_another(tokens, cell, num_iters):
    changed = torch.cat([tokens, tokens[:1] * 3 + 1])
    whole = sample(torch.cat([tokens, tokens[:1]]), cell, num_iters)
    other = sample(changed, cell, num_iters)
    for one, two in zip(whole, other):
        assert torch.equal(one[:-1], two[:-1])


@pytest.mark.promise(
    'Numbers',
    'gradcheck passes for sampling, the FFN by rows and attention',
    '12, 10 and 5 draws',
)
@settings(max_examples=12)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.integers(0, 100),
)
def test_gradients_of_sampling(shape, cell, divide, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    _, association, mass = custom_ops.sample(tokens.detach(), cell, 1, 'auto')
    size = (*mass.shape[:3], shape[3])
    supers = torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)
    mass = mass if divide else None
    assert torch.autograd.gradcheck(
        lambda x: custom_ops.aggregate(association, x, mass, cell, 'auto'), tokens
    )
    assert torch.autograd.gradcheck(
        lambda s: custom_ops.distribute(association, s, mass, cell, shape[1:3], 'auto'), supers
    )
    # Of sample itself autograd sees the linear map whose weights it has just computed.
    found = sample(tokens, cell)[0]
    weights = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((found * weights).sum(), tokens)
    _, association, mass = custom_ops.sample(tokens.detach(), cell, 1, 'auto')
    expected = custom_ops.distribute(association, weights, mass, cell, shape[1:3], 'auto')
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.promise('Numbers', 'gradcheck passes for sampling, the FFN by rows and attention')
@settings(max_examples=10)
@given(
    st.tuples(st.integers(1, 2), st.integers(2, 5), st.integers(1, 3), st.integers(1, 2)),
    st.integers(2, 3),
    st.integers(0, 100),
)
def test_gradients_of_the_ffn_by_rows(shape, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    width, hidden = shape[3], 3
    sizes = [(hidden, width), (hidden,), (hidden, 1, 3, 3), (hidden,), (width, hidden), (width,)]
    tensors = [
        torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)
        for size in (shape, *sizes)
    ]

    module = ConvFFN(width, hidden, ops_backend='cpu').double()
    names = [f'{layer}.{kind}' for layer in ('fc1', 'dwconv', 'fc2') for kind in ('weight', 'bias')]

    def ffn(x, *weights):
        return torch.func.functional_call(module, dict(zip(names, weights)), (x,))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_conv_ffn, '_rows_of_a_piece', lambda x, *rest: min(rows, x.shape[1]))
        assert torch.autograd.gradcheck(ffn, tensors)


@pytest.mark.promise('Numbers', 'gradcheck passes for sampling, the FFN by rows and attention')
@settings(max_examples=5)
@given(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), st.integers(1, 2))
def test_gradients_of_attention(shape, heads):
    torch.manual_seed(0)
    attention = GlobalAttention(2 * heads, heads).double()
    x = torch.randn(*shape, 2 * heads, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, x)


@st.composite
def backbones(draw: st.DrawFn) -> SViT:
    """A small SViT whose norms and layer scale do something."""
    heads = [draw(st.integers(1, 3)) for _ in range(4)]
    arch = dict(
        embed_dims=[2 * h * draw(st.integers(1, 3)) for h in heads],
        depths=[draw(st.integers(1, 2)) for _ in range(4)],
        num_heads=heads,
        super_token_sizes=[draw(cells) for _ in range(4)],
        num_iters=[draw(iterations) for _ in range(4)],
        layer_scale=[draw(st.sampled_from([None, 0.5])) for _ in range(4)],
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = SViT(
        arch,
        qkv_bias=draw(st.booleans()),
        mlp_ratio=draw(st.sampled_from([1.5, 4.0])),
        out_norm_cfg=draw(st.sampled_from([None, dict(type='LN'), dict(type='BN')])),
        out_indices=draw(st.sampled_from([(0, 1, 2, 3), (1, 3), (0, 2), (2,)])),
        drop_path_rate=draw(st.sampled_from([0.0, 0.3])),
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return model


def draw_images(count: int, height: int, width: int) -> Tensor:
    return torch.randn(
        count, 3, height, width, generator=torch.Generator().manual_seed(height * width)
    )


image_sides = st.integers(32, 75)


@pytest.mark.promise('Numbers', 'Images of a batch do not influence each other')
@pytest.mark.promise(
    'Numbers',
    'Channels-last and contiguous inputs agree; the deployed model agrees with the trained one',
    '15 architectures; bit-identical, and within 2e-5',
)
@settings(max_examples=15)
@given(backbones(), image_sides, image_sides)
@torch.no_grad()
def test_backbone_in_evaluation(model, height, width):
    x = draw_images(2, height, width)
    model.eval()
    expected = model(x)
    assert all(output.isfinite().all() and output.is_contiguous() for output in expected)
    # The layout of the input changes nothing, nor does a view into a larger tensor.
    wider = torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]
    for same in (x.to(memory_format=torch.channels_last), wider):
        assert all(torch.equal(one, other) for one, other in zip(model(same), expected))
    # Nor does the other image.
    changed = torch.stack([x[0], 5 * x[1] + 1])
    for one, other in zip(model(changed), expected):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    model.switch_to_deploy()
    for one, other in zip(model(x), expected):
        assert (one - other).abs().max() <= 2e-5 * max(1, other.abs().max())


def train_a_step(model: SViT, x: Tensor) -> dict[str, Tensor]:
    """Gradients and statistics of a step of training."""
    torch.manual_seed(0)
    model.train()
    loss = sum(output.square().mean() for output in model(x))
    if loss.requires_grad:  # Unless everything is frozen.
        loss.backward()
    gradients = {f'gradient of {name}': p.grad for name, p in model.named_parameters()}
    return {**model.state_dict(), **gradients}


@pytest.mark.promise(
    'Numbers',
    '`with_cp` changes nothing; frozen stages do not move',
    '10 architectures',
)
@settings(max_examples=10)
@given(backbones(), image_sides, image_sides, st.integers(-1, 4))
def test_backbone_in_training(model, height, width, frozen_stages):
    x = draw_images(2, height, width)
    checkpointed, frozen = copy.deepcopy(model), copy.deepcopy(model)
    for stage in checkpointed.stages:
        stage.with_cp = True
    plain = train_a_step(model, x)
    for key, value in train_a_step(checkpointed, x).items():
        torch.testing.assert_close(value, plain[key], msg=key)

    frozen.frozen_stages = frozen_stages
    before = copy.deepcopy(frozen.state_dict())
    train_a_step(frozen, x)
    torch.optim.AdamW(frozen.parameters(), lr=0.1, weight_decay=0.5).step()
    still: tuple[str, ...] = ('stem.',) if frozen_stages >= 0 else ()
    still += tuple(f'stages.{i}.' for i in range(max(frozen_stages, 0)))
    for key, value in frozen.state_dict().items():
        moved = not torch.equal(value, before[key])
        assert not (moved and key.startswith(still)), key
        # What a step must move where it is not frozen: statistics, and weights by their decay.
        if not key.startswith(still) and key.endswith(('running_mean', 'fc1.weight')):
            assert moved, key
