_base_ = './mask-rcnn_svit-s_fpn_1x_coco.py'

# Larger super tokens: cheaper, most of all in stage 3. Not a published result; the sizes
# are those of a profiling call in the authors' code.
model = dict(backbone=dict(super_token_sizes=(16, 8, 2, 1)))
