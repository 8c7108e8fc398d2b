"""On CUDA, without a GPU: tensors without data show mixed devices, mixed dtypes and waiting."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, run_python
from torch.nn.attention import SDPBackend

from mmsvit.models.super_token_attention import prefer_flash

CASES = [
    ['backbone', arch, dtype, backend, form]
    for arch, dtype, backend, form in [
        *[
            ('small', dtype, backend, form)
            for dtype in ('float32', 'float16', 'bfloat16')
            for backend in ('torch', 'triton')
            for form in ('train', 'cp', 'recompute', 'eval', 'deploy')
        ],
        *[
            (arch, 'bfloat16', backend, form)
            for arch in ('base', 'large')  # These have layer scale.
            for backend in ('torch', 'triton')
            for form in ('train', 'deploy')
        ],
    ]
] + [
    [kind, dtype]
    for kind in ('upernet', 'maskrcnn')
    for dtype in ('float32', 'float16', 'bfloat16')
]


@pytest.fixture(scope='module')
def found() -> dict[str, dict]:
    """What the steps showed, in a process prepared for fake CUDA tensors."""
    result = run_python(ROOT / 'tests' / 'fake_cuda_steps.py', json.dumps(CASES))
    return json.loads(result.stdout.rpartition('FOUND')[2])


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids='-'.join)
def test_a_step_on_cuda(found, case):
    strange = {what: where for what, where in found['-'.join(case)].items() if where}
    assert not strange


def test_attention_on_cuda_takes_flash_first_and_cudnn_last():
    order = torch._C._get_sdp_priority_order
    before = order()
    with prefer_flash(torch.device('cuda')):
        names = [kernel.name for kernel in map(SDPBackend, order()[:4])]
    assert names == ['FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH', 'CUDNN_ATTENTION']
    assert order() == before
    with prefer_flash(torch.device('cpu')):
        assert order() == before
