_base_ = [
    '../_base_/models/upernet_svit-s.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_adamw_160k.py',
    '../_base_/ade20k_runtime.py',
]
