"""SViT-B on ImageNet at 384 pixels, 30 epochs from its weights at 224. Paper: top-1 86.0."""

_base_ = './svit-small_8xb64_in1k-384px.py'

model = dict(backbone=dict(arch='base'))
load_from = 'checkpoints/stvit-base-224.pth'
