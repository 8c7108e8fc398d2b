_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        # Two images per GPU are too few for batch statistics: keep the pretrained ones.
        # Training from scratch has none to keep and needs norm_eval=False.
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        # The published classifier has no norm after a stage. Like Swin and ConvNeXt in
        # detectors, we add one for each output (our choice).
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
    # Without mixed precision these are MMDetection's; with it, boxes stay exact.
    rpn_head=dict(type='mmsvit.Float32RPNHead'),
    roi_head=dict(
        bbox_roi_extractor=dict(type='mmsvit.Float32RoIExtractor'),
        mask_roi_extractor=dict(type='mmsvit.Float32RoIExtractor'),
    ),
)
