"""Ablation: two iterations of super token sampling."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(num_iters=(2, 2, 1, 1)))
