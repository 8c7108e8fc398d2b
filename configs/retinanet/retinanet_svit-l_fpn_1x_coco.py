_base_ = './retinanet_svit-s_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='checkpoints/stvit-large-224.pth'),
    ),
    neck=dict(in_channels=[192, 448, 640]),
)
