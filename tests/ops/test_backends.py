"""Every backend through every operation, and layers that no backend may bypass."""

from __future__ import annotations

import copy
import textwrap
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from conftest import OPS_PLACES, run_python, small_arch
from torch import nn
from torch.nn.modules import module as torch_module

from mmsvit import SViT, ops
from mmsvit.models.svit import ConvFFN, SuperTokenBlock
from mmsvit.ops import custom_ops
from mmsvit.ops.standard_layers import is_standard

CELL, SHAPE = (2, 3), (7, 8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(device: str, dtype: torch.dtype) -> ConvFFN:
    torch.manual_seed(0)
    return ConvFFN(16, 24).to(device, dtype)


# Each returns tensors. Without a backend, of the layers their definition, written here; of
# sampling what `torch` gives, which test_ops.py compares with a definition.
def sample(x, backend):
    tokens, association = ops.sample(x, CELL, 2, backend or 'torch')
    return tokens, association.nan_to_num()


def aggregate(x, backend):
    _, association, mass = custom_ops.sample(x.detach(), CELL, 1, backend or 'torch')
    return (custom_ops.aggregate(association, x, mass, CELL, backend or 'torch'),)


def distribute(x, backend):
    _, association, _ = custom_ops.sample(x.detach(), CELL, 1, backend or 'torch')
    super_tokens = F.avg_pool2d(x.permute(0, 3, 1, 2), CELL, ceil_mode=True).permute(0, 2, 3, 1)
    return (ops.distribute(association, super_tokens, CELL, SHAPE, backend or 'torch'),)


def conv_ffn(x, backend):
    ffn = layers(x.device, x.dtype)
    if backend is not None:
        ffn.ops_backend = backend
        return (ffn(x),)
    hidden = F.gelu(ffn.fc1(x)).permute(0, 3, 1, 2)
    return (ffn.fc2((hidden + ffn.dwconv(hidden)).permute(0, 2, 3, 1)),)


def residual_ffn(x, backend):
    (branch,) = conv_ffn(x, None)
    ffn = layers(x.device, x.dtype)
    ffn.ops_backend = backend or 'torch'
    return (x + branch if backend is None else ffn(x, residual=True),)


def add_depthwise_conv(x, backend):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16).to(x.device, x.dtype)
    if backend is not None:
        return (ops.add_depthwise_conv(x, conv, backend),)
    return (x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),)


def gelu_affine(x, backend):
    scale, shift = (random(16, seed=s).to(x) for s in (1, 2))
    if backend is not None:
        return (ops.gelu_affine(x * 1, scale, shift, backend),)
    return (F.gelu(x) * scale + shift,)


def channels_first(x, backend):
    found = x.permute(0, 3, 1, 2) if backend is None else ops.channels_first(x, backend)
    assert backend is None or found.is_contiguous()
    return (found,)


def block(x, backend):
    torch.manual_seed(0)
    made = SuperTokenBlock(
        embed_dims=16,
        num_heads=2,
        super_token_size=CELL,
        layer_scale=0.5,
        ops_backend=backend or 'torch',
    )
    return (made.to(x.device, x.dtype).eval()(x),)


OPERATIONS = [
    sample,
    aggregate,
    distribute,
    conv_ffn,
    residual_ffn,
    add_depthwise_conv,
    gelu_affine,
    channels_first,
    block,
]


@pytest.mark.parametrize('grad', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('operation', OPERATIONS, ids=lambda o: o.__name__)
def test_every_backend_through_every_operation(place, operation, dtype, grad):
    backend, device = place
    if backend == 'triton' and dtype == torch.float64:
        pytest.skip('the Triton kernels do not compute in float64')
    x = random(2, *SHAPE, 16).to(device, dtype)
    exact = x.detach().cpu().double().clone()
    with torch.set_grad_enabled(grad):
        x.requires_grad_(grad)
        exact.requires_grad_(grad)
        found, expected = operation(x, backend), operation(exact, None)
        if grad:
            weights = random(*expected[0].shape, seed=3)
            found += torch.autograd.grad((found[0] * weights.to(found[0])).sum(), x)
            expected += torch.autograd.grad((expected[0] * weights.double()).sum(), exact)
    limit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 24 * torch.finfo(dtype).eps)
    for one, other in zip(found, expected):
        error = (one.double().cpu() - other).abs().max() / other.abs().max()
        assert error < limit, f'{error:.2g}'


