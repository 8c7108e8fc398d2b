_base_ = [__import__('mmsvit').config_path('mmseg::_base_/datasets/ade20k.py')]

train_dataloader = dict(batch_size=2)  # on each of 8 GPUs
