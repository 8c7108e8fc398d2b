r"""Draw the super tokens of images: a sheet for each image, and each picture of it by itself.

    python tools/visualize_super_tokens.py photo.jpg --config configs/svit_maskrcnn_coco.py \
        --checkpoint checkpoints/stvit-small-224.pth
    python tools/visualize_super_tokens.py photos/ 'more/**/*.png' --config CONFIG \
        --checkpoint CHECKPOINT --point 0.3 0.6 --of super_token

For each stage with super tokens: their borders, their mean colours, and where attention looks
from a point. The images go through the test pipeline of the config, and are drawn as the
network sees them. Of photo.jpg the sheet is photo_sheet.png, and pictures have names such as
photo_stage1_borders.png. Subfolders that a pattern goes into are there in --out-dir, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import cv2
import torch
from mmengine.config import Config
from PIL import Image
from rich.progress import track

from mmsvit.apis.image_files import find_images
from mmsvit.apis.inference import ImageModel
from mmsvit.atomic_file import atomic_file
from mmsvit.checkpoint import trust_checkpoints
from mmsvit.cli import add_trust_option, make_parser, run
from mmsvit.visualization.drawing import (
    SMALLEST_PICTURE,
    AttentionPoint,
    draw_attention_from,
    draw_super_tokens,
    super_token_sheet,
)

KINDS = ('borders', 'colours', 'attention')
STAGES = (1, 2, 3, 4)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('images', nargs='+', help='image files, folders, patterns in quotes')
    parser.add_argument('--config', required=True, help='config of a model around SViT')
    parser.add_argument(
        '--checkpoint',
        help="a runner's checkpoint or the authors' ImageNet weights; without one the weights are "
        'random, and the pictures say so',
    )
    parser.add_argument(
        '--stage',
        type=int,
        nargs='+',
        help='which stages, from 1; by default all that have super tokens',
    )
    parser.add_argument(
        '--block', type=int, help='which block of the stages, from 1; by default the last'
    )
    parser.add_argument(
        '--point',
        type=float,
        nargs=2,
        metavar=('X', 'Y'),
        help='where attention is looked at from: fractions of width and height, 0 0 is the upper '
        'left corner; by default the middle. Needs --checkpoint: random weights look nowhere',
    )
    parser.add_argument(
        '--of',
        choices=['pixel', 'super_token'],
        help='attention of the point itself, a mixture of the super tokens around it (default), or '
        'of the one super token that it belongs to most',
    )
    parser.add_argument('--head', type=int, help='one head, from 1; by default their mean')
    parser.add_argument(
        '--size',
        type=int,
        help='pixels of the longer side of each picture beside the sheet; by default those of the '
        f'image, at least {SMALLEST_PICTURE}',
    )
    parser.add_argument('--out-dir', type=Path, default=Path('super_tokens'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add_trust_option(parser)
    args = parser.parse_args()
    for name in ('block', 'head', 'size'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} must be 1 or more')
    try:
        args.images = find_images(args.images)
        head = None if args.head is None else args.head - 1
        point = AttentionPoint(*(args.point or (0.5, 0.5)), args.of or 'pixel', head)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if args.checkpoint is None and (args.point or args.head or args.of):
        parser.error('--point, --head and --of need --checkpoint: random weights attend to nothing')
    args.point = None if args.checkpoint is None else point
    problem = overwriting(args.images, args.out_dir)
    if problem:
        parser.error(problem)
    if args.checkpoint is not None and not Path(args.checkpoint).is_file():
        parser.error(f'no such checkpoint: {args.checkpoint}')
    return args


def picture_file(out_dir: Path, image: Path, kind: str) -> Path:
    """Where a picture of an image goes, whose path is relative to the folder it was found in."""
    return out_dir / image.with_name(f'{image.stem}_{kind}.png')


def overwriting(images: dict[Path, Path], out_dir: Path) -> str | None:
    """What would be lost if pictures of these images were written, in words."""
    inputs = {path.resolve() for path in images}
    kinds = ['sheet', *(f'stage{stage}_{kind}' for stage in STAGES for kind in KINDS)]
    written: dict[Path, Path] = {}
    for path, relative in images.items():
        for kind in kinds:
            file = picture_file(out_dir, relative, kind).resolve()
            if file in inputs:
                return f'{file}, a picture of {path}, is one of the images; name another --out-dir'
            if file in written:
                return f'{written[file]} and {path} have the same name, and so would their pictures'
            written[file] = path
    return None


def check_images(paths: Iterable[Path]) -> None:
    """Refuse what is no image before anything is drawn."""
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise SystemExit(f'{path} is not an image that can be read: {error}') from error


def build(args: argparse.Namespace) -> ImageModel:
    """The model of the config with the weights of the checkpoint."""
    torch.manual_seed(0)
    try:
        model = ImageModel(Config.fromfile(args.config), args.device)
        if args.checkpoint is not None:
            model.load_backbone(args.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f'{args.config}: {error}') from error
    return model


def draw(path: Path, relative: Path, model: ImageModel, args: argparse.Namespace) -> None:
    """Write the pictures of one image, whose relative path they get."""
    stages = None if args.stage is None else [stage - 1 for stage in args.stage]
    block = -1 if args.block is None else args.block - 1
    image, maps = model.super_tokens(model.prepare(path), stages, block)
    weights = Path(args.checkpoint).name if args.checkpoint else 'random, nothing was trained'
    note = f'{image.shape[1]}x{image.shape[0]} pixels. Config: {Path(args.config).name}. Weights: '
    pictures = {'sheet': super_token_sheet(image, maps, args.point, path.name, note + weights)}
    longer_side = args.size or max(SMALLEST_PICTURE, *image.shape[:2])
    for stage_map in maps:
        borders, colours = draw_super_tokens(image, stage_map, longer_side)
        drawn = [borders, colours]
        if args.point is not None:
            drawn.append(draw_attention_from(image, stage_map, args.point, longer_side)[0])
        for kind, picture in zip(KINDS, drawn):
            pictures[f'stage{stage_map.stage + 1}_{kind}'] = picture
    for kind, picture in pictures.items():
        file = picture_file(args.out_dir, relative, kind)
        _, encoded = cv2.imencode(file.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        with atomic_file(file) as part:
            part.write_bytes(encoded.tobytes())


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoints()
    check_images(args.images)
    model = build(args)
    for path, relative in track(args.images.items(), 'super tokens', len(args.images)):
        try:
            draw(path, relative, model, args)
        except ValueError as error:
            raise SystemExit(f'{path}: {error}') from error
    print(f'wrote the sheets and pictures of {len(args.images)} images to {args.out_dir}/')


if __name__ == '__main__':
    run(main)
