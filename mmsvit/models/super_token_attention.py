"""Super token attention: sample a few super tokens, attend among them, map the result back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import ops
from ..ops.modes import is_tracing

# From capability 9.0 on, PyTorch would choose cuDNN's first, which plans anew for each number of
# tokens, for tens to hundreds of milliseconds; images of detectors have many sizes.
KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
]


def prefer_flash(device: torch.device) -> AbstractContextManager:
    """A context in which attention on CUDA takes the first of :data:`KERNELS` that can run.

    A graph that is being recorded keeps PyTorch's order: its sizes may be fixed.
    """
    if device.type != 'cuda' or is_tracing():
        return nullcontext()
    return sdpa_kernel(KERNELS, set_priority=True)


class GlobalAttention(nn.Module):
    """Multi-head self-attention among all positions of a map.

    Args:
        embed_dims: Channels.
        num_heads: Heads; divides ``embed_dims``.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout rate of the output.
        attn_drop_rate: Dropout rate of the attention weights.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(drop_rate)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of ``(N, H, W, C)``, as ``(3, N, heads, H*W, C/heads)``."""
        return self._grouped(x).permute(3, 0, 2, 1, 4)

    def _grouped(self, x: Tensor) -> Tensor:
        # The published projection groups its output per head: [head 0: q k v | head 1: q k v | ...].
        return self.qkv(x).flatten(1, 2).unflatten(2, (self.num_heads, 3, -1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        n, height, width, channels = x.shape
        if x.device.type == 'cpu':
            # Rows far apart cost the CPU's kernel more than the copy.
            query, key, value = self.project(x).contiguous().unbind(0)
        else:
            # The gradients are put together as the projection has them, without a copy.
            query, key, value = (t.transpose(1, 2) for t in self._grouped(x).unbind(3))
        with prefer_flash(x.device):
            x = F.scaled_dot_product_attention(
                query, key, value, dropout_p=self.attn_drop_rate if self.training else 0.0
            )
        x = x.transpose(1, 2).reshape(n, height, width, channels)
        return self.proj_drop(self.proj(x))


class SuperTokenAttention(nn.Module):
    """Super token attention (paper, Sec. 3.2).

    With a super token size of 1x1 every token is its own super token and this
    is plain global attention.

    Args:
        embed_dims: Channels.
        num_heads: Heads; divides ``embed_dims``.
        super_token_size: Height and width in tokens of the cell that one super
            token starts from.
        num_iters: Iterations of super token sampling.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout rate of the output.
        attn_drop_rate: Dropout rate of the attention weights.
        ops_backend: Which backend samples, see :func:`mmsvit.ops.choose_backend`.
    """

    associates = True
    """Whether tokens belong to the super tokens around them, as pictures then show, not to their cell's."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        super_token_size: tuple[int, int],
        num_iters: int = 1,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        ops_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.super_token_size = super_token_size
        self.num_iters = num_iters
        self.ops_backend = ops_backend
        self.attend = GlobalAttention(
            embed_dims,
            num_heads,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
        )

    @property
    def has_super_tokens(self) -> bool:
        """Whether there are fewer super tokens than tokens."""
        return self.super_token_size != (1, 1)

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sample super tokens from tokens.

        Args:
            x: ``(N, H, W, C)``.

        Returns:
            The super tokens, ``(N, Gh, Gw, C)``, one for each cell, and the association,
            see :func:`mmsvit.ops.sample`.
        """
        # On CUDA, autocast makes what a layer norm gives float32: twice the bytes to read.
        if x.is_cuda and x.dtype == torch.float32 and torch.is_autocast_enabled('cuda'):
            x = x.to(torch.get_autocast_dtype('cuda'))
        return ops.sample(x, self.super_token_size, self.num_iters, self.ops_backend)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if not self.has_super_tokens:
            return self.attend(x)
        super_tokens, association = self.sample(x)
        super_tokens = self.attend(super_tokens)
        return ops.distribute(
            association, super_tokens, self.super_token_size, x.shape[1:3], self.ops_backend
        )


class PooledAttention(SuperTokenAttention):
    """Attention among the means of cells: the paper's ablation of super token sampling.

    Each token gets what the mean of its own cell got. See :class:`SuperTokenAttention`
    for the arguments, of which ``num_iters`` means nothing here.
    """

    associates = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if not self.has_super_tokens:
            return self.attend(x)
        (h, w), (height, width) = self.super_token_size, x.shape[1:3]
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), (h, w), ceil_mode=True)
        means = self.attend(means.permute(0, 2, 3, 1))
        tokens = means.repeat_interleave(h, dim=1).repeat_interleave(w, dim=2)
        return tokens[:, :height, :width]


ATTENTIONS: dict[str, type[SuperTokenAttention]] = {
    'super_token': SuperTokenAttention,
    'average_pool': PooledAttention,
}
"""What ``SViT(token_sampling=...)`` chooses from."""
