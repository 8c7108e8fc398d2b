r"""Draw the super tokens of images, as one PNG for each image.

    python tools/visualize_super_tokens.py photo.jpg --config configs/svit_maskrcnn_coco.py \
        --checkpoint checkpoints/stvit-small-224.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from rich.progress import track

from mmsvit import SViT
from mmsvit.checkpoint import load_pretrained, trust_checkpoints
from mmsvit.cli import add_trust_option
from mmsvit.visualization import super_token_sheet, tessellate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', nargs='+', type=Path, help='image files')
    parser.add_argument('--config', required=True, help='config of a model around SViT')
    parser.add_argument(
        '--checkpoint',
        required=True,
        help="a runner's checkpoint, or the authors' ImageNet weights",
    )
    parser.add_argument('--out-dir', type=Path, default=Path('super_tokens'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add_trust_option(parser)
    args = parser.parse_args()
    absent = [str(path) for path in args.images if not path.is_file()]
    if absent:
        parser.error(f'no such image: {", ".join(absent)}')
    if not Path(args.checkpoint).is_file():
        parser.error(f'no such checkpoint: {args.checkpoint}')
    if len({path.stem for path in args.images}) < len(args.images):
        parser.error('two images have the same name, and so would their pictures')
    return args


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    backbone = MODELS.build({**cfg.model.backbone, 'init_cfg': None})
    if not isinstance(backbone, SViT):
        raise SystemExit(f'{args.config} has a {type(backbone).__name__} as backbone, not an SViT')
    load_pretrained(backbone, args.checkpoint)
    backbone.to(args.device).eval()
    preprocessor = MODELS.build(cfg.model.get('data_preprocessor') or cfg.data_preprocessor).to(
        args.device
    )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    pipeline = Compose(
        [step for step in dataset.pipeline if 'LoadAnnotations' not in str(step['type'])]
    )

    args.out_dir.mkdir(parents=True, exist_ok=True)
    for path in track(args.images, description='super tokens'):
        data = pipeline(dict(img_path=str(path), img_id=0))
        image = data['inputs'].permute(1, 2, 0).numpy()
        inputs = preprocessor(pseudo_collate([data]), False)['inputs']
        labels = {stage: maps[0] for stage, maps in tessellate(backbone, inputs).items()}
        if not labels:
            raise SystemExit('no stage of this backbone samples super tokens: all sizes are 1')
        sheet = super_token_sheet(image, labels, tuple(inputs.shape[2:]))
        cv2.imwrite(str(args.out_dir / f'{path.stem}.png'), sheet)
    print(f'wrote {len(args.images)} pictures to {args.out_dir}')


if __name__ == '__main__':
    main()
