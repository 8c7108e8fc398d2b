"""ImageNet at 224 pixels, augmented as the authors train: Swin's way, with repeated augmentation.

For evaluation the short side becomes 256 pixels and the centre is cropped, as the authors do.
"""

_base_ = [__import__('mmsvit').config_path('mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py')]

# The last three are what mmpretrain's own tool sets and other tools do not.
train_dataloader = dict(
    batch_size=128,
    sampler=dict(type='RepeatAugSampler'),  # each epoch three versions of a third of the images
    drop_last=True,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
)
val_dataloader = dict(
    batch_size=128,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
)
test_dataloader = val_dataloader
