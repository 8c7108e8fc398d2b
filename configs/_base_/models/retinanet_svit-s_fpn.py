_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        # The pyramid starts at stride 8. An output that nothing uses would leave its norm
        # without a gradient, which a distributed run does not accept.
        out_indices=(1, 2, 3),
        # As for Mask R-CNN: pretrained batch statistics, a norm for each output.
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    neck=dict(in_channels=[128, 320, 512], start_level=0),
    # Without mixed precision this is MMDetection's; with it, boxes stay exact.
    bbox_head=dict(type='mmsvit.Float32RetinaHead'),
)
