"""The contract of the backbone: every argument, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import ROOT, run_python, small_arch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from mmsvit import SViT
from mmsvit.models.super_token_attention import ATTENTIONS
from mmsvit.models.svit_arch import ARCHS
from mmsvit.ops import channels_first, cpu_cache

STRIDES = (4, 8, 16, 32)


def make(**arguments) -> SViT:
    torch.manual_seed(0)
    return SViT(**{'arch': small_arch(), **arguments})


def images(height: int = 64, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('size', [(32, 32), (33, 65), (64, 47), (127, 32)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_output_shapes_and_layout(size, memory_format):
    outputs = make().eval()(images(*size).to(memory_format=memory_format))
    assert [tuple(output.shape) for output in outputs] == [
        (2, dims, -(-size[0] // stride), -(-size[1] // stride))
        for dims, stride in zip(small_arch()['embed_dims'], STRIDES)
    ]
    # MMCV's RoIAlign reads any map as contiguous NCHW.
    assert all(output.is_contiguous() for output in outputs)


@pytest.mark.parametrize('arch', ARCHS)
def test_named_archs_run(arch):
    model = SViT(arch, drop_path_rate=0.2).eval()
    with torch.no_grad():
        outputs = model(images(64, 64)[:1])
    assert [output.shape[1] for output in outputs] == list(ARCHS[arch]['embed_dims'])
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.stages[0].blocks[0].drop_path.drop_prob == 0


def test_batch_entries_do_not_influence_each_other():
    model = make().eval()
    both = model(images())
    for i in range(2):
        for one, whole in zip(model(images()[i : i + 1]), both):
            torch.testing.assert_close(one, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = make().eval()
    expected = model(images())
    for output, reference in zip(copy.deepcopy(model).to(dtype)(images().to(dtype)), expected):
        assert output.dtype == dtype
        error = (output.float() - reference).abs().max() / reference.abs().max()
        assert error < (0.01 if dtype == torch.float16 else 0.08)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_trains_and_stays_finite(dtype):
    model = make(out_norm_cfg=dict(type='LN'))
    with torch.autocast('cpu', dtype):
        outputs = model(images() * 1e3)
        sum(output.float().mean() for output in outputs).backward()
    assert all(torch.isfinite(output).all() for output in outputs)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_out_indices_build_only_what_is_needed():
    full, part = make(), make(out_indices=(0, 1))
    part.load_state_dict({key: full.state_dict()[key] for key in part.state_dict()})
    assert len(part.stages) == 2 and part.stages[1].downsample is None
    full.eval(), part.eval()
    for one, other in zip(part(images()), full(images())):
        torch.testing.assert_close(one, other)
    sum(output.sum() for output in part(images())).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.promise('Numbers', '`with_cp` changes nothing; frozen stages do not move')
@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages_do_not_move(frozen_stages):
    model = make(frozen_stages=frozen_stages, drop_path_rate=0.5, out_norm_cfg=dict(type='LN'))
    before = copy.deepcopy(model.state_dict())
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = model(images())
    sum((output**2).mean() for output in outputs).backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    frozen = ('stem.',) if frozen_stages >= 0 else ()
    frozen += tuple(f'stages.{i}.' for i in range(max(frozen_stages, 0)))
    for key, value in model.state_dict().items():
        if key.startswith(frozen):
            assert torch.equal(value, before[key]), f'{key} moved'
        elif key.endswith(('running_mean', 'stem.0.weight', 'fc1.weight')):
            assert not torch.equal(value, before[key]), f'{key} did not move'


def test_norm_eval_keeps_statistics_but_not_weights():
    model = make(norm_eval=True).train()
    before = copy.deepcopy(model.state_dict())
    sum(output.mean() for output in model(images())).backward()
    for key, value in model.state_dict().items():
        if 'running' in key or 'tracked' in key:
            assert torch.equal(value, before[key]), key
    assert model.stages[0].blocks[0].norm2.weight.grad is not None
    assert make(norm_eval=False).train().stem[2].training


@pytest.mark.promise('Numbers', '`with_cp` changes nothing; frozen stages do not move')
def test_gradient_checkpointing_changes_nothing():
    results = []
    for with_cp in (False, True, 'ffn'):
        model = make(with_cp=with_cp, drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1)
        model.train()
        torch.manual_seed(3)
        sum((output**2).mean() for output in model(images())).backward()
        gradients = {f'grad of {n}': p.grad for n, p in model.named_parameters()}
        results.append({**model.state_dict(), **gradients})
    plain, *checkpointed = results
    for key, value in plain.items():  # Batch norms must not count the second pass.
        for found in checkpointed:
            torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.slow
def test_gradient_checkpointing_compiles():
    results = []
    for compiled in (False, True):
        model = make(with_cp=True).train()
        torch._dynamo.reset()
        run = torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model
        sum((output**2).mean() for output in run(images())).backward()
        gradients = {f'grad of {n}': p.grad for n, p in model.named_parameters()}
        results.append({**model.state_dict(), **gradients})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_drop_path_drops_whole_samples():
    model = make(drop_path_rate=0.9).train()
    drop_path = model.stages[-1].blocks[-1].drop_path
    torch.manual_seed(0)
    masks = drop_path(torch.ones(1000, 2, 2, 3))
    for kept in masks:
        assert kept.shape == (1000, 1, 1, 1)
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert 0.05 < kept.mean() < 0.15
    assert (masks[0] != masks[1]).any()


def test_a_block_adds_what_is_kept_divided_by_its_part():
    model = make(drop_path_rate=0.5).train()
    block = model.stages[-1].blocks[-1]
    block.norm1, block.norm2, block.pos_embed = nn.Identity(), nn.Identity(), None
    block.attn = Scale(1.0)
    block.ffn = Scale(0.0)
    torch.manual_seed(0)
    added = block(torch.ones(1000, 2, 2, 3)) - 1
    assert set(added.unique().tolist()) == {0.0, 2.0}
    assert (added == added[:, :1, :1, :1]).all()
    assert added.mean().item() == pytest.approx(1, abs=0.1)


def test_a_replaced_drop_path_takes_the_branches():
    x = torch.randn(2, 4, 4, small_arch()['embed_dims'][-1])  # Of two samples: no masks are read.
    block = make(drop_path_rate=0.5).train().stages[-1].blocks[-1].eval()
    expected = block(x)
    block.drop_path = nn.Identity()
    assert torch.equal(block(x), expected)
    block.drop_path = Scale(0.0)
    block.pos_embed = None
    assert torch.equal(block(x), x)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    ('norm_cfg', 'expected'),
    [
        (dict(type='BN', eps=1e-3, momentum=0.2), nn.BatchNorm2d),
        (dict(type='SyncBN', requires_grad=False), nn.SyncBatchNorm),
    ],
)
def test_norm_cfg(norm_cfg, expected):
    norm = make(norm_cfg=norm_cfg).stages[1].blocks[0].norm2
    assert type(norm) is expected
    assert norm.eps == norm_cfg.get('eps', 1e-5)
    assert norm.weight.requires_grad == norm_cfg.get('requires_grad', True)


@pytest.mark.parametrize('kind', ['LN', 'BN', 'SyncBN'])
def test_out_norm_normalises_each_output(kind):
    model = make(out_norm_cfg=dict(type=kind), out_indices=(0, 2)).train()
    assert list(model.out_norms) == ['0', '2']
    over = 1 if kind == 'LN' else (0, 2, 3)
    for output in model(images()):
        zeros = torch.zeros_like(output.mean(over))
        torch.testing.assert_close(output.mean(over), zeros, rtol=0, atol=1e-4)


def test_arguments_arrive():
    model = make(in_channels=5, mlp_ratio=2.0, qkv_bias=False, drop_rate=0.1, attn_drop_rate=0.2)
    block = model.stages[1].blocks[0]
    assert model.stem[0].in_channels == 5 and block.ffn.fc1.out_features == 24
    assert block.attn.attend.qkv.bias is None and block.attn.attend.attn_drop_rate == 0.2
    assert block.ffn.drop.p == block.attn.attend.proj_drop.p == model.pos_drop.p == 0.1
    assert len(model(images(channels=5))) == 4
    wider = SViT(super_token_sizes=(8, 4, (2, 1), 1))
    assert [stage.blocks[0].attn.super_token_size for stage in wider.stages] == [
        (8, 8),
        (4, 4),
        (2, 1),
        (1, 1),
    ]


def test_layer_scale_keeps_the_dtype_of_mixed_precision():
    model = make(arch=small_arch(layer_scale=(0.5, 0.5, 0.5, 0.5)))
    with torch.autocast('cpu', torch.bfloat16):
        outputs = model(images())
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    torch.stack([output.float().square().mean() for output in outputs]).sum().backward()
    assert all(block.gamma_2.grad.dtype == torch.float32 for block in model.stages[1].blocks)


def test_super_tokens_larger_than_a_map_are_warned_of_once(monkeypatch):
    said = []
    monkeypatch.setattr('mmsvit.models.svit.print_log', lambda text, **_: said.append(text))
    model = make(arch=small_arch(super_token_sizes=(16, 8, 1, 1))).eval()
    model(images(64, 64))
    assert not said  # 16x16 tokens in stage 1
    for _ in range(2):
        model(images(64, 40))
    (text,) = said
    assert '16x16 tokens are larger than the map of stage 1, 16x10 tokens' in text


@pytest.mark.parametrize(
    ('key', 'value'), [('super_token_sizes', (4, 2, 1, 1)), ('num_iters', (3,) * 4)]
)
def test_settings_given_twice_are_refused(key, value):
    with pytest.raises(ValueError, match=rf'{key} is set twice.*{key}=None'):
        SViT({**small_arch(), key: (1, 1, 2, 2)}, **{key: value})
    SViT({**small_arch(), key: value}, **{key: value})


def test_layer_depth_covers_every_parameter():
    model = make(out_norm_cfg=dict(type='LN'))
    depth = {
        name: model.get_layer_depth(f'backbone.{name}', 'backbone.')
        for name, _ in model.named_parameters()
    }
    assert {total for _, total in depth.values()} == {7}
    assert depth['stem.0.weight'][0] == 0
    assert depth['stages.0.blocks.0.pos_embed.weight'][0] == 1
    assert depth['stages.0.downsample.0.weight'][0] == 1
    assert depth['stages.1.blocks.1.ffn.fc1.weight'][0] == 3
    assert depth['stages.3.blocks.0.norm2.bias'][0] == 5
    assert depth['out_norms.3.weight'][0] == 6
    assert model.get_layer_depth('neck.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(arch='tiny'), "'tiny' is unknown"),
        (dict(arch=3), 'name or a dict'),
        (dict(arch={**small_arch(), 'width': 1}), r"unknown \['width'\]"),
        (dict(arch=dict(embed_dims=(8, 8, 8, 8))), "missing .*'depths'"),
        (dict(arch=small_arch(depths=(1, 1, 1))), 'depths needs 4 entries'),
        (dict(arch=small_arch(depths=(1, 0, 1, 1))), 'depths must be whole numbers'),
        (dict(arch=small_arch(num_iters=(1, 1.5, 1, 1))), 'num_iters must be whole'),
        (dict(arch=small_arch(num_heads=(3, 2, 2, 3))), '3 does not divide 8'),
        (dict(arch=small_arch(embed_dims=(9, 12, 16, 24), num_heads=(3, 2, 2, 3))), 'even'),
        (dict(arch=small_arch(layer_scale=(None, True, None, None))), 'layer_scale holds'),
        (dict(arch='small', super_token_sizes=(8, 4, 0, 1)), 'super_token_sizes must be'),
        (
            dict(arch='small', super_token_sizes=(8, 4, (1, 2, 3), 1)),
            'super_token_sizes must be',
        ),
        (dict(super_token_sizes=8), 'super_token_sizes needs 4 entries'),
        (dict(out_indices=(0, 4)), 'out_indices must be'),
        (dict(out_indices=()), 'out_indices must be'),
        (dict(out_indices=(1, 0)), 'out_indices must be'),
        (dict(frozen_stages=5), 'frozen_stages must be'),
        (dict(norm_cfg=dict(type='GN')), 'norm_cfg needs'),
        (dict(out_norm_cfg=dict(type='GN')), 'out_norm_cfg must be'),
        (dict(in_channels=0), 'in_channels must be'),
        (dict(arch=small_arch(layer_scale=(None, float('nan'), None, None))), 'layer_scale holds'),
        (dict(mlp_ratio=0.05), 'mlp_ratio must make'),
        (dict(mlp_ratio='4'), 'mlp_ratio must make'),
        (dict(attn_drop_rate=None), 'attn_drop_rate must be'),
        (dict(drop_path_rate=1.0), 'drop_path_rate must be'),
        (dict(drop_rate=-0.1), 'drop_rate must be'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**arguments)


def test_misspelt_argument_is_not_swallowed():
    with pytest.raises(TypeError, match='drop_path'):
        make(drop_path=0.1)


@pytest.mark.parametrize(
    ('batch', 'message'),
    [
        (torch.zeros(1, 4, 64, 64), r'\(N, 3, H, W\), found \(1, 4, 64, 64\)'),
        (torch.zeros(3, 64, 64), r'\(N, 3, H, W\)'),
        (torch.zeros(1, 3, 31, 64), '32x32 pixels or more, found 31x64'),
    ],
)
def test_bad_images_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        make()(batch)


@pytest.mark.parametrize(
    ('switch', 'absent'),
    [
        (dict(pos_embed=False), 'pos_embed'),
        (dict(conv_ffn=False), 'ffn.dwconv'),
        (dict(token_sampling='average_pool'), None),
        (dict(arch=small_arch(num_iters=(3, 1, 1, 1))), None),
        (dict(arch=small_arch(super_token_sizes=(1, 1, 1, 1))), None),
    ],
)
def test_ablations(switch, absent):
    plain, ablated = make(), make(**switch)
    names = set(plain.state_dict())
    expected = {name for name in names if absent is None or absent not in name}
    assert set(ablated.state_dict()) == expected
    assert absent is None or expected < names
    plain.load_state_dict(ablated.state_dict(), strict=False)
    plain, ablated = plain.eval(), ablated.eval()
    for one, other in zip(ablated(images(47, 70)), plain(images(47, 70))):
        assert one.shape == other.shape and one.isfinite().all()
        assert not torch.equal(one, other)


def test_average_pooling_is_attention_among_the_means_of_cells():
    attention = make(token_sampling='average_pool').stages[1].blocks[0].attn  # cells of 2x3
    x = torch.randn(1, 5, 7, 12, generator=torch.Generator().manual_seed(0))
    means = torch.stack(
        [
            torch.stack([x[0, i : i + 2, j : j + 3].mean(dim=(0, 1)) for j in (0, 3, 6)])
            for i in (0, 2, 4)
        ]
    )
    attended = attention.attend(means[None])
    output = attention(x)
    for i, j in ((0, 0), (3, 5), (4, 6)):
        torch.testing.assert_close(output[0, i, j], attended[0, i // 2, j // 3])


def test_unknown_token_sampling_is_refused():
    names = re.escape(f"one of {list(ATTENTIONS)}, found 'max'")
    with pytest.raises(ValueError, match=names):
        make(token_sampling='max')


def test_hooks_see_what_the_layers_return():
    model = make().eval()
    block = model.stages[0].blocks[0]
    layers = [block.pos_embed, block.attn, block.ffn, block.ffn.fc1, block.ffn.dwconv]
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(images())
    without_gradient = [output.clone() for output in seen]
    seen.clear()
    model(images())
    assert len(seen) == len(layers)
    for one, other in zip(seen, without_gradient):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_position_embedding_put_in_the_place_of_ours_is_used():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make().eval()
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 8, 8, 8)
    plain = block(x)
    block.pos_embed.__class__ = Doubled
    assert not torch.allclose(block(x), plain)


def test_shapes_without_computing():
    with torch.device('meta'):
        outputs = make()(torch.empty(1, 3, 61, 90))
    assert [output.shape[2:] for output in outputs] == [(16, 23), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_outputs_are_turned_piece_by_piece(dtype, monkeypatch):
    monkeypatch.setattr(cpu_cache, 'PIECE_BYTES', 8 * 3 * 4 * 16)
    x = torch.randn(2, 7, 11, 3).to(dtype)
    found = channels_first(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.permute(0, 3, 1, 2))


@pytest.mark.parametrize('training', [False, True])
def test_compiles_in_one_graph_for_all_sizes(training):
    model = make(drop_path_rate=0.1 if training else 0.0).train(training)
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    for size in ((64, 64), (97, 131)):
        torch.manual_seed(0)
        expected = model(images(*size))
        torch.manual_seed(0)
        found = compiled(images(*size))
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if training:
        sum(output.mean() for output in found).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_features_of_a_checkpoint(tmp_path, capfd):
    model = make(out_norm_cfg=None)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    loaded = SViT.from_pretrained(small_arch(), tmp_path / 'weights.pth', out_indices=(1, 3))
    assert not loaded.training
    assert loaded.feature_info == tuple(zip(small_arch()['embed_dims'][1::2], (8, 32)))
    x = torch.randn(1, 3, 64, 96)
    for feature, (channels, stride), expected in zip(
        loaded(x), loaded.feature_info, model.eval()(x)[1::2]
    ):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)
        assert torch.equal(feature, expected)
    with pytest.raises(FileNotFoundError):
        SViT.from_pretrained(small_arch(), tmp_path / 'none.pth')


def test_initialisation_prints_no_line_for_each_weight(capfd):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()
    out, err = capfd.readouterr()
    assert not (out + err).strip()
    assert model.is_init
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
def test_training_compiled_for_all_sizes_needs_a_bug_of_pytorch_mended():
    """If the first part fails, PyTorch has mended it: docs/training.md need not tell of it any more."""
    report = ROOT / 'docs' / 'inductor_dynamic_sizes.py'
    result = run_python(report, check=False)
    assert result.returncode == 1 and 'cannot determine truth value of Relational' in result.stderr
    assert run_python(report, '--mend').stdout == 'compiled\n'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_training_step_at_one_size_is_one_graph_forward_and_one_backward(dtype):
    """What a compiler, or a CUDA graph, replays for UperNet's crops: nothing is left to Python."""
    graphs = []

    def capture(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    net = make(drop_path_rate=0.2)
    compiled = torch.compile(
        net, backend=aot_autograd(fw_compiler=capture), fullgraph=True, dynamic=False
    )
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = compiled(torch.randn(2, 3, 64, 64))
        sum(y.float().square().mean() for y in outputs).backward()
    assert len(graphs) == 2
    assert all(parameter.grad is not None for parameter in net.parameters())
    sizes = [node.meta['val'].shape for node in graphs[0].graph.nodes if 'val' in node.meta
             and isinstance(node.meta['val'], torch.Tensor)]  # fmt: skip
    assert all(isinstance(size, int) for shape in sizes for size in shape)
