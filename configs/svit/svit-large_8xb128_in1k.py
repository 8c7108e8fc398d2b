"""SViT-L on ImageNet, 300 epochs. Paper: top-1 85.3.

As the authors: a drop path of 0.4 for 260 epochs, and 0.6 for the last 40.
"""

_base_ = './svit-small_8xb128_in1k.py'

model = dict(backbone=dict(arch='large', drop_path_rate=0.4), neck=dict(in_channels=640))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmsvit.DropPathHook', schedule=[(260, 0.6)]),
]
