# The authors published no settings for segmentation: these are Swin's values for
# UperNet, with no decay of biases.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'gamma_': dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
# The learning rate is for 8 GPUs with 2 images each; --auto-scale-lr fits it to others.
auto_scale_lr = dict(enable=False, base_batch_size=16)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='mmsvit.SafeCheckpointHook',
        by_epoch=False,
        interval=16000,
        max_keep_ckpts=2,
        save_best='mIoU',
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    # docs/reliability.md: what keeps a run from being lost.
    exact_resume=dict(type='mmsvit.ExactResumeHook'),
    stop_signal=dict(type='mmsvit.StopSignalHook'),
    non_finite=dict(type='mmsvit.NonFiniteHook'),
    bad_samples=dict(type='mmsvit.BadSamplesHook'),
    run_record=dict(type='mmsvit.RunRecordHook'),
    ops_backend=dict(type='mmsvit.OpsBackendHook'),
    log_errors=dict(type='mmsvit.LogErrorsHook'),
)
