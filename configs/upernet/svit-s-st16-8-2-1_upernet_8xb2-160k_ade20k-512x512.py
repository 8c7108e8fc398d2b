_base_ = './svit-s_upernet_8xb2-160k_ade20k-512x512.py'

# Our choice, cheaper, most of all in stage 3; not the authors' (by its FLOPs, docs/recipes.md).
# The sizes are those of a profiling call in their code.
model = dict(backbone=dict(super_token_sizes=(16, 8, 2, 1)))
