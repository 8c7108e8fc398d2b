_base_ = './mask-rcnn_svit-s_fpn_1x_coco.py'

# Batch norms that train, with the statistics of all GPUs, as RMT has them.
model = dict(backbone=dict(norm_cfg=dict(type='SyncBN'), norm_eval=False))
