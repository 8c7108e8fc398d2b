_base_ = [
    '../_base_/models/mask-rcnn_svit-s_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_adamw_1x.py',
    '../_base_/coco_runtime.py',
]
