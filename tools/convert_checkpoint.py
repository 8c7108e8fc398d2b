"""Convert a checkpoint that the authors of SViT published to a plain one of the backbone.

    python tools/convert_checkpoint.py stvit-small-224.pth svit-small-224.pth

The result holds tensors alone: ``state_dict`` under mmsvit's names, without classifier and
optimizer state. (Converting is optional: ``init_cfg`` takes the published file as well.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmsvit.checkpoint import backbone_state_dict, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('src', type=Path, help='published checkpoint')
    parser.add_argument('dst', type=Path, help='file to write')
    args = parser.parse_args()
    if args.dst.exists():
        parser.error(f'{args.dst} exists already; name another file')
    return args


def main() -> None:
    args = parse_args()
    try:
        weights = backbone_state_dict(read_checkpoint(args.src))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if 'stem.0.weight' not in weights:
        raise SystemExit(f'{args.src} holds no SViT: it has no stem')
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=weights, meta=dict(source=args.src.name)), args.dst)
    print(f'wrote {len(weights)} weights to {args.dst}')


if __name__ == '__main__':
    main()
