"""SViT-L on ImageNet at 384 pixels, 30 epochs from its weights at 224. Paper: top-1 86.4."""

_base_ = './svit-small_8xb64_in1k-384px.py'

model = dict(backbone=dict(arch='large'), neck=dict(in_channels=640))
load_from = 'checkpoints/stvit-large-224.pth'
