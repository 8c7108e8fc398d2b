"""A channels-last map as the contiguous one that necks and heads expect."""

from __future__ import annotations

from torch import Tensor

from .cpu_cache import rows_in_cache
from .torch_backend import in_one_graph, wants_gradient


def channels_first(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W), contiguous.

    On a CPU without gradients it goes piece by piece: PyTorch's copy reads with strides from
    all over the map.
    """
    if x.device.type != 'cpu' or wants_gradient(x) or in_one_graph():
        return x.permute(0, 3, 1, 2).contiguous()
    n, height, width, channels = x.shape
    output = x.new_empty(n, channels, height, width)
    # Writing goes to a place of its own for each channel: an eighth of the cache does best.
    pixels = rows_in_cache(8 * channels * x.element_size())
    for image, out in zip(x.flatten(1, 2), output.flatten(2)):
        for source, target in zip(image.split(pixels), out.split(pixels, dim=1)):
            target.copy_(source.t())
    return output
