"""SViT: the Super Token Vision Transformer as a backbone.

Huang, Zhou, Cao, He, Tan: Vision Transformer with Super Token Sampling,
CVPR 2023, https://arxiv.org/abs/2211.11167. The authors published a classifier
(https://github.com/hhb072/STViT); the same weights give the same numbers here.

From stem to backbone, in the order of the data. Behind the stem all maps are channels-last,
``(N, H, W, C)``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.torch_backend import add_residual, channels_last
from ..registry import MODELS
from . import deploy
from .super_token_attention import ATTENTIONS
from .svit_arch import (
    MIN_INPUT_SIZE,
    build_norm,
    check_arguments,
    find_pretrained,
    resolve_arch,
)


class Stem(nn.Sequential):
    """Four 3x3 convolutions, each with GELU and batch norm: an image at a quarter of its size.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the first stage; an even number.
        norm_cfg: See :class:`SViT`.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_cfg: dict) -> None:
        half = embed_dims // 2
        layers = []
        for inputs, outputs, stride in (
            (in_channels, half, 2),
            (half, half, 1),
            (half, embed_dims, 2),
            (embed_dims, embed_dims, 1),
        ):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                nn.GELU(),
                build_norm(norm_cfg, outputs),
            ]
        super().__init__(*layers)


