"""Which pixels each super token stands for, and which pixels attention looks at from a point.

The sampling of one layer, attention among its super tokens and the way back are three matrices
(paper, Sec. 3.2): what a token gets is a weighted sum over all tokens. Here are these weights,
and the one that takes most of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.super_token_attention import PooledAttention, SuperTokenAttention
from ..models.svit import SViT
from ..ops import distribute
from ..ops.torch_backend import EPS, scatter_neighbours

PHASES = 4
"""Super tokens this many cells apart share no token, with a cell between them to spare."""


@dataclass(frozen=True)
class SuperTokenMap:
    """The super tokens of one attention layer for one image.

    Attributes:
        stage: Counted from 0, as in ``out_indices``.
        block: Counted from 0 within the stage.
        num_blocks: Blocks of the stage.
        stride: Pixels of the input from one token to the next.
        super_token_size: Height and width in tokens of the cell that a super token starts from.
        token_shape: Height and width of the stage's map.
        association: How much tokens belong to the super tokens around them,
            ``(Gh, Gw, 9, h*w)``, see :func:`mmsvit.ops.sample`.
        query: ``(heads, Gh*Gw, channels of a head)``.
        key: The same shape.
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
        """The super token that each pixel belongs to most.

        The shares of the tokens are interpolated between them before they are compared, so
        that borders are smooth.

        Args:
            size: Height and width of the result.
            image_size: Height and width in pixels of the part of the input, from its upper
                left corner, that the result shows; by default ``size``.
            smooth: Blur the shares over 3x3 tokens, where cells are larger than that. Where an
                image has one colour, neighbours have equal shares, and noise would decide.

        Returns:
            Numbers of super tokens, counted row by row over the grid, int64 of ``size``.
        """
        grid_h, grid_w = self.grid
        h, w = self.super_token_size
        rows, columns = self._positions(size, image_size or size, self.association.device)
        cell_rows, cell_columns = (rows + 0.5) / h - 0.5, (columns + 0.5) / w - 0.5
        # Neighbours as (row, column); a fourth of each, for super tokens too far away, is 0.
        shares = self.association.reshape(grid_h, grid_w, 3, 3, h * w)
        shares = F.pad(shares * self._inside(), (0, 0, 0, 1, 0, 1))

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
        """How much each token counts in what a point gets from this layer.

        Args:
            point: Row and column in pixels of the input.
            of: ``'pixel'`` for the mixture of super tokens that the point belongs to,
                ``'super_token'`` for the one that it belongs to most.
            head: One of the heads, counted from 0; by default the mean of all.

        Returns:
            Weights of ``token_shape`` as multiples of their mean over all tokens, padding
            included: 1 is what each would have if they counted the same.

        Raises:
            ValueError: There is no such head or ``of``, or the point is outside the map.
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

        # A super token is the mean of its tokens: each of them counts by its part of the mass.
        association = self.association[None]
        weights = (attention / self._mass()).reshape(1, *self.grid, 1)
        weights = distribute(association, weights, self.super_token_size, self.token_shape, 'torch')
        return weights[0, ..., 0] * (association.numel() / 9)

    def to_pixels(
        self, tokens: Tensor, size: tuple[int, int], image_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Interpolate a map of ``token_shape`` between the tokens.

        Args:
            tokens: ``(H, W)``.
            size: See :meth:`hard_assignment`.
            image_size: The same.
        """
        rows, columns = self._positions(size, image_size or size, tokens.device)
        return _interpolate(tokens[None], rows, columns)[0]

    def _positions(
        self, size: tuple[int, int], image_size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows and columns of pixels in the map of tokens.

        The convolutions that lead to a stage, of stride 2 and padding 1, centre token i on
        pixel ``stride * i``.
        """
        rows, columns = (
            ((torch.arange(n, device=device) + 0.5) * (pixels / n) - 0.5) / self.stride
            for n, pixels in zip(size, image_size)
        )
        height, width = self.token_shape
        return rows.clamp(0, height - 1), columns.clamp(0, width - 1)

    def _inside(self) -> Tensor:
        """Which of the nine neighbours there are: ``(Gh, Gw, 3, 3, 1)``."""
        around = torch.arange(-1, 2, device=self.association.device)
        rows, columns = (torch.arange(n, device=around.device)[:, None] + around for n in self.grid)
        in_rows, in_columns = (
            (index >= 0) & (index < n) for index, n in zip((rows, columns), self.grid)
        )
        return (in_rows[:, None, :, None] & in_columns[None, :, None, :])[..., None]

    def _share_of_token(self, row: int, column: int) -> Tensor:
        """How much one token belongs to every super token, ``(Gh*Gw,)``."""
        (h, w), (grid_h, grid_w) = self.super_token_size, self.grid
        cell_row, cell_column = row // h, column // w
        share = self.association.new_zeros(grid_h + 2, grid_w + 2)
        nine = self.association[cell_row, cell_column, :, row % h * w + column % w]
        share[cell_row : cell_row + 3, cell_column : cell_column + 3] = nine.reshape(3, 3)
        return share[1:-1, 1:-1].flatten()

    def _mass(self) -> Tensor:
        """How much of all tokens each super token has, ``(Gh*Gw,)``."""
        received = self.association.sum(dim=-1, keepdim=True)
        return scatter_neighbours(received[None]).flatten() + EPS


def _phase(phase: int, cells: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every fourth super token along one axis: which one is near, and is which neighbour.

    Args:
        phase: Number of the first one.
        cells: Positions of pixels, in cells from the centre of the first one.
        grid: How many super tokens there are along the axis.

    Returns:
        For each pixel the number of the nearest, and whether there is one of that number; for
        each cell, which of its neighbours it is, 3 for none.
    """
    nearest = phase + PHASES * ((cells - phase) / PHASES).round().long()
    neighbours = (phase - torch.arange(grid, device=cells.device) + 1) % PHASES
    return nearest, (nearest >= 0) & (nearest < grid), neighbours


def _blur(maps: Tensor) -> Tensor:
    """Blur ``(K, H, W)`` by 1 2 1 along both axes."""
    kernel = maps.new_tensor([1, 2, 1]) / 4
    kernel = (kernel[:, None] * kernel).expand(1, 1, 3, 3)
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode='replicate'), kernel)[:, 0]


