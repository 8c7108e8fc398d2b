"""The same weights give the same numbers as the published model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import GOLDEN, OPS_PLACES, golden_arch

from mmsvit import SViT
from mmsvit.checkpoint import backbone_state_dict
from mmsvit.ops import super_token

PUBLISHED_PARAMETERS = {'small': 23_943_264, 'base': 50_138_928, 'large': 93_287_664}
# The backends, and sampling without the custom operators around it, as in an export.
pytestmark = pytest.mark.cuda
WAYS = [*OPS_PLACES, ('exported', 'cpu')]
IMAGES = [('tiny', '64x64'), ('tiny', '97x131'), ('coarse', '128x96'), ('coarse', '75x200')]
CASES = [(*image, *way) for way in WAYS for image in IMAGES]


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    expected = torch.from_numpy(expected)
    assert found.shape == expected.shape
    found = found.cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def sampled(way: str) -> Iterator[None]:
    """Super tokens are sampled this way if 'auto' chooses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, 'allow_tf32', False)
        if way == 'exported':
            patch.setattr(super_token, 'wants_own_operators', lambda: True)
        else:
            patch.setenv('MMSVIT_OPS_BACKEND', way)
        yield


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def result(request):
    """Outputs and gradients of a golden case, computed once."""
    name, size, way, device = request.param
    golden = np.load(GOLDEN / f'{name}.npz')
    golden = {key[len(size) + 1 :]: golden[key] for key in golden if key.startswith(f'{size}/')}
    checkpoint = dict(type='Pretrained', checkpoint=str(GOLDEN / f'{name}.pth'))
    model = SViT(golden_arch(name), init_cfg=checkpoint)
    model.init_weights()
    model.eval().to(device)
    images = torch.from_numpy(golden['input']).to(device).requires_grad_()
    with sampled(way):
        outputs = model(images)
        loss = 0
        for i, output in enumerate(outputs):
            weights = np.random.default_rng(i).normal(size=tuple(output.shape)).astype(np.float32)
            loss = loss + (output * torch.from_numpy(weights).to(device)).mean()
        loss.backward()
    return golden, model, images, outputs, loss


def test_every_stage_agrees(result):
    golden, _, _, outputs, loss = result
    errors = [relative_error(output, golden[f'stage{i}']) for i, output in enumerate(outputs)]
    assert max(errors) <= 1e-5, errors
    assert abs(loss.item() - golden['loss'].item()) <= 1e-5


def test_every_gradient_agrees(result):
    golden, model, images, _, _ = result
    expected = {key[5:]: value for key, value in golden.items() if key.startswith('grad/')}
    assert relative_error(images.grad, expected.pop('input')) <= 1e-4
    # A gradient is named and laid out as its weight is.
    marker = {'patch_embed.proj.0.weight': torch.empty(0)}
    tensors = {key: torch.from_numpy(value) for key, value in expected.items()}
    renamed = backbone_state_dict({'model': {**marker, **tensors}})
    parameters = dict(model.named_parameters())
    compared = [key for key in renamed if renamed[key].numel()]
    assert len(compared) == len(expected)
    for key in compared:
        assert relative_error(parameters[key].grad, renamed[key].numpy()) <= 1e-4, key


@pytest.mark.parametrize('name', ['tiny', 'coarse'])
def test_trainable_parameters(name):
    described = json.loads((GOLDEN / f'{name}.json').read_text())
    count = sum(p.numel() for p in SViT(golden_arch(name)).parameters() if p.requires_grad)
    (expected,) = (value for key, value in described.items() if 'param' in key)
    assert count == expected


@pytest.mark.parametrize('arch', PUBLISHED_PARAMETERS)
def test_published_sizes(arch):
    with torch.device('meta'):
        model = SViT(arch)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[arch]