class SuperTokenBlock(nn.Module):
    """Position embedding by convolution, super token attention, convolutional FFN.

    Args:
        layer_scale: Initial value of the layer scale; None for none.

    See :class:`SuperTokenAttention` and :class:`SViT` for the other arguments.
    """

    def __init__(
        self,
        *,
        embed_dims: int,
        num_heads: int,
        super_token_size: tuple[int, int],
        num_iters: int = 1,
        layer_scale: float | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),
        token_sampling: str = 'super_token',
        pos_embed: bool = True,
        conv_ffn: bool = True,
        ops_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.ops_backend = ops_backend
        self.pos_embed = None
        if pos_embed:
            self.pos_embed = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = ATTENTIONS[token_sampling](
            embed_dims=embed_dims,
            num_heads=num_heads,
            super_token_size=super_token_size,
            num_iters=num_iters,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            ops_backend=ops_backend,
        )
        self.norm2 = build_norm(norm_cfg, embed_dims)
        self.ffn = ConvFFN(
            embed_dims, int(embed_dims * mlp_ratio), drop_rate, conv_ffn, ops_backend
        )
        self.drop_path = DropPath(0.0)  # SViT sets it.
        self.deployed = False
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if self.pos_embed is not None:
            x = ops.add_depthwise_conv(x, self.pos_embed, self.ops_backend)
        draws = isinstance(self.drop_path, DropPath)
        kept_1, kept_2 = self.drop_path(x) if draws else (None, None)
        x = self._add_branch(x, self.attn(ops.layer_norm(x, self.norm1)), self.gamma_1, kept_1)
        if self.deployed:
            return self.ffn(x, residual=True)
        return self._add_branch(x, self.ffn(channels_last(self.norm2, x)), self.gamma_2, kept_2)

    def _add_branch(
        self, x: Tensor, branch: Tensor, gamma: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        if gamma is not None:  # Under autocast, float32 would be that of all that follows.
            branch = gamma.to(branch.dtype) * branch
        if not isinstance(self.drop_path, DropPath):  # Replaced: it takes the branch.
            branch = self.drop_path(branch)
        if kept is not None:
            return torch.addcmul(x, branch, kept, value=1 / (1 - self.drop_path.drop_prob))
        # In place where nothing needs a gradient: allocating costs more than adding.
        return add_residual(branch, x, in_place=self.deployed and not torch.is_grad_enabled())

    def check_foldable(self, name: str) -> list[nn.Parameter]:
        """Check all that :meth:`fold_into_linear` changes; return the parameters it writes into.

        Raises:
            TypeError, ValueError: It cannot be folded; see :mod:`mmsvit.models.deploy`.
        """
        deploy.check_norm(f'{name}.norm2', self.norm2)
        deploy.check_layer(f'{name}.ffn', self.ffn, ConvFFN)
        deploy.check_layer(f'{name}.drop_path', self.drop_path, DropPath, nn.Identity)
        layers: dict[str, nn.Module | None] = {'ffn.fc1': self.ffn.fc1}
        drops: dict[str, nn.Module | None] = {}
        if self.gamma_1 is not None:
            attend = getattr(self.attn, 'attend', None)
            layers['attn.attend.proj'] = getattr(attend, 'proj', None)
            drops['attn.attend.proj_drop'] = getattr(attend, 'proj_drop', None)
        if self.gamma_2 is not None:
            layers['ffn.fc2'], drops['ffn.drop'] = self.ffn.fc2, self.ffn.drop
        for key, layer in layers.items():
            deploy.check_linear(f'{name}.{key}', layer)
        for key, drop in drops.items():
            deploy.check_layer(f'{name}.{key}', drop, nn.Dropout, nn.Identity)
        return [p for layer in layers.values() if layer is not None for p in layer.parameters()]

    def fold_into_linear(self) -> None:
        """Fold the batch norm and layer scale into linear layers, for good."""
        self.deployed = True
        deploy.fold_norm_into_linear(self.norm2, self.ffn.fc1)
        self.norm2 = nn.Identity()
        if self.gamma_1 is not None:
            deploy.fold_scale_into_linear(self.attn.attend.proj, self.gamma_1)
        if self.gamma_2 is not None:
            deploy.fold_scale_into_linear(self.ffn.fc2, self.gamma_2)
        self.gamma_1 = self.gamma_2 = None


class ConvFFN(nn.Module):
    """FFN with a residual depthwise 3x3 convolution between its two layers (paper, Sec. 3.3).

    Args:
        embed_dims: Channels.
        hidden_dims: Channels between the two layers.
        drop_rate: Dropout rate behind each layer.
        conv: Whether there is the convolution; without it, it is the FFN of the paper's ablation.
        ops_backend: See :func:`mmsvit.ops.choose_backend`.
    """

    def __init__(
        self,
        embed_dims: int,
        hidden_dims: int,
        drop_rate: float = 0.0,
        conv: bool = True,
        ops_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.act = nn.GELU()
        self.dwconv = None
        if conv:
            self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)
        self.recompute = False  # SViT sets it.
        self.ops_backend = ops_backend

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C); see :func:`mmsvit.ops.conv_ffn` for ``residual``."""
        return ops.conv_ffn(
            x,
            self.fc1,
            self.act,
            self.dwconv,
            self.fc2,
            self.drop,
            residual=residual,
            recompute=self.recompute,
            backend=self.ops_backend,
        )


class DropPath(nn.Module):
    """Chooses the samples whose residual branches are dropped (stochastic depth)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Which samples of ``(N, ...)`` keep the two branches of a block.

        Returns:
            Ones and zeros, one of each branch, ``(N, 1, ...)`` in the dtype of ``x``; None if no
            branch is dropped.
        """
        if not self.training or self.drop_prob == 0.0:
            return None, None
        both = x.new_empty((2, len(x)) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return both[0], both[1]

    def extra_repr(self) -> str:
        """The rate, for ``print(model)``."""
        return f'drop_prob={self.drop_prob:g}'


@contextlib.contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch that is only computed again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    counters = [buffer for norm in norms for buffer in norm.buffers() if buffer.ndim == 0]
    counts = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for counter, count in zip(counters, counts):
            counter.copy_(count)


class Stage(nn.Module):
    """Blocks at one resolution, then the down-sampling to the next stage where there is one.

    Args:
        blocks: The blocks.
        downsample: From this stage's map to the next one's; None for the last.
        with_cp: Whether to compute the blocks again in the backward pass to save memory.
    """

    def __init__(
        self, blocks: list[SuperTokenBlock], downsample: nn.Module | None, with_cp: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C), without the down-sampling."""
        for block in self.blocks:
            if not (self.with_cp and torch.is_grad_enabled()):
                x = block(x)
            elif torch.compiler.is_compiling():  # Recomputation then leaves statistics alone.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                contexts = functools.partial(_forward_and_recomputation, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def _forward_and_recomputation(
    block: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    return contextlib.nullcontext(), _frozen_running_statistics(block)


