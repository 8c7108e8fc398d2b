"""SViT-S Mask R-CNN on COCO, 1x. Paper: box AP 47.6, mask AP 43.1.

The authors published no code or settings for detection: the schedule follows what
the field trains such backbones with (Swin's Mask R-CNN), and is our choice.
"""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
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
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'gamma_': dict(decay_mult=0.0)},
    ),
)

# The learning rate is for 8 GPUs with 2 images each; --auto-scale-lr fits it to others.
auto_scale_lr = dict(base_batch_size=16)

# Not for the backbone, which is found by its type: inferencers read a checkpoint before they
# build the model, and with OpenMMLab's MMEngine on torch 2.6 or later cannot without this.
custom_imports = dict(imports=['mmsvit.checkpoint'], allow_failed_imports=False)
custom_hooks = [dict(type='mmsvit.CheckDatasetHook'), dict(type='NumClassCheckHook')]
