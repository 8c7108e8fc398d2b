"""A small SViT classifier on generated shapes: the example for folders of images of your own.

    python tools/make_shapes_dataset.py data/shapes_classification --task classification
    python tools/train.py configs/svit_classifier_shapes.py

Everything is inherited from the ImageNet config. What changes is what changes for any data
set: paths and classes, the size of the model, the schedule.
"""

_base_ = './svit/svit-small_8xb128_in1k.py'

# --- paths and classes: a folder of images for each class, in train/ and in val/ -----------
data_root = 'data/shapes_classification/'
# In alphabetical order, by which mmpretrain numbers the folders.
metainfo = dict(classes=('circle', 'ring', 'square', 'star', 'triangle'))
num_classes = len(metainfo['classes'])

image_size = 64
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler'),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
data_preprocessor = dict(num_classes=num_classes)

# --- size of the model: small enough for two CPU cores, from scratch ----------------------
width = 256
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=(32, 64, 96, 128),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 3, 4),
            super_token_sizes=(8, 4, 1, 1),
            num_iters=(1, 1, 1, 1),
            layer_scale=(None, None, None, None),
        ),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=128, out_channels=width),
    head=dict(in_channels=width, num_classes=num_classes),
    train_cfg=None,  # neither Mixup nor CutMix
)

# --- schedule -----------------------------------------------------------------------------
max_epochs = 8
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        eta_min_ratio=0.02,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10))
auto_scale_lr = dict(base_batch_size=32)
randomness = dict(seed=0)
