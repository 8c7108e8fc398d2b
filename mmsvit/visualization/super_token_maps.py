"""The pixels of each super token, and the pixels to which a point attends.

Sampling, attention among super tokens and distribution are three matrices (paper, Sec. 3.2), so
a layer's output at a token is a weighted sum over all tokens. This module computes these weights,
and the super token to which each token belongs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.super_token_attention import SuperTokenAttention
from ..models.svit import SViT
from ..ops import distribute
from ..ops.torch_backend import EPS, scatter_neighbours

PHASES = 4
"""Super tokens this many cells apart share no token, with at least a cell between them."""


@dataclass(frozen=True)
class SuperTokenMap:
    """The super tokens of one attention layer for one image.

    Attributes:
        stage: Index of the stage, from 0 as in ``out_indices``.
        block: Index of the block in the stage, from 0.
        num_blocks: Number of blocks in the stage.
        stride: Pixels of the input from one token to the next.
        super_token_size: Height and width in tokens of the initial cell of a super token.
        token_shape: Height and width of the stage's feature map.
        association: Association of tokens with the super tokens around them,
            ``(Gh, Gw, 9, h*w)``, see :func:`mmsvit.ops.sample`.
        query: ``(heads, Gh*Gw, channels of a head)``.
        key: ``(heads, Gh*Gw, channels of a head)``.
    """

    stage: int
    block: int
    num_blocks: int
    stride: int
    super_token_size: tuple[int, int]
    token_shape: tuple[int, int]
    association: Tensor
    query: Tensor
    key: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of super tokens."""
        rows, columns = self.association.shape[:2]
        return rows, columns

    @property
    def has_super_tokens(self) -> bool:
        """Whether there are fewer super tokens than tokens."""
        return self.super_token_size != (1, 1)

    def hard_assignment(
        self,
        size: tuple[int, int],
        image_size: tuple[int, int] | None = None,
        smooth: bool = False,
    ) -> Tensor:
        """The super token to which each pixel belongs most.

        Associations are interpolated between tokens before they are compared, so that borders
        are smooth.

        Args:
            size: Height and width of the result.
            image_size: Height and width in pixels of the shown part of the input, from its upper
                left corner; by default ``size``.
            smooth: Blur associations over 3x3 tokens if cells are larger. In areas of one colour,
                neighbours have equal associations, and noise would decide.

        Returns:
            Indices of super tokens, row by row over the grid, int64 of ``size``.
        """
        grid_h, grid_w = self.grid
        h, w = self.super_token_size
        rows, columns = self._positions(size, image_size or size, self.association.device)
        cell_rows, cell_columns = (rows + 0.5) / h - 0.5, (columns + 0.5) / w - 0.5
        # Neighbours as (row, column): those outside the grid are 0, as is a fourth row and column
        # for distant super tokens.
        shares = self.association.reshape(grid_h, grid_w, 3, 3, h * w)
        inside = F.pad(shares.new_ones(self.grid), (1, 1, 1, 1)).unfold(0, 3, 1).unfold(1, 3, 1)
        shares = F.pad(shares * inside[..., None], (0, 0, 0, 1, 0, 1))

        labels = torch.zeros(size, dtype=torch.int64, device=shares.device)
        largest = shares.new_full(size, -1)
        for i in range(PHASES):
            label_rows, in_rows, row_neighbours = _phase(i, cell_rows, grid_h)
            for j in range(PHASES):
                label_columns, in_columns, column_neighbours = _phase(j, cell_columns, grid_w)
                share = shares[
                    torch.arange(grid_h, device=shares.device)[:, None],
                    torch.arange(grid_w, device=shares.device),
                    row_neighbours[:, None],
                    column_neighbours,
                ]
                share = share.reshape(grid_h, grid_w, h, w).transpose(1, 2)
                share = share.reshape(1, grid_h * h, grid_w * w)
                if smooth and min(h, w) > 3:
                    share = _blur(share)
                share = _interpolate(share, rows, columns)[0]
                share = share.masked_fill(~(in_rows[:, None] & in_columns), -1)
                is_larger = share > largest
                largest = torch.where(is_larger, share, largest)
                numbers = label_rows[:, None] * grid_w + label_columns
                labels = torch.where(is_larger, numbers, labels)
        return labels

    def attention_from(
        self,
        point: tuple[float, float],
        of: str = 'pixel',
        head: int | None = None,
    ) -> Tensor:
        """The weight of each token in this layer's output at a point.

        Args:
            point: Row and column in pixels of the input.
            of: ``'pixel'`` for all super tokens to which the point belongs, weighted,
                ``'super_token'`` for the one to which it belongs most.
            head: Index of a head, from 0; by default the mean of all heads.

        Returns:
            Weights of ``token_shape`` as multiples of their mean over all tokens, padding
            included: uniform attention is 1.

        Raises:
            ValueError: The head or ``of`` is unknown, or the point is outside the map.
        """
        heads = self.query.shape[0]
        if head is not None and not 0 <= head < heads:
            raise ValueError(
                f'head must be from 0 to {heads - 1} in stage {self.stage + 1}, found {head}'
            )
        if of not in ('pixel', 'super_token'):
            raise ValueError(f"of must be 'pixel' or 'super_token', found {of!r}")
        row, column = (round(position / self.stride) for position in point)
        height, width = self.token_shape
        # The last token is centred up to a stride before the last pixel.
        if not (0 <= row <= height and 0 <= column <= width):
            raise ValueError(
                f'the point {tuple(point)} is outside the {height}x{width} tokens of stage '
                f'{self.stage + 1}, which are {self.stride} pixels apart'
            )
        share = self._share_of_token(min(row, height - 1), min(column, width - 1))
        if of == 'super_token':
            share = F.one_hot(share.argmax(), share.numel()).to(share)
        (involved,) = share.nonzero(as_tuple=True)

        query = self.query[:, involved] * self.query.shape[-1] ** -0.5
        attention = (query @ self.key.transpose(-1, -2)).softmax(dim=-1)
        attention = (share[involved, None] * attention).sum(dim=1)
        attention = attention.mean(dim=0) if head is None else attention[head]

        # A super token is the mean of its tokens, weighted by association.
        association = self.association[None]
        mass = scatter_neighbours(association.sum(dim=-1, keepdim=True)).flatten() + EPS
        weights = (attention / mass).reshape(1, *self.grid, 1)
        weights = distribute(association, weights, self.super_token_size, self.token_shape, 'torch')
        return weights[0, ..., 0] * (association.numel() / 9)

    def to_pixels(
        self, tokens: Tensor, size: tuple[int, int], image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Interpolate a map of ``token_shape`` between the tokens.

        Args:
            tokens: ``(H, W)``.
            size: See :meth:`hard_assignment`.
            image_size: See :meth:`hard_assignment`.
        """
        rows, columns = self._positions(size, image_size or size, tokens.device)
        return _interpolate(tokens[None], rows, columns)[0]

    def _positions(
        self, size: tuple[int, int], image_size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns of pixels in the feature map.

        The convolutions before a stage have stride 2 and padding 1, so token i is centred on
        pixel ``stride * i``.
        """
        rows, columns = (
            ((torch.arange(n, device=device) + 0.5) * (pixels / n) - 0.5) / self.stride
            for n, pixels in zip(size, image_size)
        )
        height, width = self.token_shape
        return rows.clamp(0, height - 1), columns.clamp(0, width - 1)

    def _share_of_token(self, row: int, column: int) -> Tensor:
        """Association of one token with every super token, ``(Gh*Gw,)``."""
        (h, w), (grid_h, grid_w) = self.super_token_size, self.grid
        cell_row, cell_column = row // h, column // w
        share = self.association.new_zeros(grid_h + 2, grid_w + 2)
        nine = self.association[cell_row, cell_column, :, row % h * w + column % w]
        share[cell_row : cell_row + 3, cell_column : cell_column + 3] = nine.reshape(3, 3)
        return share[1:-1, 1:-1].flatten()


def _phase(phase: int, cells: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find the nearest of every fourth super token along one axis.

    Args:
        phase: Index of the first of these super tokens.
        cells: Positions of pixels, in cells from the centre of the first cell.
        grid: Number of super tokens along the axis.

    Returns:
        For each pixel, index of the nearest of them, and whether it is in the grid; for each
        cell, which of its neighbours is one of them, 3 for none.
    """
    nearest = phase + PHASES * ((cells - phase) / PHASES).round().long()
    neighbours = (phase - torch.arange(grid, device=cells.device) + 1) % PHASES
    return nearest, (nearest >= 0) & (nearest < grid), neighbours


def _blur(maps: Tensor) -> Tensor:
    """Blur ``(K, H, W)`` with the kernel [1, 2, 1] / 4 along both axes."""
    kernel = maps.new_tensor([1, 2, 1]) / 4
    kernel = (kernel[:, None] * kernel).expand(1, 1, 3, 3)
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode='replicate'), kernel)[:, 0]


def _interpolate(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear interpolation of ``(K, H, W)`` at all pairs of fractional rows and columns."""
    height, width = maps.shape[1:]
    y, x = (
        2 * positions / max(n - 1, 1) - 1 for positions, n in ((rows, height), (columns, width))
    )
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return F.grid_sample(maps[None], grid[None], padding_mode='border', align_corners=True)[0]


def attention_layers(backbone: SViT) -> list[list[SuperTokenAttention]]:
    """The attention layer of every block, by stage."""
    return [
        [module for module in stage.modules() if isinstance(module, SuperTokenAttention)]
        for stage in backbone.stages
    ]


class SuperTokenRecorder:
    """Record the inputs of the backbone's attention layers while this context is entered.

        with SuperTokenRecorder(model.backbone) as recorder:
            model.test_step(data)
        maps = recorder.maps()

    Args:
        backbone: The backbone; it has hooks only while the context is entered.
        stages: Indices of the stages, from 0; by default those with super tokens.
        block: Index of the block in each stage, from 0, or from -1 backwards.
        max_images: Number of images to keep of a batch; by default all.

    Raises:
        ValueError: A stage or block does not exist, or by default no stage samples super tokens.
    """

    def __init__(
        self,
        backbone: SViT,
        stages: Sequence[int] | None = None,
        block: int = -1,
        max_images: int | None = None,
    ) -> None:
        layers = attention_layers(backbone)
        if stages is None:
            stages = [i for i, found in enumerate(layers) if found[-1].has_super_tokens]
            if not stages:
                raise ValueError('no stage of this backbone samples super tokens; pass stages')
        self.layers: dict[tuple[int, int], SuperTokenAttention] = {}
        for i in stages:
            if not 0 <= i < len(layers):
                raise ValueError(f'there is no stage {i + 1}: the backbone has {len(layers)}')
            blocks = len(layers[i])
            if not -blocks <= block < blocks:
                raise ValueError(
                    f'there is no block {block + 1} in stage {i + 1}, which has {blocks}'
                )
            self.layers[i, block % blocks] = layers[i][block]
        self.num_blocks = [len(found) for found in layers]
        self.backbone = backbone
        self.max_images = max_images
        self._kept: dict[nn.Module, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> SuperTokenRecorder:
        layers = self.layers.values()
        watched: list[nn.Module] = [self.backbone, *layers, *(each.attend for each in layers)]
        for module in watched:
            self._hooks.callback(module.register_forward_pre_hook(self._keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept[module] = inputs[0][: self.max_images].detach().clone()

    @property
    def images(self) -> Tensor:
        """The input of the backbone, ``(N, C, H, W)``.

        Raises:
            RuntimeError: There was no forward pass within the context.
        """
        if self.backbone not in self._kept:
            raise RuntimeError('no forward pass of the backbone since the recording began')
        return self._kept[self.backbone]

    @torch.no_grad()
    def maps(self) -> list[list[SuperTokenMap]]:
        """Maps of the last forward pass: for each image those of all layers, by stage.

        The tensors are on the CPU.

        Raises:
            RuntimeError: There was no forward pass within the context.
        """
        layers = sorted(self.layers.items())
        return [
            [self._map(stage, block, layer, i) for (stage, block), layer in layers]
            for i in range(len(self.images))
        ]

    def _map(self, stage: int, block: int, layer: SuperTokenAttention, image: int) -> SuperTokenMap:
        tokens = self._kept[layer][image : image + 1]
        _, height, width, _ = tokens.shape
        super_tokens = self._kept[layer.attend][image : image + 1]
        if layer.has_super_tokens and layer.associates:
            _, association = layer.sample(tokens)
        else:
            association = _own_cell(tokens, layer.super_token_size)
        # An adapter keeps its weight inside, and a quantised layer may have none.
        weights = (p.dtype for p in layer.attend.qkv.parameters() if p.is_floating_point())
        super_tokens = super_tokens.to(next(weights, super_tokens.dtype))
        query, key, _ = layer.attend.project(super_tokens)[:, 0].float()
        return SuperTokenMap(
            stage=stage,
            block=block,
            num_blocks=self.num_blocks[stage],
            stride=4 * 2**stage,
            super_token_size=layer.super_token_size,
            token_shape=(height, width),
            association=association[0].float().cpu(),
            query=query.cpu(),
            key=key.cpu(),
        )


def _own_cell(tokens: Tensor, super_token_size: tuple[int, int]) -> Tensor:
    """The association of tokens that belong only to the super token of their own cell."""
    (_, height, width, _), (h, w) = tokens.shape, super_token_size
    association = torch.zeros(1, -(-height // h), -(-width // w), 9, h * w, device=tokens.device)
    inside = F.pad(torch.ones(height, width, device=tokens.device), (0, -width % w, 0, -height % h))
    cells = inside.reshape(association.shape[1], h, association.shape[2], w).transpose(1, 2)
    association[0, :, :, 4] = cells.flatten(2)  # Padding belongs to no super token.
    return association
