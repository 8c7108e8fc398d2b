_base_ = './svit-s_upernet_8xb2-160k_ade20k-512x512.py'

# Pretrained statistics, trained weights, as in our detectors: SyncBN, which waits for all GPUs at each
# of the backbone's 27 norms, remains in the heads alone.
model = dict(backbone=dict(norm_cfg=dict(type='BN'), norm_eval=True))