@pytest.mark.parametrize('name', ['torch', 'cpu', 'triton'])
def test_one_choice_decides_for_the_whole_block(monkeypatch, name):
    """What `ops_backend` names computes every operation, and nothing else does."""
    if name not in [place[0] for place in OPS_PLACES]:
        pytest.skip('does not run here')
    used = []

    def spy(module_name, operation, original):
        def call(*args, **kwargs):
            used.append((module_name, operation))
            return original(*args, **kwargs)

        return call

    device = dict(OPS_PLACES)[name]
    x = random(2, *SHAPE, 16).to(device)
    block(x, name)  # imports the backend
    for other in ('torch', 'cpu', 'triton'):
        module = getattr(ops, f'{other}_backend', None)
        for operation in ('sample', 'distribute', 'conv_ffn', 'add_depthwise_conv'):
            if module is not None:
                original = getattr(module, operation)
                monkeypatch.setattr(module, operation, spy(other, operation, original))
    with torch.no_grad():
        block(x, name)
    expected = ['add_depthwise_conv', 'sample', 'distribute', 'conv_ffn']
    assert used[:4] == [(name, operation) for operation in expected]


def replace_by_subclass(layer):
    class Doubled(type(layer)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubled


def patch_instance(layer):
    original = layer.forward
    layer.forward = MethodType(lambda self, x: 2 * original(x), layer)


def patch_the_call(layer):
    layer._call_impl = lambda x: 2 * layer.forward(x)


def change_result_by_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def change_input_by_hook(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0],))


