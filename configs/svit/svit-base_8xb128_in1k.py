"""SViT-B on ImageNet, 300 epochs. Paper: top-1 84.8."""

_base_ = './svit-small_8xb128_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.4))
