_base_ = [
    '../_base_/models/retinanet_svit-s_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_adamw_1x.py',
    '../_base_/coco_runtime.py',
]
# As PVT, BiFormer and RMT with RetinaNet.
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
