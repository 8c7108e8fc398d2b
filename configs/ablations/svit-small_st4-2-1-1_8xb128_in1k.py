"""Ablation: smaller super tokens, four times as many."""

_base_ = '../svit/svit-small_8xb128_in1k.py'

model = dict(backbone=dict(super_token_sizes=(4, 2, 1, 1)))