def parametrize(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    if hasattr(layer, 'weight'):
        nn.utils.parametrize.register_parametrization(layer, 'weight', Doubled())
    else:
        patch_instance(layer)


def without_bias(layer):
    if hasattr(layer, 'bias'):
        layer.bias = None
    else:
        layer.approximate = 'tanh'


CHANGES = [
    replace_by_subclass,
    patch_instance,
    patch_the_call,
    change_result_by_hook,
    change_input_by_hook,
    parametrize,
    without_bias,
]


def as_written(ffn, x):
    hidden = ffn.act(ffn.fc1(x)).permute(0, 3, 1, 2)
    return ffn.fc2((hidden + ffn.dwconv(hidden)).permute(0, 2, 3, 1))


@pytest.mark.parametrize('change', CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize('name', ['fc1', 'act', 'dwconv', 'fc2'])
@pytest.mark.parametrize('backend', ['auto', 'torch', 'cpu'])
def test_a_changed_layer_of_the_ffn_runs_as_written(backend, name, change):
    torch.manual_seed(0)
    ffn, x = ConvFFN(6, 12, ops_backend=backend), random(1, 40, 4, 6)
    before = ffn(x)
    change(ffn.get_submodule(name))
    torch.testing.assert_close(ffn(x), as_written(ffn, x))
    assert (ffn(x) - before).abs().max() > 1e-5


def conv(**settings):
    torch.manual_seed(0)
    return nn.Conv2d(**{'in_channels': 6, 'out_channels': 6, 'kernel_size': 3, **settings})


OTHER_CONVS = {
    'dilation': lambda: conv(padding=2, dilation=2, groups=6),
    'padding mode': lambda: conv(padding=1, groups=6, padding_mode='reflect'),
    'padding same': lambda: conv(padding='same', groups=6),
    'kernel size': lambda: conv(kernel_size=5, padding=2, groups=6),
    'groups': lambda: conv(padding=1, groups=3),
    'no bias': lambda: conv(padding=1, groups=6, bias=False),
    'two layers': lambda: nn.Sequential(conv(padding=1, groups=6), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize('kind', OTHER_CONVS)
@pytest.mark.parametrize('backend', ['auto', 'torch', 'cpu'])
def test_a_convolution_with_other_settings_runs_as_written(backend, kind):
    layer, x = OTHER_CONVS[kind](), random(1, 40, 4, 6)
    expected = x + layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ops.add_depthwise_conv(x, layer, backend), expected)

    ffn = ConvFFN(6, 6, ops_backend=backend)
    ffn.dwconv = OTHER_CONVS[kind]()
    torch.testing.assert_close(ffn(x), as_written(ffn, x))


@pytest.mark.parametrize('change', CHANGES, ids=lambda c: c.__name__)
def test_a_changed_position_embedding_runs_as_written(change):
    layer, x = conv(padding=1, groups=6), random(1, 40, 4, 6)
    change(layer)
    expected = x + layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(ops.add_depthwise_conv(x, layer), expected)


@pytest.mark.parametrize('name', ['fc1', 'act', 'dwconv', 'fc2', 'drop'])
@pytest.mark.parametrize(
    'register',
    [
        'register_forward_hook',
        'register_forward_pre_hook',
        'register_full_backward_hook',
        'register_full_backward_pre_hook',
    ],
)
def test_a_hook_on_a_layer_is_called(name, register):
    ffn, heard = ConvFFN(6, 12), []
    getattr(ffn.get_submodule(name), register)(lambda *_: heard.append(name))
    ffn(torch.randn(1, 4, 4, 6, requires_grad=True)).sum().backward()
    assert heard == [name] * (2 if name == 'drop' else 1)


def test_a_hook_on_all_modules_is_called_for_every_layer():
    model, heard = SViT(small_arch()).eval(), set()
    names = {module: name for name, module in model.named_modules()}
    handle = torch_module.register_module_forward_hook(lambda m, *_: heard.add(names.get(m)))
    try:
        model(random(1, 3, 32, 32))
    finally:
        handle.remove()
    assert {'stages.0.blocks.0.pos_embed', 'stages.0.blocks.0.ffn.dwconv'} <= heard


def test_dropout_that_was_switched_on_alone_drops():
    """Monte-Carlo dropout: a model in evaluation mode, its dropout layers in training mode."""
    ffn, x = ConvFFN(6, 12, drop_rate=0.5).eval(), random(1, 8, 8, 6)
    torch.testing.assert_close(ffn(x), as_written(ffn, x))
    ffn.drop.train()
    assert (ffn(x) - as_written(ffn, x)).abs().max() > 0.01


def test_a_class_that_was_patched_is_not_standard(monkeypatch):
    layer = nn.Linear(3, 3)
    assert is_standard(layer)
    monkeypatch.setattr(nn.Linear, 'forward', lambda self, x: x)
    assert not is_standard(layer)


def test_a_class_that_was_patched_before_is_not_standard():
    # In another process, because mmsvit is imported after.
    code = """
        from torch import nn
        original = nn.Linear.forward
        nn.Linear.forward = lambda self, x: 2 * original(self, x)
        from mmsvit.ops.standard_layers import is_standard
        assert is_standard(nn.GELU()) and not is_standard(nn.Linear(2, 2))
    """
    run_python('-c', textwrap.dedent(code))


def test_a_copy_of_a_layer_is_standard():
    ffn = copy.deepcopy(ConvFFN(6, 12))
    assert all(map(is_standard, (ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2, ffn.drop)))
    assert not is_standard(None) and not is_standard(nn.GroupNorm(1, 3))


def test_the_sum_keeps_the_precision_of_x_under_autocast(place):
    backend, device = place
    x = (random(1, 9, 9, 4) + 100).to(device)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=4).to(device)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.mul_(0.03)
    exact = ops.add_depthwise_conv(x, layer, backend)
    with torch.autocast(device, torch.bfloat16):
        found = ops.add_depthwise_conv(x, layer, backend)
    # 100 itself would be rounded by up to 0.25, the convolution's few units are by 0.02.
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 0.1
