"""Convert a checkpoint, that the authors of SViT published or that a run saved, to plain weights.

    python tools/convert_checkpoint.py stvit-small-224.pth svit-small-224.safetensors
    python tools/convert_checkpoint.py stvit-small-224.pth svit-small_in1k.pth --classifier
    python tools/convert_checkpoint.py work_dirs/mine/epoch_12.pth mine.safetensors --whole

The result holds tensors alone, without optimizer state: ``state_dict`` of the backbone, of
the published classifier under mmpretrain's names, or of a whole model, whose class names stay
with it. Either file may be of torch or, by its name, ``.safetensors``. (Converting is optional:
``init_cfg`` of the backbone and the classifier's configs take the published file as well.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmsvit.checkpoint import (
    backbone_state_dict,
    model_state_dict,
    read_checkpoint,
    save_weights,
    trust_checkpoints,
)
from mmsvit.cli import add_trust_option, make_parser, run


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('src', type=Path, help='checkpoint to read')
    parser.add_argument('dst', type=Path, help='file to write, .pth or .safetensors')
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--classifier',
        action='store_true',
        help='write the whole classifier, for the configs in configs/svit, not the backbone alone',
    )
    what.add_argument(
        '--whole', action='store_true', help='write every weight, such as those of a detector'
    )
    add_trust_option(parser)
    args = parser.parse_args()
    if args.dst.exists():
        parser.error(f'{args.dst} exists already; name another file')
    return args


def needed_weights(args: argparse.Namespace) -> list[str]:
    """By which the result is known to be what was asked for."""
    if args.classifier:
        return ['backbone.stem.0.weight', 'neck.proj.weight', 'head.fc.weight']
    return ['backbone.stem.0.weight' if args.whole else 'stem.0.weight']


def meta_to_keep(args: argparse.Namespace, checkpoint: dict) -> dict:
    """Where the weights are from, and of a whole model, the names of its classes."""
    meta = dict(source=args.src.name)
    dataset_meta = checkpoint.get('meta', {}).get('dataset_meta')
    classes = dataset_meta.get('classes') if isinstance(dataset_meta, dict) else None
    if args.whole and isinstance(classes, (list, tuple)):
        meta['dataset_meta'] = dict(classes=[str(name) for name in classes])
    return meta


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    whole = args.classifier or args.whole
    try:
        checkpoint = read_checkpoint(args.src)
        weights = (model_state_dict if whole else backbone_state_dict)(checkpoint)
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error
    needed = needed_weights(args)
    absent = [key for key in needed if key not in weights]
    if absent:
        what = 'no classifier with an SViT' if args.classifier else 'no SViT'
        raise SystemExit(f'{args.src} holds {what}: it has no {", ".join(absent)}')
    try:
        save_weights(weights, args.dst, meta_to_keep(args, checkpoint))
    except ImportError as error:
        raise SystemExit(str(error)) from error
    print(f'wrote {len(weights)} weights to {args.dst}')


if __name__ == '__main__':
    run(main)