def _interpolate(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values of ``(K, H, W)`` at all pairs of fractional rows and columns, bilinear."""
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
    """Keep what the backbone's attention layers see while this context is entered.

        with SuperTokenRecorder(model.backbone) as recorder:
            model.test_step(data)
        maps = recorder.maps()

    Args:
        backbone: The model; nothing in it is changed for longer than the context.
        stages: Which stages, counted from 0; by default those with super tokens.
        block: Which block of each, counted from 0, or from -1 backwards.
        max_images: Keep that many images of a batch; by default all.

    Raises:
        ValueError: There is no such stage or block, or none samples super tokens.
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
                raise ValueError('no stage of this backbone samples super tokens; name the stages')
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
        self._images: Tensor | None = None
        self._kept: dict[nn.Module, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> SuperTokenRecorder:
        watched: list[nn.Module] = [self.backbone]
        for layer in self.layers.values():
            watched += [layer, layer.attend]
        for module in watched:
            self._hooks.callback(module.register_forward_pre_hook(self._keep).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept = inputs[0][: self.max_images].detach().clone()
        if module is self.backbone:
            self._images = kept
        else:
            self._kept[module] = kept

    @property
    def images(self) -> Tensor:
        """The images that the backbone got, ``(N, C, H, W)``.

        Raises:
            RuntimeError: There was no forward pass within the context.
        """
        if self._images is None:
            raise RuntimeError('no forward pass of the backbone since the recording began')
        return self._images

    @torch.no_grad()
    def maps(self) -> list[list[SuperTokenMap]]:
        """What the last forward pass did: for each image a map of each layer, first stage first.

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
        if layer.has_super_tokens and not isinstance(layer, PooledAttention):
            _, association = layer.sample(tokens)
        else:
            association = _own_cell(tokens, layer.super_token_size)
        super_tokens = super_tokens.to(layer.attend.qkv.weight.dtype)
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
    """The association of tokens that belong to the super token of their own cell alone."""
    (_, height, width, _), (h, w) = tokens.shape, super_token_size
    association = torch.zeros(1, -(-height // h), -(-width // w), 9, h * w, device=tokens.device)
    there = F.pad(torch.ones(height, width, device=tokens.device), (0, -width % w, 0, -height % h))
    cells = there.reshape(association.shape[1], h, association.shape[2], w).transpose(1, 2)
    association[0, :, :, 4] = cells.flatten(2)  # The padding belongs to nobody.
    return association
