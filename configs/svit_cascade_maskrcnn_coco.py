"""SViT-B Cascade Mask R-CNN on COCO, 3x multi-scale. Paper: box AP 53.9, mask AP 46.8."""

_base_ = './cascade_mask_rcnn/cascade-mask-rcnn_svit-b_fpn_ms-crop-3x_coco.py'
