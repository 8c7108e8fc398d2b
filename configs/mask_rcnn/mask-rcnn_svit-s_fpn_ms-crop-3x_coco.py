_base_ = [
    '../_base_/models/mask-rcnn_svit-s_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_adamw_3x.py',
    '../_base_/coco_runtime.py',
]
