"""ImageNet at 384 pixels, augmented as at 224.

For evaluation the short side becomes 384 pixels, without a margin, and the centre is cropped,
as the authors do. (Swin and ConvNeXt squeeze the whole image into the square.)
"""

_base_ = './imagenet_svit_224.py'

train_pipeline = [
    _base_.train_pipeline[0],
    dict(type='RandomResizedCrop', scale=384, backend='pillow', interpolation='bicubic'),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=384, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
