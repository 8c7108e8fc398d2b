_base_ = './svit-s_upernet_8xb2-160k_ade20k-512x512.py'

# The classifier's super token sizes; docs/recipes.md says why they are not the default.
model = dict(backbone=dict(super_token_sizes=(8, 4, 1, 1)))
