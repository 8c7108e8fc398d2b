"""Super token sampling as mathematics, apart from the model, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmsvit.ops import cpu_backend, cpu_cache, custom_ops, distribute, sample, torch_backend

# Token map, cell, channels, iterations: divided and not, one row, one column, one cell, cells
# beyond the map, not square, in several tiles, channels in several blocks. The last three are
# tiled as in the published models: patches of 1x2 cells, with 256 channels at once, and of one.
CASES = [
    ((8, 8), (4, 4), 6, 1),
    ((5, 25), (4, 4), 20, 2),
    ((84, 19), (8, 8), 24, 1),
    ((1, 7), (1, 3), 5, 3),
    ((9, 1), (2, 2), 16, 1),
    ((3, 3), (8, 8), 16, 2),
    ((6, 10), (2, 3), 40, 2),
    ((5, 7), (3, 1), 33, 1),
    ((40, 30), (32, 32), 12, 1),
    ((3, 12), (2, 2), 300, 1),
    ((10, 21), (8, 8), 64, 1),
    ((9, 17), (4, 4), 192, 1),
    ((9, 10), (8, 8), 128, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def case_id(value):
    return str(value).replace(' ', '') if isinstance(value, tuple) else str(value).split('.')[-1]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_reference(tokens, cell, num_iters):
    """Super tokens and what is sent back by one matrix of all tokens times all super tokens.

    Also the association, as that matrix, tokens in the order of the padded map.
    """
    _, height, width, channels = tokens.shape
    (h, w), grid_h, grid_w = cell, -(-height // cell[0]), -(-width // cell[1])
    padded = F.pad(tokens, (0, 0, 0, grid_w * w - width, 0, grid_h * h - height))
    x = padded.flatten(1, 2)
    row = torch.arange(grid_h * h).repeat_interleave(grid_w * w) // h
    column = torch.arange(grid_w * w).repeat(grid_h * h) // w
    down = row[:, None] - torch.arange(grid_h).repeat_interleave(grid_w)
    right = column[:, None] - torch.arange(grid_w).repeat(grid_h)
    near = (down.abs() <= 1) & (right.abs() <= 1)
    supers = ((down == 0) & (right == 0)).to(x.dtype).T @ x / (h * w)
    for _ in range(num_iters):
        with torch.no_grad():
            logits = x @ supers.mT * channels**-0.5
            top = logits.masked_fill(~near, 0).amax(-1, keepdim=True).clamp(min=0)
            shares = (logits - top).exp() * near
            lost = (9 - near.sum(-1, keepdim=True)) * (-top).exp()
            association = shares / (shares.sum(-1, keepdim=True) + lost)
        supers = association.mT @ x / (association.sum(1).unsqueeze(-1) + 1e-12)
    supers = supers.unflatten(1, (grid_h, grid_w))
    back = (association @ supers.flatten(1, 2)).unflatten(1, (grid_h * h, grid_w * w))
    return supers, back[:, :height, :width], association


def by_cells(dense, grid, cell):
    """The dense association as the operations give it, with NaN outside the grid."""
    (grid_h, grid_w), (h, w) = grid, cell
    dense = dense.reshape(-1, grid_h, h, grid_w, w, grid_h, grid_w)
    result = dense.new_full((len(dense), grid_h, grid_w, 9, h * w), torch.nan)
    for y in range(grid_h):
        for x in range(grid_w):
            for k in range(9):
                a, b = y + k // 3 - 1, x + k % 3 - 1
                if 0 <= a < grid_h and 0 <= b < grid_w:
                    result[:, y, x, k] = dense[:, y, :, x, :, a, b].flatten(1)
    return result


def results(tokens, cell, num_iters, backend=None, device=None):
    """All outputs and gradients on a backend, or of the reference, in float64 on the CPU."""
    weights = random(*tokens.shape, seed=1).to(tokens.dtype)
    tokens, weights = (x.detach().to(device) for x in (tokens, weights))
    tokens.requires_grad_()
    if backend is None:
        supers, back, dense = dense_reference(tokens, cell, num_iters)
        association = by_cells(dense, supers.shape[1:3], cell)
    else:
        supers, association = sample(tokens, cell, num_iters, backend)
        assert not association.requires_grad
        back = distribute(association, supers, cell, tokens.shape[1:3], backend)
        assert supers.dtype == back.dtype == tokens.dtype and back.is_contiguous()
    grads = torch.autograd.grad((back * weights).sum(), (supers, tokens))
    names = ('super tokens', 'association', 'back', 'gradient of super tokens', 'of tokens')
    tensors = (supers, association, back, *grads)
    return {name: x.detach().double().cpu() for name, x in zip(names, tensors)}


def errors(found, exact):
    found = {name: found[name] - exact[name] for name in exact}
    return {name: error[~error.isnan()].abs().max().item() for name, error in found.items()}


@pytest.mark.parametrize('dtype', DTYPES, ids=case_id)
@pytest.mark.parametrize(('shape', 'cell', 'channels', 'num_iters'), CASES, ids=case_id)
def test_against_exact_result(place, dtype, shape, cell, channels, num_iters):
    backend, device = place
    tokens = random(1 if max(shape) > 30 else 2, *shape, channels).to(dtype)
    exact = results(tokens.double(), cell, num_iters)
    found = results(tokens, cell, num_iters, backend, device)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert (found['association'].sum(3) - 1).abs().max() <= 1e-6
    error = errors(found, exact)
    size = {name: x.nan_to_num().abs().max().item() for name, x in exact.items()}
    single = torch.finfo(torch.float32).eps
    if backend == 'torch':
        for name in exact:
            eps = single if name == 'association' else torch.finfo(dtype).eps
            assert error[name] <= (2 * eps + 20 * single) * size[name], name
    else:
        plain = errors(results(tokens, cell, num_iters, 'torch', device), exact)
        # Halves multiply a factor of the association's products in two summands. Of bfloat16 that
        # is 16 bits, which only a GPU sees: Triton's interpreter gets float32 in its place, so
        # without a GPU the kernels' own products of bfloat16 are compiled, and never run.
        split = 2**-15 if dtype == torch.bfloat16 else 0
        for name in exact:
            slack = single * 4 + (split if name == 'association' else 0)
            assert error[name] <= 2 * plain[name] + slack * size[name], name


@pytest.mark.parametrize(('shape', 'cell', 'channels', 'num_iters'), CASES, ids=case_id)
def test_float64(shape, cell, channels, num_iters):
    tokens = random(2, *shape, channels)
    exact = results(tokens, cell, num_iters)
    for name, error in errors(results(tokens, cell, num_iters, 'auto'), exact).items():
        assert error <= 1e-13 * exact[name].nan_to_num().abs().max(), name


@pytest.mark.parametrize('dtype', DTYPES[:2], ids=case_id)
def test_same_bits_every_time(place, dtype):
    tokens = random(2, 7, 9, 24).to(dtype)
    first, second = (results(tokens, (2, 3), 1, *place) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_aggregate_and_distribute_are_adjoint(place):
    backend, device = place
    shape, cell = (7, 9), (3, 4)
    tokens = random(2, *shape, 6).float().to(device)
    _, association, mass = custom_ops.sample(tokens, cell, 1, backend)
    supers = random(2, *mass.shape[1:3], 6, seed=1).float().to(device)
    for divisor in (None, mass):
        left = custom_ops.aggregate(association, tokens, divisor, cell, backend) * supers
        right = custom_ops.distribute(association, supers, divisor, cell, shape, backend) * tokens
        size = left.abs().sum().item()
        assert abs(left.double().sum() - right.double().sum()) <= 1e-6 * size


@pytest.mark.parametrize('divide', [False, True])
def test_gradients_of_both_orders(divide):
    shape, cell = (3, 5), (2, 2)
    tokens = random(1, *shape, 3).requires_grad_()
    _, association, mass = custom_ops.sample(tokens.detach(), cell, 1, 'torch')
    supers = random(1, 2, 3, 3).requires_grad_()
    mass = mass if divide else None
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: custom_ops.aggregate(association, x, mass, cell, 'torch'), tokens)
        assert check(
            lambda s: custom_ops.distribute(association, s, mass, cell, shape, 'torch'), supers
        )


@pytest.mark.promise(
    'Numbers',
    'float16 and bfloat16 stay finite with activations of 1e4, forward and backward',
)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=case_id)
def test_half_precision_does_not_overflow(place, dtype):
    backend, device = place
    shape, cell = (16, 24), (8, 8)
    tokens = (random(1, *shape, 64) * 1e4).clamp(-6e4, 6e4).to(device, dtype).requires_grad_()
    supers, association = sample(tokens, cell, 2, backend)
    back = distribute(association, supers, cell, shape, backend)
    back.mean().backward()
    assert association.dtype == torch.float32 and tokens.grad.dtype == dtype
    for tensor in (association, supers, back, tokens.grad):
        assert torch.isfinite(tensor).all()


def test_layout_of_the_input_does_not_matter(place):
    backend, device = place
    tokens = random(2, 9, 14, 6).float().to(device)
    scattered = tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not scattered.is_contiguous()
    supers, association = sample(tokens, (4, 4), backend=backend)
    for one, other in zip((supers, association), sample(scattered, (4, 4), backend=backend)):
        torch.testing.assert_close(one, other)
    turned = supers.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(
        distribute(association, supers, (4, 4), (9, 14), backend),
        distribute(association, turned, (4, 4), (9, 14), backend),
    )


def test_autocast_does_not_matter(place):
    tokens = random(1, 8, 8, 16).float()
    expected = results(tokens, (4, 4), 1, *place)
    with torch.autocast(place[1], dtype=torch.bfloat16):
        found = results(tokens, (4, 4), 1, *place)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_wrong_arguments_are_named():
    tokens = random(1, 8, 8, 4)
    with pytest.raises(ValueError, match=r'\(N, H, W, C\).*\(8, 8, 4\)'):
        sample(tokens[0], (4, 4))
    with pytest.raises(ValueError, match=r'floating point.*int64'):
        sample(tokens.long(), (4, 4))
    with pytest.raises(ValueError, match=r'super_token_size.*\(0, 4\)'):
        sample(tokens, (0, 4))
    with pytest.raises(ValueError, match=r'num_iters.* 0'):
        sample(tokens, (4, 4), 0)
    supers, association = sample(tokens, (4, 4))
    for arguments in (((4, 4), (8, 9)), ((2, 2), (8, 8))):
        with pytest.raises(ValueError, match='association of shape'):
            distribute(association, supers, *arguments)
    with pytest.raises(ValueError, match='as many super tokens'):
        distribute(association, supers[:, :1], (4, 4), (8, 8))
    with pytest.raises(ValueError, match=r'\(N, Gh, Gw, C\).*\(2, 2, 4\)'):
        distribute(association, supers[0], (4, 4), (8, 8))
    with pytest.raises(ValueError, match=r'super tokens must be floating point.*int64'):
        distribute(association, supers.long(), (4, 4), (8, 8))
    for dtype in (torch.int64, torch.float16):
        with pytest.raises(ValueError, match=f'association must be float32 or.*found {dtype}'):
            distribute(association.to(dtype), supers, (4, 4), (8, 8))


def test_an_empty_batch_gives_empty_maps(place):
    found = results(random(0, 5, 9, 6).float(), (2, 4), 2, *place)
    shapes = [(0, 3, 3, 6), (0, 3, 3, 9, 8), (0, 5, 9, 6), (0, 3, 3, 6), (0, 5, 9, 6)]
    assert [tuple(tensor.shape) for tensor in found.values()] == shapes


@pytest.mark.parametrize('rows_of_cells', [1, 2])
@pytest.mark.parametrize('shape, cell', [((2, 23, 11, 6), (3, 2)), ((1, 12, 8, 5), (4, 4))])
def test_piece_by_piece_is_as_at_once(rows_of_cells, shape, cell, monkeypatch):
    """On the CPU a map is worked on some rows of cells at a time."""
    tokens = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n, height, width, channels = shape
    row_bytes = n * -(-width // cell[1]) * (cell[0] * cell[1] + 9) * channels * 8
    size = rows_of_cells * row_bytes // torch.get_num_threads() + 1
    monkeypatch.setattr(cpu_cache, 'PIECE_BYTES', size)
    supers, association, mass = torch_backend.sample(tokens, cell, 2)
    for found, expected in zip(cpu_backend.sample(tokens, cell, 2), (supers, association, mass)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for divisor in (None, mass):
        torch.testing.assert_close(
            cpu_backend.aggregate(association, tokens, divisor, cell),
            torch_backend.aggregate(association, tokens, divisor, cell),
            rtol=1e-12,
            atol=1e-12,
        )
        torch.testing.assert_close(
            cpu_backend.distribute(association, supers, divisor, cell, (height, width)),
            torch_backend.distribute(association, supers, divisor, cell, (height, width)),
            rtol=1e-12,
            atol=1e-12,
        )
