"""How far stored batch norm statistics are from those of images."""

from __future__ import annotations

import pytest
import torch
from conftest import small_arch
from torch import nn

from mmsvit import SViT
from mmsvit.analysis.batch_norm import measure_drift, verdict


def batches(factor: float = 1.0, offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [factor * torch.randn(4, 3, 64, 64, generator=generator) + offset for _ in range(4)]


@pytest.fixture
def backbone() -> SViT:
    """One whose statistics are those of the images, layer by layer."""
    torch.manual_seed(0)
    model = SViT(small_arch())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean of all batches
    for _ in range(6):  # Each pass sets the statistics that the layers behind it see.
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        model.train()
        with torch.no_grad():
            for batch in batches():
                model(batch)
    return model.eval()


def test_known_statistics_have_known_distances():
    norm = nn.BatchNorm2d(2, eps=1e-12)
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.tensor([[[[1.0, 5.0]], [[-1.0, 1.0]]], [[[1.0, 5.0]], [[-1.0, 1.0]]]])
    (drift,) = measure_drift(nn.Sequential(norm), [x[:1], x[1:]])
    assert drift.shift.tolist() == pytest.approx([1.0, 0.0])  # means 3 and 0
    assert drift.ratio.tolist() == pytest.approx([1.0, 4.0])  # variances 4 and 1
    assert drift.mean_shift == pytest.approx(0.5) and drift.typical_ratio == pytest.approx(2)


def test_the_images_of_the_statistics_are_near_and_others_far(backbone):
    near = measure_drift(backbone, batches())
    assert len(near) == sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    assert verdict(near).startswith('Freezing the statistics is harmless')
    far = verdict(measure_drift(backbone, batches(3, 2)))
    assert far.startswith('12 of 12 batch norms') and 'norm_eval=False' in far


def test_measuring_changes_nothing(backbone):
    backbone.train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    measure_drift(backbone, batches())
    assert backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert not any(module._forward_pre_hooks for module in backbone.modules())


def test_nothing_to_measure_is_refused(backbone):
    with pytest.raises(ValueError, match='Conv2d has no batch norm'):
        measure_drift(nn.Conv2d(3, 3, 1), batches())
    with pytest.raises(ValueError, match='no images'):
        measure_drift(backbone, [])
