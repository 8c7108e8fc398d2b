"""SViT: the Super Token Vision Transformer as a backbone.

Huang, Zhou, Cao, He, Tan: Vision Transformer with Super Token Sampling,
CVPR 2023, https://arxiv.org/abs/2211.11167. The authors published a classifier
(https://github.com/hhb072/STViT); the same weights give the same numbers here.

The file reads from the inside out: drop path, convolutional FFN, block, stage,
backbone. Inside the backbone all maps are channels-last, ``(N, H, W, C)``.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from . import deploy
from .checkpoint import backbone_state_dict, check_fit, load_pretrained, model_state_dict
from .ops.backend import BACKENDS
from .ops.channels_first import channels_first
from .ops.conv_ffn import add, conv_ffn, convolve_and_add
from .registry import MODELS
from .super_token_attention import ATTENTIONS

ARCHS: dict[str, dict] = {
    'small': dict(
        embed_dims=(64, 128, 320, 512),
        depths=(3, 5, 9, 3),
        num_heads=(1, 2, 5, 8),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, None, None),
    ),
    'base': dict(
        embed_dims=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
    'large': dict(
        embed_dims=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        super_token_sizes=(8, 4, 1, 1),
        num_iters=(1, 1, 1, 1),
        layer_scale=(None, None, 1e-6, 1e-6),
    ),
}
"""The published architectures, one entry for each of the four stages.

``super_token_sizes`` are in tokens of the stage, an int or (height, width);
``layer_scale`` is the initial value, or None for no layer scale.
"""

NUM_STAGES = 4
MIN_INPUT_SIZE = 32
NORM_LAYERS = {'BN': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _resolve_arch(
    arch: str | dict, super_token_sizes: Sequence | None, num_iters: Sequence[int] | None
) -> dict[str, tuple]:
    """Check ``arch`` and return it with a tuple of four under each key."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch {arch!r} is unknown; use one of {list(ARCHS)} or a dict')
        arch = ARCHS[arch]
    elif not isinstance(arch, dict):
        raise TypeError(f'arch must be a name or a dict, found {type(arch).__name__}: {arch!r}')
    keys = set(ARCHS['small'])
    if set(arch) != keys:
        raise ValueError(
            f'arch has wrong keys: missing {sorted(keys - set(arch))}, '
            f'unknown {sorted(set(arch) - keys)}; a dict needs exactly {sorted(keys)}'
        )
    arch = dict(arch)
    if super_token_sizes is not None:
        arch['super_token_sizes'] = super_token_sizes
    if num_iters is not None:
        arch['num_iters'] = num_iters
    for key, values in arch.items():
        if not isinstance(values, (list, tuple)) or len(values) != NUM_STAGES:
            raise ValueError(
                f'{key} needs {NUM_STAGES} entries, one for each stage, found {values!r}'
            )
        arch[key] = tuple(values)
    for key in ('embed_dims', 'depths', 'num_heads', 'num_iters'):
        if not all(_is_int(value) and value >= 1 for value in arch[key]):
            raise ValueError(f'{key} must be whole numbers of 1 or more, found {arch[key]}')
    for dims, heads in zip(arch['embed_dims'], arch['num_heads']):
        if dims % heads:
            raise ValueError(
                f'num_heads must divide embed_dims in every stage: {heads} does not divide {dims} '
                f'(num_heads={arch["num_heads"]}, embed_dims={arch["embed_dims"]})'
            )
    if arch['embed_dims'][0] % 2:
        raise ValueError(
            f'embed_dims[0] must be even, half of it is the width of the stem, '
            f'found {arch["embed_dims"][0]}'
        )
    sizes = [
        tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        for size in arch['super_token_sizes']
    ]
    if not all(len(size) == 2 and all(_is_int(s) and s >= 1 for s in size) for size in sizes):
        raise ValueError(
            'super_token_sizes must be whole numbers of 1 or more, or pairs (height, width) of '
            f'them, found {arch["super_token_sizes"]}'
        )
    arch['super_token_sizes'] = tuple(sizes)
    for value in arch['layer_scale']:
        if value is not None and not _is_number(value):
            raise ValueError(
                'layer_scale holds the initial value of each stage or None for no layer scale, '
                f'found {arch["layer_scale"]}'
            )
    return arch


