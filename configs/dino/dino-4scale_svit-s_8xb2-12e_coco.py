"""DINO, a query-based detector: the backbone is not tied to feature pyramids. No published result."""

_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py']

model = dict(
    type='mmsvit.Float32DINO',  # in mixed precision, too
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    neck=dict(in_channels=[128, 320, 512]),
)
# DINO's tenth of the learning rate for the backbone, and no decay of norms and biases.
optim_wrapper = dict(
    constructor='mmsvit.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay_rate=1.0,
        backbone_lr_mult=0.1,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={'gamma_': dict(decay_mult=0.0)},
    ),
)

custom_imports = dict(imports=['mmsvit.checkpoint'], allow_failed_imports=False)
custom_hooks = [dict(type='mmsvit.CheckDatasetHook'), dict(type='NumClassCheckHook')]
default_hooks = dict(
    checkpoint=dict(type='mmsvit.SafeCheckpointHook', max_keep_ckpts=2, save_best='coco/bbox_mAP'),
    # docs/reliability.md: what keeps a run from being lost.
    exact_resume=dict(type='mmsvit.ExactResumeHook'),
    stop_signal=dict(type='mmsvit.StopSignalHook'),
    non_finite=dict(type='mmsvit.NonFiniteHook'),
    bad_samples=dict(type='mmsvit.BadSamplesHook'),
    run_record=dict(type='mmsvit.RunRecordHook'),
    ops_backend=dict(type='mmsvit.OpsBackendHook'),
    log_errors=dict(type='mmsvit.LogErrorsHook'),
)
