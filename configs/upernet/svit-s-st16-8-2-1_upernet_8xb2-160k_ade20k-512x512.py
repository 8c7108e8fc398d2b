_base_ = './svit-s_upernet_8xb2-160k_ade20k-512x512.py'

# Larger super tokens: cheaper, most of all in stage 3. Not a published result; the sizes
# are those of a profiling call in the authors' code.
model = dict(backbone=dict(super_token_sizes=(16, 8, 2, 1)))
