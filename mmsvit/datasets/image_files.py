"""Image files before they are decoded."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

# First and last bytes of formats that OpenCV reads without an error if the end is missing.
_BEGIN_AND_END = ((b'\xff\xd8', b'\xff\xd9'), (b'\x89PNG', b'IEND\xaeB`\x82'))
_TAIL = 64  # bytes: some programs write a few of their own after the end


def refuse_truncated(path: str | Path) -> None:
    """Refuse a truncated JPEG or PNG file, which OpenCV would fill up with grey.

    Cheap: Pillow decodes the image only if the last bytes are wrong.

    Raises:
        OSError: The file is truncated, missing or unreadable, or a pipe or device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # To read a pipe would wait for its other end.
        raise OSError(f'{str(path)!r} is a folder, pipe or device, not a file')
    with path.open('rb') as file:
        head = file.read(4)
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        tail = file.read()
    if any(head.startswith(begin) and end not in tail for begin, end in _BEGIN_AND_END):
        with Image.open(path) as image:
            image.load()
