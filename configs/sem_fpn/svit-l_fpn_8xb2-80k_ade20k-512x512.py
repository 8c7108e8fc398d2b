_base_ = './svit-s_fpn_8xb2-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='checkpoints/stvit-large-224.pth'),
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