def _find_pretrained(init_cfg: dict | list | None) -> dict | None:
    """The entry of ``init_cfg`` that names a checkpoint, in any of the ways MMEngine allows."""
    entries = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    found = [
        entry
        for entry in entries
        if isinstance(entry, dict)
        and (
            entry.get('type') is PretrainedInit
            or str(entry.get('type')).rpartition('.')[2] in ('Pretrained', 'PretrainedInit')
        )
    ]
    if not found:
        return None
    if len(entries) > 1:
        raise ValueError(
            f'init_cfg of type Pretrained must be alone: it sets every weight; found {init_cfg}'
        )
    if not found[0].get('checkpoint'):
        raise ValueError(f'init_cfg of type Pretrained needs a checkpoint, found {found[0]}')
    return found[0]


def _build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    cfg = dict(norm_cfg)
    requires_grad = cfg.pop('requires_grad', True)
    norm = NORM_LAYERS[cfg.pop('type')](channels, **cfg)
    for parameter in norm.parameters():
        parameter.requires_grad = requires_grad
    return norm


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that wants (N, C, H, W) to ``x`` of (N, H, W, C), without a copy."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Drop the residual branch of a random part of the samples (stochastic depth)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:g}'


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer's weights say all about it.

    Somebody may have put another in its place, say for low-rank adaptation, or listen to it.
    """
    if layer is None or (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return False
    if type(layer) is nn.GELU:
        return layer.approximate == 'none'
    return type(layer) in (nn.Linear, nn.Conv2d)


class ConvFFN(nn.Module):
    """FFN with a residual depthwise 3x3 convolution between its two layers (paper, Sec. 3.3).

    Without the convolution (``conv=False``) it is the plain FFN of the paper's ablation.
    """

    def __init__(
        self, embed_dims: int, hidden_dims: int, drop: float = 0.0, conv: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.act = nn.GELU()
        self.dwconv = None
        if conv:
            self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C), with ``residual`` added to ``x``, maybe into its memory."""
        layers = (self.fc1, self.dwconv, self.fc2)
        plain = all(_is_plain(layer) for layer in (*layers, self.act))
        if plain and not (self.training and self.drop.p):
            weights = ((layer.weight, layer.bias) for layer in layers)
            return conv_ffn(x, *weights, residual=residual)
        hidden = self.drop(self.act(self.fc1(x)))
        if self.dwconv is not None:
            hidden = hidden + _channels_last(self.dwconv, hidden)
        output = self.drop(self.fc2(hidden))
        return x + output if residual else output


