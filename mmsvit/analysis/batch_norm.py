"""How far the batch norms' stored statistics are from those of other images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_SHIFT = 0.25
RATIOS = 0.7, 1.4


@dataclass
class BatchNormDrift:
    """Statistics of what a batch norm is given, beside those that it stores.

    Attributes:
        name: The layer's, in the model.
        norm: The layer.
    """

    name: str
    norm: _BatchNorm
    _count: int = 0
    _sums: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Count the pixels of a map, ``(N, C, H, W)``."""
        x = x.detach().double()
        dims = 0, 2, 3
        sums = [x.sum(dims), x.square().sum(dims)]
        self._sums = [a + b for a, b in zip(self._sums, sums)] if self._sums else sums
        self._count += x.numel() // x.shape[1]

    @property
    def shift(self) -> Tensor:
        """|mean - stored mean| of each channel, in stored standard deviations; ``(C,)``, float64."""
        assert self.norm.running_mean is not None
        mean = self._sums[0] / self._count
        return (mean - self.norm.running_mean).abs() / self._stored_variance.sqrt()

    @property
    def ratio(self) -> Tensor:
        """Variance / stored variance of each channel; ``(C,)``, float64."""
        mean = self._sums[0] / self._count
        variance = (self._sums[1] / self._count - mean.square()).clamp_min(0) + self.norm.eps
        return variance / self._stored_variance

    @property
    def _stored_variance(self) -> Tensor:
        assert self.norm.running_var is not None
        return self.norm.running_var.double() + self.norm.eps

    @property
    def is_small(self) -> bool:
        """Whether the mean shift and the typical ratio are small enough to freeze the statistics."""
        return self.mean_shift < MAX_SHIFT and RATIOS[0] < self.typical_ratio < RATIOS[1]

    @property
    def mean_shift(self) -> float:
        """The mean of :attr:`shift`."""
        return self.shift.mean().item()

    @property
    def typical_ratio(self) -> float:
        """The geometric mean of :attr:`ratio`."""
        return self.ratio.log().mean().exp().item()


@torch.no_grad()
def measure_drift(backbone: nn.Module, batches: Iterable[Tensor]) -> list[BatchNormDrift]:
    """Run images through a backbone with its stored statistics, and look at what its norms are given.

    Args:
        backbone: Any with batch norms that store statistics.
        batches: Normalised images, ``(N, C, H, W)``.

    Raises:
        ValueError: There is no such norm, or there are no images.
    """
    drifts = [
        BatchNormDrift(name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not drifts:
        raise ValueError(f'{type(backbone).__name__} has no batch norm with stored statistics')
    training, handles = backbone.training, []
    for drift in drifts:
        handles.append(
            drift.norm.register_forward_pre_hook(lambda _, inputs, drift=drift: drift.add(*inputs))
        )
    try:
        backbone.eval()
        for batch in batches:
            backbone(batch)
    finally:
        backbone.train(training)
        for handle in handles:
            handle.remove()
    drifts = [drift for drift in drifts if drift._count]
    if not drifts:
        raise ValueError('there are no images to measure batch norms on')
    return drifts


def verdict(drifts: list[BatchNormDrift]) -> str:
    """What follows, in a sentence or two."""
    far = [drift for drift in drifts if not drift.is_small]
    bounds = f'shift below {MAX_SHIFT} and variance ratio from {RATIOS[0]} to {RATIOS[1]}'
    if not far:
        return (
            f'Freezing the statistics is harmless: all {len(drifts)} batch norms have a {bounds}.'
        )
    worst = max(far, key=lambda drift: drift.mean_shift)
    return (
        f'{len(far)} of {len(drifts)} batch norms are farther than a {bounds}; the largest shift '
        f'is that of {worst.name}, {worst.mean_shift:.2f}. With frozen statistics the model begins '
        'from other activations than it was pretrained on: train the batch norms '
        "(norm_eval=False, norm_cfg=dict(type='SyncBN')), or compare both."
    )
