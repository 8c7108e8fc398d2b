_base_ = './mask-rcnn_svit-s_fpn_1x_coco.py'

# Our choice, cheaper, most of all in stage 3; not the authors' (by its FLOPs, docs/recipes.md).
# The sizes are those of a profiling call in their code.
model = dict(backbone=dict(super_token_sizes=(16, 8, 2, 1)))
