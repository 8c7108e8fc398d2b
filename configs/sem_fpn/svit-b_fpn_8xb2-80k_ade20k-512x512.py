_base_ = './svit-s_fpn_8xb2-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint='checkpoints/stvit-base-224.pth'),
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
