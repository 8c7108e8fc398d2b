"""UperNet with SViT-S on images and label maps of your own: the whole of a project.

    python tools/train.py upernet_own_data.py

mmsvit's tool, or MMSegmentation's own.
"""

_base_ = [__import__('mmsvit').config_path('svit_upernet_ade20k.py')]

data_root = 'data/shapes/'
metainfo = dict(
    classes=('background', 'circle', 'square', 'triangle', 'star', 'ring'),
    palette=[
        (0, 0, 0),
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
    ],
)
num_classes = len(metainfo['classes'])

model = dict(
    decode_head=dict(num_classes=num_classes), auxiliary_head=dict(num_classes=num_classes)
)
# ADE20K's label 0 means nothing; here it is the first class.
train_dataloader = dict(
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='train', seg_map_path='annotations/semantic_train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs'),
        ],
    )
)
val_dataloader = dict(
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='val', seg_map_path='annotations/semantic_val'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            # Of other sizes, replace tta_pipeline as well, which has multiples of this one.
            dict(type='Resize', scale=(2048, 512), keep_ratio=True),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    )
)
test_dataloader = val_dataloader
