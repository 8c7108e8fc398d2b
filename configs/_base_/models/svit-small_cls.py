"""SViT-S with the classifier that the authors published, and their losses."""

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmsvit.SViT', arch='small', out_indices=(3,), drop_path_rate=0.1),
    # Plain BN: at 64 or 128 images on a GPU its statistics need no other GPU's.
    neck=dict(type='mmsvit.ProjectionPooling', in_channels=512, out_channels=1024),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=1024,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
