"""SViT-S Mask R-CNN on COCO, 1x. Paper: box AP 47.6, mask AP 43.1."""

_base_ = './mask_rcnn/mask-rcnn_svit-s_fpn_1x_coco.py'
