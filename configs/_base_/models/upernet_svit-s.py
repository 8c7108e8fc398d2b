_base_ = [__import__('mmsvit').config_path('mmseg::_base_/models/upernet_swin.py')]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        # Statistics of all the 16 crops of a step. The heads need SyncBN anyway, and the
        # crops differ from what the pretrained statistics were taken on.
        norm_cfg=dict(type='SyncBN'),
        # The published classifier has no norm after a stage. Like Swin and ConvNeXt in
        # segmentors, we add one for each output (our choice).
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150),
)