class SuperTokenBlock(nn.Module):
    """Position embedding by convolution, super token attention, convolutional FFN.

    See :class:`SViT` for the arguments.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        super_token_size: tuple[int, int],
        num_iters: int,
        layer_scale: float | None,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        norm_cfg: dict,
        token_sampling: str = 'super_token',
        pos_embed: bool = True,
        conv_ffn: bool = True,
        ops_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.pos_embed = None
        if pos_embed:
            self.pos_embed = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = ATTENTIONS[token_sampling](
            embed_dims,
            num_heads,
            super_token_size,
            num_iters,
            qkv_bias,
            attn_drop_rate,
            drop_rate,
            ops_backend,
        )
        self.norm2 = _build_norm(norm_cfg, embed_dims)
        self.ffn = ConvFFN(embed_dims, int(embed_dims * mlp_ratio), drop_rate, conv_ffn)
        self.drop_path = DropPath(drop_path_rate)
        self.deployed = False
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))
            self.gamma_2 = nn.Parameter(torch.full((embed_dims,), float(layer_scale)))

    def _add_branch(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        branch = self.drop_path(branch if gamma is None else gamma * branch)
        # Into memory that is there: new memory costs more than the sum.
        return add(branch, x, in_place=self.deployed)

    def fold_into_linear(self) -> None:
        """Fold the batch norm and layer scale into linear layers, for good."""
        self.deployed = True
        deploy.fold_norm_into_linear(self.norm2, self.ffn.fc1)
        self.norm2 = nn.Identity()
        if self.gamma_1 is not None:
            deploy.fold_scale_into_linear(self.attn.attend.proj, self.gamma_1)
            deploy.fold_scale_into_linear(self.ffn.fc2, self.gamma_2)
            self.gamma_1 = self.gamma_2 = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if _is_plain(self.pos_embed):
            x = convolve_and_add(x, self.pos_embed.weight, self.pos_embed.bias)
        elif self.pos_embed is not None:
            x = x + _channels_last(self.pos_embed, x)
        x = self._add_branch(x, self.attn(self.norm1(x)), self.gamma_1)
        if self.deployed:
            return self.ffn(x, residual=True)
        return self._add_branch(x, self.ffn(_channels_last(self.norm2, x)), self.gamma_2)


@contextlib.contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keep batch norms from counting a batch that is only computed again."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)


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
            elif torch.compiler.is_compiling():  # What it computes again counts no batch.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    context_fn=lambda b=block: (
                        contextlib.nullcontext(),
                        _frozen_running_statistics(b),
                    ),
                )
        return x


@MODELS.register_module()
class SViT(BaseModule):
    """Super Token Vision Transformer, a hierarchical backbone with strides 4, 8, 16 and 32.

    Args:
        arch: ``'small'``, ``'base'`` or ``'large'`` (:data:`ARCHS`), or a dict with
            ``embed_dims, depths, num_heads, super_token_sizes, num_iters, layer_scale``,
            four entries each.
        super_token_sizes: Overrides those of ``arch``: four ints or (height, width)
            pairs, in tokens of the stage. A larger size is cheaper. All of 1 is plain
            global attention.
        num_iters: Overrides the sampling iterations of ``arch``: four ints.
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
        with_cp: Whether to trade time for memory by gradient checkpointing.
        ops_backend: Who computes super token sampling: ``'auto'``, ``'torch'`` or ``'triton'``,
            see :func:`mmsvit.ops.choose_backend`. One that cannot run where the images are
            is refused by the first forward.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH)`` for a checkpoint of the
            authors (as they publish it or converted) or of a runner; an optional
            ``prefix`` names the backbone's place in it. None starts from scratch.

    Raises:
        TypeError, ValueError: An argument is not as described; the message names it.
    """

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
        with_cp: bool = False,
        ops_backend: str = 'auto',
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        arch = _resolve_arch(arch, super_token_sizes, num_iters)
        if token_sampling not in ATTENTIONS:
            raise ValueError(
                f'token_sampling must be one of {list(ATTENTIONS)}, found {token_sampling!r}'
            )
        if ops_backend not in BACKENDS:
            raise ValueError(f'ops_backend must be one of {list(BACKENDS)}, found {ops_backend!r}')
        self._check_arguments(
            embed_dims=arch['embed_dims'],
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
        self.pretrained = _find_pretrained(init_cfg)
        self.arch = arch
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.deployed = False
        embed_dims, depths = arch['embed_dims'], arch['depths']
        self.embed_dims = embed_dims

        width = embed_dims[0]
        stem_convs = []
        for inputs, outputs, stride in (
            (in_channels, width // 2, 2),
            (width // 2, width // 2, 1),
            (width // 2, width, 2),
            (width, width, 1),
        ):
            stem_convs += [
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
                nn.GELU(),
                _build_norm(norm_cfg, outputs),
            ]
        self.stem = nn.Sequential(*stem_convs)
        self.pos_drop = nn.Dropout(drop_rate)

        num_stages = max(self.out_indices) + 1
        steps = max(sum(depths) - 1, 1)
        drop_path_rates = [drop_path_rate * i / steps for i in range(sum(depths))]
        self.stages = nn.ModuleList()
        for i in range(num_stages):
            first = sum(depths[:i])
            blocks = [
                SuperTokenBlock(
                    embed_dims[i],
                    arch['num_heads'][i],
                    arch['super_token_sizes'][i],
                    arch['num_iters'][i],
                    arch['layer_scale'][i],
                    mlp_ratio,
                    qkv_bias,
                    drop_rate,
                    attn_drop_rate,
                    rate,
                    norm_cfg,
                    token_sampling,
                    pos_embed,
                    conv_ffn,
                    ops_backend,
                )
                for rate in drop_path_rates[first : first + depths[i]]
            ]
            downsample = None
            if i + 1 < num_stages:
                downsample = nn.Sequential(
                    nn.Conv2d(embed_dims[i], embed_dims[i + 1], 3, stride=2, padding=1),
                    _build_norm(norm_cfg, embed_dims[i + 1]),
                )
            self.stages.append(Stage(blocks, downsample, with_cp))

        self.out_norms = nn.ModuleDict()
        if out_norm_cfg is not None:
            for i in self.out_indices:
                self.out_norms[str(i)] = self._build_out_norm(out_norm_cfg, embed_dims[i])
        self._freeze_stages()

    @staticmethod
    def _check_arguments(
        embed_dims: tuple[int, ...],
        in_channels: int,
        mlp_ratio: float,
        rates: dict[str, float],
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_cfg: dict,
        out_norm_cfg: dict | None,
    ) -> None:
        if not _is_int(in_channels) or in_channels < 1:
            raise ValueError(
                f'in_channels must be a whole number of 1 or more, found {in_channels!r}'
            )
        if not _is_number(mlp_ratio) or int(mlp_ratio * min(embed_dims)) < 1:
            raise ValueError(f'mlp_ratio must make the FFN at least 1 wide, found {mlp_ratio!r}')
        for name, rate in rates.items():
            if not _is_number(rate) or not 0 <= rate < 1:
                raise ValueError(f'{name} must be in [0, 1), found {rate!r}')
        if (
            not isinstance(out_indices, (list, tuple))
            or not out_indices
            or not all(_is_int(i) and 0 <= i < NUM_STAGES for i in out_indices)
            or list(out_indices) != sorted(set(out_indices))
        ):
            raise ValueError(
                f'out_indices must be ascending stage numbers from 0 to {NUM_STAGES - 1}, '
                f'found {out_indices!r}'
            )
        if not _is_int(frozen_stages) or not -1 <= frozen_stages <= NUM_STAGES:
            raise ValueError(
                f'frozen_stages must be from -1 (none) to {NUM_STAGES}, found {frozen_stages!r}'
            )
        allowed = tuple(NORM_LAYERS)
        if not isinstance(norm_cfg, dict) or norm_cfg.get('type') not in allowed:
            raise ValueError(f'norm_cfg needs a type out of {allowed}, found {norm_cfg!r}')
        allowed = ('LN', *NORM_LAYERS)
        if out_norm_cfg is not None and (
            not isinstance(out_norm_cfg, dict) or out_norm_cfg.get('type') not in allowed
        ):
            raise ValueError(
                f'out_norm_cfg must be None or have a type out of {allowed}, found {out_norm_cfg!r}'
            )

    @staticmethod
    def _build_out_norm(out_norm_cfg: dict, channels: int) -> nn.Module:
        if out_norm_cfg['type'] != 'LN':
            return _build_norm(out_norm_cfg, channels)
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
        if self.pretrained is not None:
            load_pretrained(self, self.pretrained['checkpoint'], self.pretrained.get('prefix'))
            return
        if self.norm_eval:
            print_log(
                'SViT: norm_eval=True without pretrained weights: unless load_from or resume brings '
                'some, every batch norm keeps mean 0 and variance 1 for the whole training. Set '
                'norm_eval=False to train from scratch.',
                logger='current',
                level=logging.WARNING,
            )
        super().init_weights()

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
        (:mod:`mmsvit.deploy`), and sums are written into what the branches returned. Load
        weights before; a second call does nothing.
        """
        if self.deployed:
            return
        self.stem = deploy.fuse_activations_and_norms(self.stem)
        for stage in self.stages:
            for block in stage.blocks:
                block.fold_into_linear()
            if stage.downsample is not None:
                stage.downsample = deploy.fuse_conv_and_norm(stage.downsample)
        # Convolutions of channels-last maps copy kernels of another layout at every call.
        self.to(memory_format=torch.channels_last)
        self.eval()
        self.deployed = True
        self.register_load_state_dict_pre_hook(deploy.refuse_weights)

    def _freeze_stages(self) -> None:
        frozen = [self.stem] if self.frozen_stages >= 0 else []
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
        x = self.stem(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(self._output(i, x))
            if stage.downsample is not None:
                x = _channels_last(stage.downsample, x)
        return tuple(outputs)

    def _output(self, stage: int, x: Tensor) -> Tensor:
        """(N, H, W, C) -> contiguous (N, C, H, W), normalised if there is an output norm."""
        if str(stage) in self.out_norms:
            norm = self.out_norms[str(stage)]
            x = norm(x) if isinstance(norm, nn.LayerNorm) else _channels_last(norm, x)
        return channels_first(x)
