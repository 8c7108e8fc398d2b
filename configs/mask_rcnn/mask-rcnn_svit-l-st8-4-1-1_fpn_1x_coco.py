_base_ = './mask-rcnn_svit-l_fpn_1x_coco.py'

# The classifier's super token sizes; docs/recipes.md says why they are not the default.
model = dict(backbone=dict(super_token_sizes=(8, 4, 1, 1)))
