_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

# The authors published no settings for detection: these are Swin's values, with
# no decay of biases.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'gamma_': dict(decay_mult=0.0)},
    ),
)

# The learning rate is for 8 GPUs with 2 images each; --auto-scale-lr fits it to others.
auto_scale_lr = dict(base_batch_size=16)
