_base_ = 'mmdet::_base_/default_runtime.py'

# Not for the backbone, which is found by its type: inferencers read a checkpoint before they
# build the model, and with OpenMMLab's MMEngine on torch 2.6 or later cannot without this.
custom_imports = dict(imports=['mmsvit.checkpoint'], allow_failed_imports=False)
custom_hooks = [dict(type='mmsvit.CheckDatasetHook'), dict(type='NumClassCheckHook')]
default_hooks = dict(
    # docs/reliability.md: what keeps a run from being lost.
    checkpoint=dict(type='mmsvit.SafeCheckpointHook', max_keep_ckpts=2, save_best='coco/bbox_mAP'),
    exact_resume=dict(type='mmsvit.ExactResumeHook'),
    stop_signal=dict(type='mmsvit.StopSignalHook'),
    non_finite=dict(type='mmsvit.NonFiniteHook'),
    bad_samples=dict(type='mmsvit.BadSamplesHook'),
    run_record=dict(type='mmsvit.RunRecordHook'),
    ops_backend=dict(type='mmsvit.OpsBackendHook'),
    log_errors=dict(type='mmsvit.LogErrorsHook'),
)