class Feature(NamedTuple):
    """What one output of the backbone is."""

    channels: int
    stride: int


@MODELS.register_module()
class SViT(BaseModule):
    """Super Token Vision Transformer, a hierarchical backbone with strides 4, 8, 16 and 32.

    Args:
        arch: ``'small'``, ``'base'`` or ``'large'`` (:data:`ARCHS`), or a dict with
            ``embed_dims, depths, num_heads, super_token_sizes, num_iters, layer_scale``,
            four entries each.
        super_token_sizes: In place of those of a named ``arch``: four ints or (height, width)
            pairs, in tokens of the stage. A larger size is cheaper. All of 1 is plain
            global attention.
        num_iters: In place of the sampling iterations of a named ``arch``: four ints.
        token_sampling: ``'super_token'``, or ``'average_pool'`` for the mean of each cell
            in place of association, an ablation.
        pos_embed: Whether blocks begin with the convolutional position embedding; off
            is an ablation.
        conv_ffn: Whether the FFN has its depthwise convolution; off is an ablation.
        in_channels: Channels of the image.
        mlp_ratio: Width of the FFN in multiples of the stage's width.
        qkv_bias: Whether query, key and value projections have a bias.
        drop_rate: Dropout rate after the stem, attention and FFN layers.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0.
        out_indices: Which stages to return. Stages beyond the last one are not built.
        frozen_stages: Stages to freeze, parameters and statistics: 0 the stem, k the
            stem and the first k stages with their down-sampling, -1 nothing.
        norm_cfg: The batch norms: ``type`` ``'BN'`` or ``'SyncBN'``, optionally
            ``requires_grad`` and the layer's own arguments.
        norm_eval: Whether batch norms keep their running statistics in training.
        out_norm_cfg: A norm for each output, which the published classifier does not
            have: None, or ``type`` ``'LN'`` (over channels), ``'BN'`` or ``'SyncBN'``.
        with_cp: Whether to trade time for memory by gradient checkpointing: of blocks, or with
            ``'ffn'`` of the FFNs' wide maps alone, which costs less of either.
        ops_backend: Which backend computes sampling, distribution, FFN and depthwise convolutions:
            ``'auto'``, ``'torch'``, ``'cpu'`` or ``'triton'``, see
            :func:`mmsvit.ops.choose_backend`. One that cannot run where the images are
            is refused by the first forward.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH)`` for a checkpoint of the
            authors (as they publish it or converted) or of a runner; an optional
            ``prefix`` names the backbone's place in it. None starts from scratch.

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.
    """

    image_mean = (0.485, 0.456, 0.406)
    """What the published weights expect to be subtracted from RGB images of 0 to 1 (ImageNet's mean)."""
    image_std = (0.229, 0.224, 0.225)
    """What they expect RGB images of 0 to 1 to be divided by then."""

    def __init__(
        self,
        arch: str | dict = 'small',
        super_token_sizes: Sequence[int | Sequence[int]] | None = None,
        num_iters: Sequence[int] | None = None,
        token_sampling: str = 'super_token',
        pos_embed: bool = True,
        conv_ffn: bool = True,
        in_channels: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_cfg: dict = dict(type='BN'),
        norm_eval: bool = False,
        out_norm_cfg: dict | None = None,
        with_cp: bool | str = False,
        ops_backend: str = 'auto',
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = resolve_arch(arch, super_token_sizes, num_iters)
        check_arguments(
            embed_dims=arch['embed_dims'],
            token_sampling=token_sampling,
            ops_backend=ops_backend,
            in_channels=in_channels,
            mlp_ratio=mlp_ratio,
            rates=dict(
                drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
            ),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_cfg=norm_cfg,
            out_norm_cfg=out_norm_cfg,
        )
        if with_cp not in (True, False, 'ffn'):
            raise ValueError(f"with_cp must be True, False or 'ffn', found {with_cp!r}")
        self.pretrained = find_pretrained(init_cfg)
        self.arch = arch
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.ops_backend = ops_backend
        self.deployed = False
        self._warned = False
        embed_dims, depths = arch['embed_dims'], arch['depths']
        self.embed_dims = embed_dims

        self.stem: nn.Sequential = Stem(in_channels, embed_dims[0], norm_cfg)
        self.pos_drop = nn.Dropout(drop_rate)

        num_stages = max(self.out_indices) + 1
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            blocks = [
                SuperTokenBlock(
                    embed_dims=embed_dims[i],
                    num_heads=arch['num_heads'][i],
                    super_token_size=arch['super_token_sizes'][i],
                    num_iters=arch['num_iters'][i],
                    layer_scale=arch['layer_scale'][i],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_rate=drop_rate,
                    attn_drop_rate=attn_drop_rate,
                    norm_cfg=norm_cfg,
                    token_sampling=token_sampling,
                    pos_embed=pos_embed,
                    conv_ffn=conv_ffn,
                    ops_backend=ops_backend,
                )
                for _ in range(depths[i])
            ]
            downsample = None
            if i + 1 < num_stages:
                downsample = nn.Sequential(
                    nn.Conv2d(embed_dims[i], embed_dims[i + 1], 3, stride=2, padding=1),
                    build_norm(norm_cfg, embed_dims[i + 1]),
                )
            self.stages.append(Stage(blocks, downsample, bool(with_cp) and with_cp != 'ffn'))
            for block in blocks:
                block.ffn.recompute = with_cp == 'ffn'

        self.out_norms = nn.ModuleDict()
        if out_norm_cfg is not None:
            for i in self.out_indices:
                self.out_norms[str(i)] = self._build_out_norm(out_norm_cfg, embed_dims[i])
        self.set_drop_path_rate(drop_path_rate)
        self._freeze_stages()

    def set_drop_path_rate(self, rate: float) -> None:
        """Set the stochastic depth rate of the last block; it rises linearly from 0."""
        steps = max(sum(self.arch['depths']) - 1, 1)
        drops = [module for module in self.stages.modules() if isinstance(module, DropPath)]
        for i, drop in enumerate(drops):
            drop.drop_prob = rate * i / steps

    @staticmethod
    def _build_out_norm(out_norm_cfg: dict, channels: int) -> nn.Module:
        if out_norm_cfg['type'] != 'LN':
            return build_norm(out_norm_cfg, channels)
        cfg = {'eps': 1e-6, **out_norm_cfg}
        cfg.pop('type')
        return nn.LayerNorm(channels, **cfg)

    def init_weights(self) -> None:
        """Load the pretrained weights that ``init_cfg`` names, or keep PyTorch's own initialisation.

        The published model is initialised by PyTorch's defaults, too.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            ValueError: The checkpoint is not one of this model; the message names the keys.
        """
        if self.pretrained is not None and not self.is_init:  # type: ignore[has-type]
            # Here, because importing mmsvit.checkpoint changes how MMEngine reads checkpoints.
            from ..checkpoint import load_pretrained

            load_pretrained(self, self.pretrained['checkpoint'], self.pretrained.get('prefix'))
            self.is_init = True
            return
        if self.norm_eval and not self.is_init:
            print_log(
                'SViT: norm_eval=True without pretrained weights: unless load_from or resume brings '
                'some, every batch norm keeps mean 0 and variance 1 for the whole training. Set '
                'norm_eval=False to train from scratch.',
                logger='current',
                level=logging.WARNING,
            )
        # Not MMEngine's: it has nothing to initialise here, and prints a line for each weight.
        self.is_init = True

    @classmethod
    def from_pretrained(
        cls,
        arch: str | dict,
        checkpoint: str | Path,
        *,
        super_token_sizes: Sequence[int | Sequence[int]] | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        prefix: str | None = None,
    ) -> SViT:
        """A backbone with the weights of a checkpoint, in evaluation mode, to take features from.

        Images are RGB, normalised by :attr:`image_mean` and :attr:`image_std`.

        Args:
            arch: See :class:`SViT`.
            checkpoint: A file of the authors, converted or as they publish it, or of a runner.
            super_token_sizes: See :class:`SViT`.
            out_indices: See :class:`SViT`.
            prefix: The backbone's place in the checkpoint, such as ``'backbone.'``.

        Raises:
            FileNotFoundError: The checkpoint does not exist.
            ValueError: The checkpoint is not one of this model; the message names the keys.
        """
        init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), prefix=prefix)
        if prefix is None:
            del init_cfg['prefix']
        model = cls(arch, super_token_sizes, out_indices=out_indices, init_cfg=init_cfg)
        model.init_weights()
        return model.eval()

    @property
    def feature_info(self) -> tuple[Feature, ...]:
        """Channels and stride of each output."""
        return tuple(Feature(self.embed_dims[i], 4 * 2**i) for i in self.out_indices)

    def _checkpoint_filter(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Let a classifier load the file that the authors published.

        mmpretrain's ``ImageClassifier`` looks for a method of this name, and calls it before
        it loads weights.

        Args:
            state_dict: What is being loaded; changed in place.
            prefix: Where the classifier is in the model that is being loaded.

        Raises:
            ValueError: It is a published file, of another arch.
        """
        from ..checkpoint import backbone_state_dict, check_fit, model_state_dict

        if prefix or not ({'model', 'patch_embed.proj.0.weight'} & set(state_dict)):
            return
        weights = dict(model_state_dict(state_dict))
        backbone = backbone_state_dict(weights, 'backbone.')
        check_fit(backbone, self.state_dict(), "the authors' file")
        state_dict.clear()
        state_dict.update(weights)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Change the model for good into its form for inference: faster, the same outputs.

        Batch norms and layer scale are folded into the layers beside them
        (:mod:`mmsvit.models.deploy`), the FFN returns its sum with its input, and without
        gradients sums are written into what the branches returned: a hook that keeps an output
        clones it. Load weights before; a second call does nothing.

        Raises:
            TypeError, ValueError: A layer that would be folded was replaced, patched, shared or has
                hooks, or batch norms keep no running statistics. Nothing is changed then.
        """
        if self.deployed:
            return
        deploy.check_layer('stem', self.stem, Stem)
        deploy.check_stem(self.stem)
        written: list[nn.Parameter] = []
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, SuperTokenBlock):
                written += module.check_foldable(name)
            elif isinstance(module, Stage) and isinstance(module.downsample, nn.Sequential):
                deploy.check_conv_and_norm(f'{name}.downsample', module.downsample)
        deploy.check_unshared(written)
        self.stem = deploy.fuse_activations_and_norms(self.stem, self.ops_backend)
        for module in list(self.modules()):
            if isinstance(module, SuperTokenBlock):
                module.fold_into_linear()
            elif isinstance(module, Stage) and isinstance(module.downsample, nn.Sequential):
                module.downsample = deploy.fuse_conv_and_norm(module.downsample)
        # Convolutions of channels-last maps copy kernels of another layout at every call.
        self.to(memory_format=torch.channels_last)
        self.eval()
        self.deployed = True
        self.register_load_state_dict_pre_hook(deploy.refuse_weights)

    def _freeze_stages(self) -> None:
        frozen: list[nn.Module] = [self.stem] if self.frozen_stages >= 0 else []
        frozen += list(self.stages)[: max(self.frozen_stages, 0)]
        for module in frozen:
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> SViT:
        """Set training mode, except for what ``frozen_stages`` and ``norm_eval`` hold fast.

        Raises:
            RuntimeError: The model was switched to its form for inference.
        """
        if mode and self.deployed:
            raise RuntimeError(
                'this SViT was switched to its form for inference, which cannot be trained; build '
                'it anew and load its checkpoint'
            )
        super().train(mode)
        if mode:
            self._freeze_stages()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of a parameter for layer-wise learning rate decay.

        The stem is 0, the blocks count from 1, a down-sampling belongs to the block
        before it, and everything behind the last block shares the last number.

        Args:
            param_name: Name of the parameter.
            prefix: What precedes the backbone's own names, such as ``'backbone.'``.

        Returns:
            The depth, and the number of depths.
        """
        depths = self.arch['depths'][: len(self.stages)]
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split('.')
        if parts[0] == 'stem':
            return 0, num_layers
        if parts[0] == 'stages':
            stage = int(parts[1])
            block = int(parts[3]) if parts[2] == 'blocks' else depths[stage] - 1
            return 1 + sum(depths[:stage]) + block, num_layers
        return num_layers - 1, num_layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of ``out_indices``.

        Args:
            x: Images, ``(N, in_channels, H, W)``, H and W of any value from 32 up.

        Returns:
            For each index i, a contiguous map of ``(N, embed_dims[i], ceil(H/s), ceil(W/s))``
            with stride s = 4, 8, 16, 32. (Contiguous because MMCV's RoIAlign reads any map
            as if it were.)

        Raises:
            ValueError: The input is not such a batch of images.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'SViT expects images of shape (N, {self.in_channels}, H, W), found {tuple(x.shape)}'
            )
        if x.shape[2] < MIN_INPUT_SIZE or x.shape[3] < MIN_INPUT_SIZE:
            raise ValueError(
                f'SViT expects images of {MIN_INPUT_SIZE}x{MIN_INPUT_SIZE} pixels or more, '
                f'found {x.shape[2]}x{x.shape[3]}; resize or pad them'
            )
        if not (self._warned or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._warn_of_large_cells(*x.shape[2:])
        x = self.stem(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = []
        for i, stage in enumerate(cast(Iterable[Stage], self.stages)):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(self._output(i, x))
            if stage.downsample is not None:
                x = channels_last(stage.downsample, x)
        return tuple(outputs)

    def _warn_of_large_cells(self, height: int, width: int) -> None:
        """Say once if a stage's map is smaller than its super tokens: what is left is padding."""
        for i in range(len(self.stages)):
            stride, cell = 4 * 2**i, self.arch['super_token_sizes'][i]
            size = -(-height // stride), -(-width // stride)
            if cell[0] > size[0] or cell[1] > size[1]:
                self._warned = True
                print_log(
                    f'SViT: super tokens of {cell[0]}x{cell[1]} tokens are larger than the map of '
                    f'stage {i + 1}, {size[0]}x{size[1]} tokens of an image of {height}x{width} '
                    'pixels: most of a super token is padding. For such images, set smaller '
                    'super_token_sizes in the backbone.',
                    logger='current',
                    level=logging.WARNING,
                )
                return

    def _output(self, stage: int, x: Tensor) -> Tensor:
        """(N, H, W, C) -> contiguous (N, C, H, W), normalised if there is an output norm."""
        if str(stage) in self.out_norms:
            norm = self.out_norms[str(stage)]
            x = norm(x) if isinstance(norm, nn.LayerNorm) else channels_last(norm, x)
        return ops.channels_first(x, self.ops_backend)
