"""Ablation: attention among the means of cells, without association."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(token_sampling='average_pool'))
