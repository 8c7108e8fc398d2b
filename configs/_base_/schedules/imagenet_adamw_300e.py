"""The authors' 300 epochs: AdamW, 5 epochs of warm-up, then a cosine.

The learning rate is for 1024 images a step; --auto-scale-lr fits it to others. Norms, biases
and layer scale have no weight decay.
"""

_base_ = [
    __import__('mmsvit').config_path('mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py')
]

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-5,
        by_epoch=True,
        begin=5,
        end=300,
        convert_to_iter_based=True,
    ),
]
