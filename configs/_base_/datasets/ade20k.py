_base_ = [__import__('mmsvit').config_path('mmseg::_base_/datasets/ade20k.py')]

train_dataloader = dict(batch_size=2)  # on each of 8 GPUs

# Multi-scale testing as the field does it, in multiples of the size of single-scale testing.
# (MMSegmentation's own multiplies the size that the image happens to have.)
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
                for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [
                dict(type='RandomFlip', prob=0.0, direction='horizontal'),
                dict(type='RandomFlip', prob=1.0, direction='horizontal'),
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
