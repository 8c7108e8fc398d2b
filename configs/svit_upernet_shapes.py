"""UperNet with a small SViT on generated shapes: the example for a segmentation data set of your own.

    python tools/make_shapes_dataset.py data/shapes
    python tools/train.py configs/svit_upernet_shapes.py

Everything is inherited from the ADE20K config. What changes is what changes for any data
set: paths and classes, the size of the model, the schedule.
"""

_base_ = './svit_upernet_ade20k.py'

# --- paths and classes: images and label maps of the same names in two folders -------------
dataset_type = 'BaseSegDataset'
data_root = 'data/shapes/'
metainfo = dict(
    # In the order of the label maps' values, which begin with 0.
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

image_size = (160, 160)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# Multiples of the size that test_pipeline has, which leaves images as they are.
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='train', seg_map_path='annotations/semantic_train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        data_prefix=dict(img_path='val', seg_map_path='annotations/semantic_val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

# --- size of the model: small enough for two CPU cores, from scratch ----------------------
norm_cfg = dict(type='BN')
# Five pixels out of six are background, which would be learned first and alone.
loss_decode = dict(class_weight=[0.2, 1.0, 1.0, 1.0, 1.0, 1.0])
model = dict(
    data_preprocessor=dict(size=image_size),
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
        super_token_sizes=None,  # those of arch: the images are small
        drop_path_rate=0.0,
        norm_cfg=norm_cfg,
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=[32, 64, 96, 128],
        channels=64,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        loss_decode=loss_decode,
    ),
    auxiliary_head=dict(
        in_channels=96,
        channels=32,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        loss_decode=loss_decode,
    ),
)

# --- schedule -----------------------------------------------------------------------------
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=200)
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=20, end=max_iters),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=200))
auto_scale_lr = dict(base_batch_size=4)
randomness = dict(seed=0)
