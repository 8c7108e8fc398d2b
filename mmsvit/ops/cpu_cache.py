"""How much of a map to work on at a time on a CPU, so that all that comes between stays in cache."""

from __future__ import annotations

import torch

PIECE_BYTES = 2**21
"""What one piece may have for each thread: about a core's cache."""


def rows_in_cache(row_bytes: int, at_least_bytes: int = 0) -> int:
    """How many rows to work on at a time if ``row_bytes`` are held for each of them meanwhile.

    A piece may have ``at_least_bytes`` in any case.
    """
    budget = max(PIECE_BYTES * torch.get_num_threads(), at_least_bytes)
    return max(1, budget // max(row_bytes, 1))  # Of an empty batch, a row has no bytes.
