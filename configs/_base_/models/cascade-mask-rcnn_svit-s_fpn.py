_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        # As for Mask R-CNN: pretrained batch statistics, a norm for each output.
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
    # Without mixed precision these are MMDetection's; with it, boxes stay exact.
    rpn_head=dict(type='mmsvit.Float32RPNHead'),
    roi_head=dict(
        bbox_roi_extractor=dict(type='mmsvit.Float32RoIExtractor'),
        mask_roi_extractor=dict(type='mmsvit.Float32RoIExtractor'),
        # Four convolutions and one linear layer, as the published FLOPs need, with GIoU on
        # the decoded boxes, as Swin's Cascade has it. These start from scratch, hence SyncBN.
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=target_stds,
                ),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for target_stds in (
                [0.1, 0.1, 0.2, 0.2],
                [0.05, 0.05, 0.1, 0.1],
                [0.033, 0.033, 0.067, 0.067],
            )
        ],
    ),
)
