"""SViT-S on ImageNet, 300 epochs. Paper: top-1 83.6."""

_base_ = [
    '../_base_/models/svit-small_cls.py',
    '../_base_/datasets/imagenet_svit_224.py',
    '../_base_/schedules/imagenet_adamw_300e.py',
    '../_base_/imagenet_runtime.py',
]
