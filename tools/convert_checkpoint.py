"""Convert a checkpoint that the authors of SViT published to a plain one.

    python tools/convert_checkpoint.py stvit-small-224.pth svit-small-224.pth
    python tools/convert_checkpoint.py stvit-small-224.pth svit-small_in1k.pth --classifier

The result holds tensors alone, without optimizer state: ``state_dict`` of the backbone, or of
the whole classifier under mmpretrain's names. (Converting is optional: ``init_cfg`` of the
backbone and the classifier's configs take the published file as well.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmsvit.checkpoint import backbone_state_dict, model_state_dict, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('src', type=Path, help='published checkpoint')
    parser.add_argument('dst', type=Path, help='file to write')
    parser.add_argument(
        '--classifier',
        action='store_true',
        help='write the whole classifier, for the configs in configs/svit, not the backbone alone',
    )
    args = parser.parse_args()
    if args.dst.exists():
        parser.error(f'{args.dst} exists already; name another file')
    return args


def main() -> None:
    args = parse_args()
    try:
        checkpoint = read_checkpoint(args.src)
        weights = (model_state_dict if args.classifier else backbone_state_dict)(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    needed = ['stem.0.weight']
    if args.classifier:
        needed = ['backbone.stem.0.weight', 'neck.proj.weight', 'head.fc.weight']
    absent = [key for key in needed if key not in weights]
    if absent:
        what = 'no classifier with an SViT' if args.classifier else 'no SViT'
        raise SystemExit(f'{args.src} holds {what}: it has no {", ".join(absent)}')
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=dict(weights), meta=dict(source=args.src.name)), args.dst)
    print(f'wrote {len(weights)} weights to {args.dst}')


if __name__ == '__main__':
    main()
