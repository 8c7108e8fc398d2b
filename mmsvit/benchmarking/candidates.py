"""The models to measure and their forms, by a compact name.

``NAME[:SIZES][+FLAG...]``, such as ``svit-s``, ``svit-s:16-8-2-1+deploy+compile`` or ``swin-t``.
Nothing is downloaded: weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models.svit_arch import ARCHS
from ..ops.backend import BACKENDS

SVIT_ARCHS = {'svit-s': 'small', 'svit-b': 'base', 'svit-l': 'large'}
_DROP_PATH = {'svit-s': 0.15, 'svit-b': 0.4, 'svit-l': 0.5}

_SWIN = dict(
    type='mmdet.SwinTransformer', embed_dims=96, num_heads=[3, 6, 12, 24], drop_path_rate=0.0
)
PEERS: dict[str, tuple[dict, list[int]]] = {
    'swin-t': (dict(_SWIN, depths=[2, 2, 6, 2]), [96, 192, 384, 768]),
    'swin-s': (dict(_SWIN, depths=[2, 2, 18, 2]), [96, 192, 384, 768]),
    'r50': (dict(type='mmdet.ResNet', depth=50, norm_eval=False), [256, 512, 1024, 2048]),
    'pvtv2-b2': (
        dict(
            type='mmdet.PyramidVisionTransformerV2',
            embed_dims=64,
            num_layers=[3, 4, 6, 3],
            drop_path_rate=0.0,
        ),
        [64, 128, 320, 512],
    ),
    'convnext-t': (
        dict(
            type='mmpretrain.ConvNeXt',
            arch='tiny',
            out_indices=[0, 1, 2, 3],
            layer_scale_init_value=1.0,
            gap_before_final_norm=False,
        ),
        [96, 192, 384, 768],
    ),
}
"""Configs of backbones as detectors use them, and the channels of their four outputs.

Nothing is frozen and no path is dropped, so that a training step is the same work every time.
"""

TRAINED_AS: dict[str, dict] = {
    **{name: dict(norm_eval=True, drop_path_rate=rate) for name, rate in _DROP_PATH.items()},
    'swin-t': dict(drop_path_rate=0.2),
    'swin-s': dict(drop_path_rate=0.3),
    'r50': dict(norm_eval=True, frozen_stages=1),
    'pvtv2-b2': dict(drop_path_rate=0.1),
    'convnext-t': dict(drop_path_rate=0.4),
}
"""What detectors train them with, besides."""

SVIT_FLAGS = {
    'deploy': 'the inference form, model.switch_to_deploy()',
    'recompute': "with_cp='ffn': the backward pass computes the wide maps of the FFNs again",
    'cp': 'with_cp=True: the backward pass computes whole blocks again',
    **{name: f'the {name} backend' for name in BACKENDS[1:]},
}
FLAGS = {
    **SVIT_FLAGS,
    'compile': 'torch.compile of the backbone',
    'channels-last': 'weights and images in the channels-last memory format',
    'graph': 'the run captured once in a CUDA graph and replayed',
}
"""Forms of a candidate, and what they mean."""

DEFAULT_MODELS = ['svit-s', 'svit-s:16-8-2-1', 'swin-t', 'r50', 'pvtv2-b2', 'convnext-t']
DEFAULT_REFERENCE = 'swin-t'


@dataclass(frozen=True)
class Candidate:
    """A model in one form.

    Attributes:
        name: As it was written, ``NAME[:SIZES][+FLAG...]``.
        model: Of :data:`SVIT_ARCHS` or :data:`PEERS`.
        super_token_sizes: Of each stage, in tokens; None for those of the arch.
        flags: Of :data:`FLAGS`.
    """

    name: str
    model: str
    super_token_sizes: tuple[int, ...] | None
    flags: frozenset[str]

    @property
    def is_svit(self) -> bool:
        """Whether it is an SViT, not a peer."""
        return self.model in SVIT_ARCHS

    @property
    def backend(self) -> str:
        """The backend; ``'auto'`` by default."""
        return next((name for name in BACKENDS[1:] if name in self.flags), 'auto')

    @property
    def arch(self) -> dict:
        """The architecture of an SViT, with its super token sizes."""
        arch = dict(ARCHS[SVIT_ARCHS[self.model]])
        if self.super_token_sizes is not None:
            arch['super_token_sizes'] = self.super_token_sizes
        return arch

    @property
    def backbone(self) -> dict:
        """Config of the backbone as in a detector, without weights."""
        if self.is_svit:
            return dict(
                type='mmsvit.SViT',
                arch=self.arch,
                out_norm_cfg=dict(type='LN'),
                ops_backend=self.backend,
                with_cp='ffn' if 'recompute' in self.flags else 'cp' in self.flags,
            )
        return dict(PEERS[self.model][0])

    @property
    def trained_as(self) -> dict:
        """Further settings of the backbone when a detector is trained."""
        return dict(TRAINED_AS[self.model])

    @property
    def out_channels(self) -> list[int]:
        """Channels of the backbone's four outputs."""
        return list(self.arch['embed_dims']) if self.is_svit else PEERS[self.model][1]


def parse_candidate(name: str) -> Candidate:
    """Read ``NAME[:SIZES][+FLAG...]``.

    Raises:
        ValueError: The model or a flag is unknown, or the parts do not fit together.
    """
    rest, *flags = name.split('+')
    model, has_sizes, sizes = rest.partition(':')
    if model not in SVIT_ARCHS and model not in PEERS:
        raise ValueError(f'{name!r}: no model {model!r}; use one of {", ".join(known_models())}')
    unknown = [flag for flag in flags if flag not in FLAGS]
    if unknown:
        raise ValueError(f'{name!r}: no flag {unknown[0]!r}; use one of {", ".join(FLAGS)}')
    if len(set(BACKENDS) & set(flags)) > 1:
        raise ValueError(f'{name!r}: name one backend, not several')
    if {'recompute', 'cp'} <= set(flags):
        raise ValueError(f'{name!r}: +recompute is a part of +cp; use one of them')
    if model in PEERS:
        of_svit = [flag for flag in flags if flag in SVIT_FLAGS] + [sizes] * bool(has_sizes)
        if of_svit:
            raise ValueError(f'{name!r}: {of_svit[0]!r} is for SViT only, not for {model}')
    parsed = None
    if has_sizes:
        parts = sizes.split('-')
        if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(
                f'{name!r}: super token sizes are four whole numbers of 1 or more, one for each '
                f'stage, such as 16-8-2-1, found {sizes!r}'
            )
        parsed = tuple(map(int, parts))
    return Candidate(name, model, parsed, frozenset(flags))


def known_models() -> list[str]:
    """The names of all models."""
    return [*SVIT_ARCHS, *PEERS]
