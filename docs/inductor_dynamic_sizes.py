"""Report to PyTorch: Inductor cannot compile a backward pass for images of any size.

    python docs/inductor_dynamic_sizes.py          # TypeError: cannot determine truth value of Relational
    python docs/inductor_dynamic_sizes.py --mend   # prints: compiled

Needs torch alone (2.11; a C++ compiler). A depthwise convolution of a channels-last map saves its input
for the backward pass, which so is an output of the forward graph, and a view. Inductor asks for
the order of its strides, ``ir.get_stride_order(strides)``, without the shape environment, sorts
symbolic expressions, and does not know that sizes are positive. Given the environment, as other
callers of that function do, it takes ``argsort_sym``, which knows.
"""

import sys

import torch
import torch._inductor.config
from torch import nn

torch._inductor.config.force_disable_caches = True  # What was mended once would be found there.


class Model(nn.Module):
    """The position embedding of an SViT block behind a convolution of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, h, w, 8)."""
        x = self.stem(x).permute(0, 2, 3, 1)
        return (x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).square()


def mend() -> None:
    """Give ``get_stride_order`` the shape environment where its caller does not."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    original = ir.get_stride_order
    ir.get_stride_order = lambda strides, shape_env=None: original(
        strides, shape_env or V.graph.sizevars.shape_env
    )


if __name__ == '__main__':
    if '--mend' in sys.argv:
        mend()
    compiled = torch.compile(Model(), dynamic=True)
    for size in ((96, 64), (64, 160)):
        compiled(torch.randn(2, 3, *size)).sum().backward()
    print('compiled')
