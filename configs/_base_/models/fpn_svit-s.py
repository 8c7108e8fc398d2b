_base_ = [__import__('mmsvit').config_path('mmseg::_base_/models/fpn_r50.py')]

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        # As for UperNet: statistics of all GPUs, a norm for each output.
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
    decode_head=dict(num_classes=150),
)
