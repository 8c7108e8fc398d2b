"""Mask2Former, a query-based segmentor: the backbone is not tied to UperNet. No published result."""

_base_ = [
    __import__('mmsvit').config_path(
        'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
    ),
    '../_base_/ade20k_tta.py',
]

tta_pipeline = _base_.multi_scale_pipeline

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmsvit.SViT',
        arch='small',
        # Not the classifier's 8 4 1 1: docs/recipes.md has the evidence.
        super_token_sizes=(16, 8, 1, 1),
        drop_path_rate=0.15,
        norm_cfg=dict(type='SyncBN'),
        out_norm_cfg=dict(type='LN'),
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/stvit-small-224.pth'),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
)
# Mask2Former's tenth of the learning rate for the backbone, and no decay of norms, biases and
# embeddings.
optim_wrapper = dict(
    constructor='mmsvit.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay_rate=1.0,
        backbone_lr_mult=0.1,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            name: dict(decay_mult=0.0)
            for name in ('gamma_', 'query_embed', 'query_feat', 'level_embed')
        },
    ),
)

# The head's parts are MMDetection's.
custom_imports = dict(imports=['mmsvit.checkpoint', 'mmdet.models'], allow_failed_imports=False)
custom_hooks = [dict(type='mmsvit.CheckDatasetHook')]
default_hooks = dict(
    checkpoint=dict(type='mmsvit.SafeCheckpointHook'),
    # docs/reliability.md: what keeps a run from being lost.
    exact_resume=dict(type='mmsvit.ExactResumeHook'),
    stop_signal=dict(type='mmsvit.StopSignalHook'),
    non_finite=dict(type='mmsvit.NonFiniteHook'),
    bad_samples=dict(type='mmsvit.BadSamplesHook'),
    run_record=dict(type='mmsvit.RunRecordHook'),
    ops_backend=dict(type='mmsvit.OpsBackendHook'),
    log_errors=dict(type='mmsvit.LogErrorsHook'),
)
