"""Ablation: no convolutional position embedding."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(pos_embed=False))
