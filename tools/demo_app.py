r"""Serve a web page on this machine to try a model: predictions, super tokens, attention.

    python tools/demo_app.py --config configs/svit_maskrcnn_shapes.py \
        --checkpoint work_dirs/quickstart/epoch_3.pth

Needs gradio: pip install "gradio==6.31.0". Only this machine can open the page, unless --host
says otherwise; there is no password.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path
from types import FrameType

import torch
from mmengine.config import Config

from mmsvit.apis.demo import Demo, drop_gradio_settings
from mmsvit.apis.inference import ImageModel
from mmsvit.checkpoint import trust_checkpoints
from mmsvit.cli import add_trust_option, make_parser, run


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        '--config', required=True, help='config file; it is code, so only one that you trust'
    )
    parser.add_argument('--checkpoint', required=True, help='checkpoint of the whole model')
    parser.add_argument(
        '--host', default='127.0.0.1', help='0.0.0.0 lets everybody on the network use the page'
    )
    parser.add_argument('--port', type=int, help='by default the first free one from 7860 on')
    parser.add_argument('--max-bytes', type=int, default=20_000_000, help='largest file')
    parser.add_argument('--max-pixels', type=int, default=25_000_000, help='largest image')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add_trust_option(parser)
    args = parser.parse_args()
    if args.max_bytes < 1 or args.max_pixels < 1:
        parser.error('--max-bytes and --max-pixels must be 1 or more')
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f'--port is a number from 1 to 65535, found {args.port}')
    if not Path(args.checkpoint).is_file():
        parser.error(f'no such checkpoint: {args.checkpoint}')
    return args


def end(number: int, frame: FrameType | None) -> None:
    """Leave as by Ctrl-C, so that nothing that visitors gave stays on the disk."""
    raise SystemExit(128 + number)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, end)
    if args.trust_checkpoint:
        trust_checkpoints()
    drop_gradio_settings()
    try:
        from mmsvit.apis.demo_page import serve  # gradio is an extra.

        model = ImageModel(Config.fromfile(args.config), args.device)
        model.load(args.checkpoint)
        demo = Demo(model, args.max_bytes, args.max_pixels)
        with serve(demo, Path(args.config).stem, args.host, args.port) as address:
            print(f'The page is at {address} (Ctrl-C ends it)', flush=True)
            threading.Event().wait()
    except (FileNotFoundError, ValueError, RuntimeError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print()


if __name__ == '__main__':
    run(main)
