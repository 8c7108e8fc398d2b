"""Layer-wise learning rate decay in models that are not ours."""

from __future__ import annotations

import pytest
from conftest import small_arch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmsvit import SViT, config_path

OPTIM_WRAPPER = dict(
    type='OptimWrapper',
    constructor='mmsvit.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        layer_decay_rate=0.5, norm_decay_mult=0.0, custom_keys={'head': dict(lr_mult=3.0)}
    ),
)


@pytest.mark.parametrize('name', ['svit_maskrcnn_coco', 'svit_upernet_ade20k'])
def test_rates_fall_towards_the_stem(name):
    cfg = Config.fromfile(config_path(f'{name}.py'))
    cfg.model.backbone.update(arch='base', init_cfg=None, norm_cfg=dict(type='BN'))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, OPTIM_WRAPPER).optimizer
    groups = {id(group['params'][0]): group for group in optimizer.param_groups}
    assert len(groups) == sum(p.requires_grad for p in model.parameters())

    def group(name: str) -> dict:
        return groups[id(model.get_parameter(name))]

    blocks = 4 + 6 + 14 + 6
    for parameter, depth in (
        ('backbone.stem.0.weight', 0),
        ('backbone.stages.0.blocks.0.ffn.fc1.weight', 1),
        ('backbone.stages.0.downsample.0.weight', 4),
        ('backbone.stages.1.blocks.0.norm1.weight', 5),
        ('backbone.stages.3.blocks.5.gamma_1', blocks),
        ('backbone.out_norms.3.weight', blocks + 1),
    ):
        assert group(parameter)['lr'] == pytest.approx(1e-3 * 0.5 ** (blocks + 1 - depth))
    head = next(n for n, _ in model.named_parameters() if 'head' in n and n.endswith('weight'))
    assert group(head)['lr'] == pytest.approx(3e-3)
    assert group('backbone.stages.1.blocks.0.norm1.weight')['weight_decay'] == 0


def test_bad_settings_are_refused():
    model = SViT(small_arch())
    for rate in (None, 0.0, 1.5):
        bad = {**OPTIM_WRAPPER, 'paramwise_cfg': dict(layer_decay_rate=rate)}
        with pytest.raises(ValueError, match=r'layer_decay_rate must be a number in \(0, 1\]'):
            build_optim_wrapper(model, bad)
    with pytest.raises(ValueError, match=r'one mmsvit\.SViT, found 0 in Stem'):
        build_optim_wrapper(model.stem, OPTIM_WRAPPER)
