"""SViT-L Mask R-CNN with weights, gradients and optimizer state spread over the GPUs (FSDP).

    bash tools/dist_train.sh configs/mask_rcnn/mask-rcnn_svit-l_fpn_fsdp-1x_coco.py 8

For models that do not fit otherwise; SViT-L does, and this shows how. bfloat16, which needs no
loss scaling.
"""

_base_ = './mask-rcnn_svit-l_fpn_1x_coco.py'

runner_type = 'FlexibleRunner'
strategy = dict(
    type='FSDPStrategy',
    state_dict_cfg='full',  # One file, which every tool reads.
    model_wrapper=dict(
        type='MMFullyShardedDataParallel',
        use_orig_params=True,  # Without it there is no weight decay of its own for norms.
        auto_wrap_policy=dict(
            type='torch.distributed.fsdp.wrap.size_based_auto_wrap_policy',
            min_num_params=1_000_000,
        ),
    ),
)
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False))
