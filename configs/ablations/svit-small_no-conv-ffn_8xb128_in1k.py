"""Ablation: no convolution in the FFN."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(conv_ffn=False))
