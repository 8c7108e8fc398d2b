"""The form for inference gives what the trained form gives."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN, golden_arch, small_arch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from mmsvit import SViT


def trained(**arguments) -> SViT:
    """A model whose norms and layer scale do something."""
    torch.manual_seed(0)
    model = SViT(**{'arch': small_arch(), **arguments})
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for name, parameter in model.named_parameters():
        if 'gamma' in name:
            nn.init.normal_(parameter, 1, 0.3)
    return model.eval()


@torch.no_grad()
def assert_deploys(model: SViT, x: torch.Tensor) -> None:
    expected = model(x)
    model.switch_to_deploy()
    model.switch_to_deploy()  # again, which must not fold twice
    for one, other in zip(model(x), expected):
        assert one.is_contiguous()
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.promise(
    'Numbers',
    'Channels-last and contiguous inputs agree; the deployed model agrees with the trained one',
)
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        dict(norm_cfg=dict(type='SyncBN', eps=1e-3)),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(out_indices=(1,), out_norm_cfg=dict(type='BN')),
        dict(token_sampling='average_pool', pos_embed=False, conv_ffn=False),
    ],
)
def test_outputs_stay_the_same(arguments):
    assert_deploys(trained(**arguments), torch.randn(2, 3, 61, 90))


@pytest.mark.parametrize('name', ['tiny', 'coarse'])
def test_outputs_of_published_weights_stay_the_same(name):
    init_cfg = dict(type='Pretrained', checkpoint=str(GOLDEN / f'{name}.pth'))
    model = SViT(golden_arch(name), init_cfg=init_cfg)
    model.init_weights()
    assert_deploys(model.eval(), torch.randn(1, 3, 97, 131))


def test_no_batch_norm_and_no_layer_scale_is_left():
    model = trained()
    model.switch_to_deploy()
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any('gamma' in name for name, _ in model.named_parameters())


def test_a_deployed_model_is_not_trained():
    model = trained()
    model.switch_to_deploy()
    with pytest.raises(RuntimeError, match='form for inference, which cannot be trained'):
        model.train()
    model.eval()


def test_a_deployed_model_takes_no_weights_of_a_trained_one():
    model = trained()
    weights = model.state_dict()
    model.switch_to_deploy()
    with pytest.raises(RuntimeError, match='load them before switch_to_deploy'):
        model.load_state_dict(weights, strict=False)


@pytest.mark.parametrize('keep_graph', [False, True])
def test_maps_keep_their_dtype_under_autocast(keep_graph):
    # Without layer scale: its float32 factors make float32 of what they are not folded into.
    model, dtypes = trained(out_indices=(0, 1)), []
    for _ in range(2):
        hooks = [
            module.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
            for module in (model.stem, *model.stages)
        ]
        with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(keep_graph):
            outputs = model(torch.randn(1, 3, 64, 64))
        for hook in hooks:
            hook.remove()
        dtypes.extend(output.dtype for output in outputs)
        model.switch_to_deploy()
    assert set(dtypes) == {torch.bfloat16}


def double(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def share_weights(model: SViT) -> None:
    first, second = (block.ffn.fc1 for block in model.stages[1].blocks)
    second.weight = first.weight


REPLACED = {
    'another norm': lambda m, block: setattr(block, 'norm2', nn.GroupNorm(1, block.embed)),
    'an adapter': lambda m, block: setattr(block.ffn, 'fc2', nn.Sequential(block.ffn.fc2)),
    'another attention': lambda m, block: setattr(block, 'attn', nn.Identity()),
    'no bias': lambda m, block: setattr(block.ffn.fc1, 'bias', None),
    'another dropout': lambda m, block: setattr(block.ffn, 'drop', nn.AlphaDropout(0.1)),
    'another activation': lambda m, block: m.stem.__setitem__(1, nn.ReLU()),
    'an approximate one': lambda m, block: m.stem.__setitem__(1, nn.GELU('tanh')),
    'another order': lambda m, block: m.stem.insert(1, m.stem.pop(2)),
    'another down-sampling': lambda m, block: m.stages[0].downsample.append(nn.GELU()),
    'weights in two places': lambda m, block: share_weights(m),
    'a pruned layer': lambda m, block: prune.random_unstructured(block.ffn.fc1, 'weight', 0.5),
    'a patched layer': lambda m, block: setattr(block.attn.attend.proj, 'forward', lambda x: x),
    'a hook of the stem': lambda m, block: double(m.stem),
    'a hook in the stem': lambda m, block: double(m.stem[1]),
    'a hook of a norm': lambda m, block: double(block.norm2),
    'a hook of the FFN': lambda m, block: double(block.ffn),
    'a hook of drop path': lambda m, block: double(block.drop_path),
    'a hook of down-sampling': lambda m, block: double(m.stages[0].downsample),
    'a hook of its convolution': lambda m, block: double(m.stages[0].downsample[0]),
}


@pytest.mark.parametrize('what', REPLACED)
def test_what_cannot_be_folded_is_refused_and_nothing_is_changed(what):
    model = trained()
    block = model.stages[2].blocks[0]
    block.embed = block.norm2.num_features
    REPLACED[what](model, block)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises((TypeError, ValueError), match=r'fold|hook|bias|layers, expected 2'):
        model.switch_to_deploy()
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('without', ['gamma_1', 'gamma_2'])
def test_one_layer_scale_without_the_other_is_folded(without):
    model = trained()
    setattr(model.stages[2].blocks[0], without, None)
    assert_deploys(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('backend', ['torch', 'cpu'])
def test_a_deployed_model_runs_with_gradients_and_hooks(backend):
    model = trained(ops_backend=backend)
    model.switch_to_deploy()
    x = torch.randn(1, 3, 97, 41)
    with torch.no_grad():
        expected = model(x)
    for kind in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', torch.bfloat16, enabled=kind != torch.float32):
            outputs = model(x.requires_grad_())
        torch.testing.assert_close(outputs[0].float(), expected[0], rtol=0.1, atol=0.1)
    model.stages[0].blocks[0].attn.register_full_backward_hook(lambda *args: None)
    model(x)[0].sum().backward()


def test_norms_without_running_statistics_are_refused():
    model = SViT(small_arch(), norm_cfg=dict(type='BN', track_running_stats=False))
    with pytest.raises(ValueError, match=r'track_running_stats=False.*without switch_to_deploy'):
        model.switch_to_deploy()
