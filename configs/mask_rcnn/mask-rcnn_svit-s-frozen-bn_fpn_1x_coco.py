_base_ = './mask-rcnn_svit-s_fpn_1x_coco.py'

# Batch norms with their weights frozen, too, as the authors' visualization code can.
model = dict(backbone=dict(norm_cfg=dict(type='BN', requires_grad=False)))
