_base_ = './mask-rcnn_svit-s_fpn_ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='checkpoints/stvit-base-224.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
