"""The authors' fine-tuning at 384 pixels: a constant, small learning rate for 512 images a step.

The paper says 30 epochs; the script that they published, for SViT-L, says 50.
"""

_base_ = './imagenet_adamw_300e.py'

optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
