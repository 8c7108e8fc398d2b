_base_ = [
    '../_base_/models/fpn_svit-s.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_adamw_80k.py',
    '../_base_/ade20k_runtime.py',
]
