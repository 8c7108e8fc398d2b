"""Ablation: plain global attention among all tokens in every stage."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(super_token_sizes=(1, 1, 1, 1)))
