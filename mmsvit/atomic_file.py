"""Write files that are complete or not there at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Have a file written under another name, and rename it when it is complete.

        with atomic_file('curves.png') as part:
            figure.savefig(part)

    Args:
        path: The file; its folder is made if needed, and an older file stays until the new one is complete.

    Yields:
        Where to write: in the same folder, with the same suffix.

    Raises:
        OSError: It cannot be written, for example because the disk is full; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{uuid.uuid4().hex[:8]}.partial{path.suffix}')
    try:
        yield part
        with part.open('rb+') as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
