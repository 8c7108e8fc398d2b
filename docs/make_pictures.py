r"""Make the pictures of the documentation anew, in docs/images.

    bash tools/quickstart.sh --retrain
    python docs/make_pictures.py

Needs gradio, playwright and Chromium for the picture of the demo page. coffee.jpg and shapes.jpg
are not made here: they are what the others are of.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

IMAGES = Path('docs/images')
CONFIG = 'configs/svit_maskrcnn_shapes.py'
LARGEST = 145_000  # bytes of a picture; a test holds 150 000


def run(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def save(picture: Path, name: str, width: int | None = None) -> None:
    """Save a picture as small as the documentation has it."""
    with Image.open(picture) as image:
        image = image.convert('RGB')
        if width is not None:
            height = round(image.height * width / image.width)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        for quality in (80, 70, 60, 50):
            image.save(IMAGES / name, quality=quality, optimize=True)
            if (IMAGES / name).stat().st_size < LARGEST:
                break


def draw_super_tokens(checkpoint: Path) -> None:
    """The pictures of how super token attention works."""
    tool = 'tools/visualize_super_tokens.py'
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        config = 'configs/svit_upernet_ade20k.py'
        run(tool, IMAGES / 'coffee.jpg', '--config', config, '--out-dir', out, '--size', '640')
        for kind in ('borders', 'colours'):
            save(out / f'coffee_stage1_{kind}.png', f'super_token_{kind}.jpg')
        options = ['--config', CONFIG, '--checkpoint', checkpoint, '--point', '0.4', '0.6']
        run(tool, IMAGES / 'shapes.jpg', *options, '--out-dir', out, '--size', '400')
        save(out / 'shapes_stage1_attention.png', 'super_token_attention.jpg')
        save(out / 'shapes_sheet.png', 'super_token_sheet.jpg', 1400)


@contextmanager
def demo_app(checkpoint: Path) -> Iterator[str]:
    """The demo page while the context is entered; its address."""
    command = [sys.executable, 'tools/demo_app.py', '--config', CONFIG, '--checkpoint', checkpoint]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout:
            found = re.search(r'The page is at (\S+)', line)
            if found:
                yield found.group(1)
                break
        else:
            raise SystemExit('the demo page does not start, see above')
    finally:
        server.terminate()
        server.wait()


def photograph_demo(checkpoint: Path) -> None:
    """The whole demo page, down to the last stage."""
    from playwright.sync_api import sync_playwright

    with (
        demo_app(checkpoint) as address,
        sync_playwright() as playwright,
        tempfile.TemporaryDirectory() as folder,
    ):
        browser = shutil.which('chromium') or shutil.which('google-chrome')
        # Chromium's sandbox does not start for root, as in containers.
        chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        page = chromium.new_page(viewport=dict(width=1300, height=1000))
        page.goto(address)
        page.wait_for_selector('#file input[type=file]', state='attached')
        page.set_input_files('#file input[type=file]', IMAGES / 'shapes.jpg')
        for name in ('picture', 'prediction', 'super-tokens-2', 'attention-3', 'attention-4'):
            page.wait_for_selector(f'#{name} img')
        page.wait_for_function('[...document.images].every(image => image.complete)')
        page.screenshot(path=Path(folder, 'page.png'), full_page=True)
        chromium.close()
        save(Path(folder, 'page.png'), 'demo_page.jpg', 700)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/quickstart'))
    args = parser.parse_args()
    record = args.work_dir / 'last_checkpoint'
    if not record.is_file():
        parser.error(f'no finished run in {args.work_dir}: bash tools/quickstart.sh makes one')
    checkpoint = Path(record.read_text())
    save(args.work_dir / 'pictures.jpg', 'quickstart.jpg')
    run('tools/plot_log.py', args.work_dir, '--out', IMAGES / 'curves.png')
    draw_super_tokens(checkpoint)
    photograph_demo(checkpoint)


if __name__ == '__main__':
    main()
