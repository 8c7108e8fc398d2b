"""SViT-S on ImageNet at 384 pixels, 30 epochs from its weights at 224. Paper: top-1 85.0."""

_base_ = [
    '../_base_/models/svit-small_cls.py',
    '../_base_/datasets/imagenet_svit_384.py',
    '../_base_/schedules/imagenet_adamw_30e.py',
    '../_base_/imagenet_runtime.py',
]

# The authors fine-tune in evaluation mode: batch statistics as they are, no drop path.
model = dict(backbone=dict(drop_path_rate=0.0, norm_eval=True), neck=dict(norm_eval=True))
# The authors' file, or a checkpoint of svit-small_8xb128_in1k.py.
load_from = 'checkpoints/stvit-small-224.pth'
