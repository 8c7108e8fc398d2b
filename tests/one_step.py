"""Run a config for one step of training and evaluation at small size; started by test_all_configs.py.

    python one_step.py NAME DATA WORK_DIR

NAME is one for ``mmsvit.config_path``, DATA a folder of small generated data with the classes
of COCO, ADE20K or ImageNet.
"""

import sys

import torch
from mmengine.config import Config
from mmengine.runner import Runner

import mmsvit

SMALLER = 8


def shrink(value: object, key: str = '') -> object:
    """Make every image size in a pipeline smaller."""
    if isinstance(value, dict):
        return type(value)({k: shrink(v, k) for k, v in value.items()})
    sized = key in ('scale', 'scales', 'crop_size', 'size', 'max_size')
    if isinstance(value, (list, tuple)):
        return type(value)(shrink(v, key if sized else '') for v in value)
    return max(value // SMALLER, 32) if sized and isinstance(value, int) else value


def use_small_data(cfg: Config, data: str) -> None:
    """Point the config to the small data and make its images small."""
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        folder = 'train' if split == 'train' else 'val'
        dataset = loader.dataset
        dataset.update(data_root=f'{data}/', pipeline=shrink(dataset.pipeline))
        if cfg.default_scope == 'mmdet':
            dataset.update(ann_file=f'annotations/instances_{folder}.json')
            dataset.data_prefix = dict(img=f'{folder}/')
        elif cfg.default_scope == 'mmseg':
            dataset.data_prefix = dict(
                img_path=folder, seg_map_path=f'annotations/semantic_{folder}'
            )
        else:
            dataset.update(ann_file=f'{folder}.txt', data_prefix=folder, split='')
    if cfg.default_scope == 'mmdet':
        cfg.val_evaluator.ann_file = f'{data}/annotations/instances_val.json'
    cfg.train_dataloader.batch_size = 2
    if 'roi_head' in cfg.model:  # Fewer regions, too.
        cfg.model.test_cfg.rpn.max_per_img = 50
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
    if 'data_preprocessor' in cfg.model:
        cfg.model.data_preprocessor = shrink(cfg.model.data_preprocessor)


def main() -> None:
    name, data, work_dir = sys.argv[1:]
    cfg = Config.fromfile(mmsvit.config_path(name))
    use_small_data(cfg, data)
    # Pretrained weights are not there; running statistics are, as they were initialised.
    cfg.model.backbone.update(init_cfg=None, with_cp=True)
    cfg.load_from = None
    if 'num_queries' in cfg.model:
        cfg.model.num_queries = 30  # No more than the small map has positions.
    cfg.auto_scale_lr.enable = True
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.update(max_iters=1, val_interval=1)
    else:
        cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1000, save_last=False)
    cfg.work_dir = work_dir
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 1, runner.iter
    model = runner.model.train()
    loader = runner.build_dataloader(cfg.train_dataloader)
    batch = model.data_preprocessor(next(iter(loader)), training=True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f'a distributed run stops at parameters without gradient: {unused}'
    with torch.autocast('cpu', torch.bfloat16):  # The backbone and what mmcv's ops come after.
        features = model.extract_feat(batch['inputs'])
    sum(feature.float().square().mean() for feature in features).backward()
    assert all(feature.isfinite().all() for feature in features)
    print('ONE STEP', runner.message_hub.get_scalar('train/loss').current())


if __name__ == '__main__':
    main()
