_base_ = [
    __import__('mmsvit').config_path('mmseg::_base_/datasets/ade20k.py'),
    '../ade20k_tta.py',
]

train_dataloader = dict(batch_size=2)  # on each of 8 GPUs
tta_pipeline = _base_.multi_scale_pipeline
