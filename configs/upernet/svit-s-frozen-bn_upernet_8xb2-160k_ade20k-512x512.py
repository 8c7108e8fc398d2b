_base_ = './svit-s_upernet_8xb2-160k_ade20k-512x512.py'

# Batch norms with pretrained statistics and weights, which no step changes.
model = dict(backbone=dict(norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True))
