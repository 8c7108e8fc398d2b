"""Steps of models over CUDA tensors without data; started by test_fake_cuda.py, prints JSON.

Each step is judged: what waits for the GPU, what lies on the CPU, outputs that are not
contiguous, parameters without a gradient. A mix of devices or dtypes stops it.
"""

import json
import sys

import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode

import mmsvit
from mmsvit import SViT
from mmsvit.benchmarking.counting import Recorder
from mmsvit.benchmarking.fake_cuda import move_to_fake_cuda, prepare_process

HALVES = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


def judge(recorder: Recorder, model: torch.nn.Module, trained: bool) -> dict:
    parameters = dict(model.named_parameters())
    return dict(
        waits=sorted(recorder.counts.host_syncs),
        on_cpu=sorted(recorder.counts.cpu_tensors),
        without_gradient=[n for n, p in parameters.items() if trained and p.grad is None],
        odd_gradients=[
            n
            for n, p in parameters.items()
            if p.grad is not None and (p.grad.dtype, p.grad.device) != (p.dtype, p.device)
        ],
    )


def backbone_step(arch: str, dtype: str, backend: str, form: str) -> dict:
    """One step of training, or with ``form`` ``eval`` or ``deploy`` of inference."""
    trains = form not in ('eval', 'deploy')
    with_cp = {'cp': True, 'recompute': 'ffn'}.get(form, False)
    model = SViT(
        arch,
        super_token_sizes=(16, 8, 1, 1),
        out_norm_cfg=dict(type='LN'),
        drop_path_rate=0.3,
        with_cp=with_cp,
        ops_backend=backend,
    )
    model.train(trains)
    if form == 'deploy':
        model.switch_to_deploy()
    mode = FakeTensorMode()
    move_to_fake_cuda(model, mode)
    with mode:
        images = torch.empty(2, 3, 104, 168, device='cuda')
        recorder = Recorder()
        with recorder:
            autocast = torch.autocast('cuda', HALVES.get(dtype), enabled=dtype in HALVES)
            with autocast, torch.set_grad_enabled(trains):
                outputs = model(images)
            if trains:
                torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    found = judge(recorder, model, trains)
    found['strange_outputs'] = [
        i for i, x in enumerate(outputs) if not x.is_contiguous() or not x.is_cuda
    ]
    return found


def upernet_step(dtype: str) -> dict:
    """UperNet's losses and gradients, without the accuracy, for which MMSegmentation waits."""
    cfg = Config.fromfile(mmsvit.config_path('svit_upernet_ade20k.py'))
    init_default_scope('mmseg')
    cfg.model.backbone.update(init_cfg=None, ops_backend='triton')
    cfg.model.data_preprocessor.size = (128, 128)
    text = json.dumps(cfg.model.to_dict()).replace('"SyncBN"', '"BN"')  # There is one process.
    model = MODELS.build(json.loads(text)).train()
    mode = FakeTensorMode()
    move_to_fake_cuda(model, mode)
    with mode:
        images = torch.empty(2, 3, 128, 128, device='cuda')
        labels = torch.empty(2, 128, 128, device='cuda', dtype=torch.int64)
        recorder = Recorder()
        with recorder:
            with torch.autocast('cuda', HALVES.get(dtype), enabled=dtype in HALVES):
                features = model.extract_feat(images)
                losses = [
                    head.loss_decode(resize(head(features), labels.shape[1:]), labels)
                    for head in (model.decode_head, model.auxiliary_head)
                ]
            sum(losses).backward()
    return judge(recorder, model, trained=True)


def maskrcnn_step(dtype: str) -> dict:
    """All layers of Mask R-CNN, forward and backward, with RoIs that are given.

    Which level an RoI is pooled from, and which proposals there are, MMDetection reads from values.
    """
    cfg = Config.fromfile(mmsvit.config_path('svit_maskrcnn_coco.py'))
    init_default_scope('mmdet')
    cfg.model.backbone.update(init_cfg=None, ops_backend='triton')
    model = DETECTORS.build(cfg.model).train()
    mode = FakeTensorMode()
    move_to_fake_cuda(model, mode)
    with mode:
        images = torch.empty(2, 3, 128, 160, device='cuda')
        rois = torch.empty(16, 5, device='cuda')
        recorder = Recorder()
        with recorder:
            with torch.autocast('cuda', HALVES.get(dtype), enabled=dtype in HALVES):
                features = model.extract_feat(images)
                outputs = [x for levels in model.rpn_head(features) for x in levels]
                head = model.roi_head
                for level in range(4):
                    pooled = head.bbox_roi_extractor.roi_layers[level](
                        features[level].float(), rois
                    )
                    outputs += head.bbox_head(pooled)
                    masks = head.mask_roi_extractor.roi_layers[level](features[level].float(), rois)
                    outputs.append(head.mask_head(masks))
            sum(output.float().square().mean() for output in outputs).backward()
    found = judge(recorder, model, trained=False)
    # The backbone's norms are frozen as the config says; all else gets a gradient.
    found['without_gradient'] = [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    return found


def main() -> None:
    prepare_process()
    found = {}
    for case in json.loads(sys.argv[1]):
        kind, *arguments = case
        step = dict(backbone=backbone_step, upernet=upernet_step, maskrcnn=maskrcnn_step)[kind]
        found['-'.join(case)] = step(*arguments)
    print('FOUND', json.dumps(found))


if __name__ == '__main__':
    main()
