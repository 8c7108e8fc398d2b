"""The authors' 300 epochs: AdamW, 5 epochs of warm-up, then a cosine.

The learning rate is for 1024 images a step; --auto-scale-lr fits it to others. Norms and biases
have no weight decay; layer scale has, as in the authors' script (its parameters are not flat there).
"""

import math

_base_ = [
    __import__('mmsvit').config_path('mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py')
]

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'gamma_': dict(decay_mult=1.0)}))

# The authors' schedule steps after each epoch: with t = max(epoch - 1, 0), it is 1e-6 at t = 0,
# rises by a fifth of the way to 1e-3 at each t up to 4, and from t = 5 on is that of a cosine
# which began at t = 0.
_lr, _eta_min, _warmup = 1e-3, 1e-5, 5
_cosine = _eta_min + (_lr - _eta_min) * (1 + math.cos(math.pi * (_warmup - 1) / 300)) / 2
param_scheduler = [
    dict(type='ConstantLR', factor=1e-3, begin=0, end=2),  # epoch 0
    dict(type='LinearLR', start_factor=1e-3, begin=1, end=_warmup + 2),
    # MMEngine's cosine multiplies the previous value, which must be that of t = 4.
    dict(type='MultiStepLR', milestones=[_warmup + 1], gamma=_cosine / _lr),
    dict(
        type='CosineAnnealingLR',
        begin=_warmup + 1,
        end=300,
        T_max=300,
        eta_min=_eta_min,
        last_step=_warmup - 1,
    ),
]
