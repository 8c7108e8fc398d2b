"""What is found in models of MMDetection and MMSegmentation, and what does not fit together."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from mmsvit import config_path
from mmsvit.models.mm_models import build_model, check_channels


def built(config: str, **changes: object) -> torch.nn.Module:
    """The model of a config, without memory for its weights."""
    cfg = Config.fromfile(config_path(config))
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict(changes)
    with torch.device('meta'):
        return build_model(cfg)


@pytest.mark.parametrize(
    'config',
    [
        'svit_maskrcnn_shapes.py',
        'svit_upernet_shapes.py',
        'svit_classifier_shapes.py',
        'svit_cascade_maskrcnn_coco.py',
        'retinanet/retinanet_svit-s_fpn_1x_coco.py',
        'camvid/svit-s_fpn_cpu_camvid.py',
    ],
)
def test_channels_of_our_configs_fit(config):
    check_channels(built(config))


@pytest.mark.parametrize(
    ('config', 'key', 'value', 'says'),
    [
        (
            'svit_maskrcnn_shapes.py',
            'model.neck.in_channels',
            [64, 128, 320, 512],
            'model.neck.in_c',
        ),
        ('svit_maskrcnn_shapes.py', 'model.neck.in_channels', [32, 64, 96], r'\[32, 64, 96, 128\]'),
        ('svit_maskrcnn_shapes.py', 'model.backbone.out_indices', [1, 2, 3], r'\[64, 96, 128\]'),
        (
            'svit_upernet_shapes.py',
            'model.decode_head.in_channels',
            [32, 64, 96, 64],
            'decode_head',
        ),
        ('svit_upernet_shapes.py', 'model.auxiliary_head.in_channels', 64, r'auxiliary.*\[96\]'),
        ('svit_upernet_shapes.py', 'model.auxiliary_head.in_index', 4, 'has 4 outputs'),
    ],
)
def test_channels_that_do_not_fit_are_named(config, key, value, says):
    model = built(config, **{key: value})
    with pytest.raises(ValueError, match=says):
        check_channels(model)


def test_a_map_of_several_outputs_has_the_sum_of_their_channels():
    head = dict(
        type='mmseg.FCNHead',
        in_channels=[32, 64, 96, 128],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=16,
        num_classes=6,
    )
    changes = {'model.decode_head': dict(_delete_=True, **head)}
    check_channels(built('svit_upernet_shapes.py', **changes))
    head['in_channels'] = [32, 64, 96, 96]
    changes = {'model.decode_head': dict(_delete_=True, **head)}
    with pytest.raises(ValueError, match=r'decode_head.in_channels is \[288\].*\[320\]'):
        check_channels(built('svit_upernet_shapes.py', **changes))
