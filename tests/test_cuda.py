"""What only a CUDA GPU can show. Nothing here has run on one yet."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_arch
from torch import nn

from mmsvit import SViT
from mmsvit.models.super_token_attention import prefer_flash

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'),
]
HALVES = [torch.float16, torch.bfloat16]
BACKENDS = ['torch', 'triton']


def images(n: int = 2, height: int = 96, width: int = 72) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


def model(**settings: object) -> SViT:
    torch.manual_seed(0)
    return SViT(small_arch(), **settings)


@pytest.fixture
def no_host_sync():
    torch.cuda.set_sync_debug_mode('error')
    yield
    torch.cuda.set_sync_debug_mode('default')


def step(net: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> list[torch.Tensor]:
    with torch.autocast('cuda', dtype or torch.float16, enabled=dtype is not None):
        outputs = net(x)
        loss = sum(y.float().square().mean() for y in outputs)
    loss.backward()
    return [y.detach() for y in outputs]


@pytest.mark.parametrize('backend', BACKENDS)
def test_outputs_and_gradients_are_those_of_the_cpu(backend):
    on_cpu = model(ops_backend='torch')
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for module in on_gpu.modules():
        if hasattr(module, 'ops_backend'):
            module.ops_backend = backend
    expected, found = step(on_cpu, images(), None), step(on_gpu, images().cuda(), None)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
    for (name, one), other in zip(on_gpu.named_parameters(), on_cpu.parameters()):
        scale = other.grad.abs().max()
        assert (one.grad.cpu() - other.grad).abs().max() <= 5e-3 * scale + 1e-6, name


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('with_cp', [False, 'ffn', True])
def test_a_step_under_autocast_waits_for_nothing(backend, dtype, with_cp, no_host_sync):
    net = model(ops_backend=backend, with_cp=with_cp, drop_path_rate=0.2).cuda()
    outputs = step(net, images().cuda(non_blocking=True), dtype)
    torch.cuda.set_sync_debug_mode('default')
    assert all(torch.isfinite(y).all() for y in outputs)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('backend', BACKENDS)
def test_halves_are_near_float32(backend, dtype):
    net = model(ops_backend=backend).cuda().eval()
    with torch.no_grad():
        exact = net(images().cuda())
        with torch.autocast('cuda', dtype):
            found = net(images().cuda())
    for one, other in zip(found, exact):
        assert (one.float() - other).norm() <= 20 * torch.finfo(dtype).eps * other.norm()


def test_the_same_bits_twice():
    net = model(ops_backend='triton').cuda()
    first = step(net, images().cuda(), torch.float16)
    grads = [p.grad.clone() for p in net.parameters()]
    net.load_state_dict(model().state_dict())
    net.zero_grad()
    torch.backends.cudnn.deterministic = True
    try:
        second = step(net, images().cuda(), torch.float16)
    finally:
        torch.backends.cudnn.deterministic = False
    assert all(map(torch.equal, first, second))
    # Of the stem and down-sampling, cuDNN's own kernels may add in another order.
    blocks = [name.startswith('stages') and 'blocks' in name for name, _ in net.named_parameters()]
    for inside, one, other in zip(blocks, grads, (p.grad for p in net.parameters())):
        if inside:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('dtype', HALVES)
def test_attention_of_halves_is_flash(dtype):
    q = torch.randn(1, 2, 64, 32, device='cuda', dtype=dtype)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, prefer_flash(q.device):
        F.scaled_dot_product_attention(q, q, q)
    assert any('flash' in event.key for event in profile.key_averages())


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('deployed', [False, True])
def test_a_cuda_graph_of_inference(backend, deployed):
    net = model(ops_backend=backend).cuda().eval()
    if deployed:
        net.switch_to_deploy()
    x = images().cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(x)
        x.copy_(images().flip(0).cuda())
        graph.replay()
        for one, other in zip(captured, net(x)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [None, *HALVES])
@pytest.mark.parametrize('backend', BACKENDS)
def test_a_cuda_graph_of_a_training_step(backend, dtype):
    """As docs/training.md has it, for images of one size."""
    net = model(ops_backend=backend, drop_path_rate=0.0, norm_eval=True).cuda()
    eager = copy.deepcopy(net)
    x = images().cuda()
    with torch.autocast(
        'cuda', dtype or torch.float16, enabled=dtype is not None, cache_enabled=False
    ):
        captured = torch.cuda.make_graphed_callables(net, (x,))
    outputs = step(captured, x, dtype)
    for one, other in zip(outputs, step(eager, x, dtype)):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compiled_for_one_size_and_for_all():
    net = model(ops_backend='triton').cuda()
    expected = [y.detach() for y in net.eval()(images().cuda())]
    for dynamic in (False, None):
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(net), fullgraph=True, dynamic=dynamic)
        for one, other in zip(compiled(images().cuda()), expected):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_roi_align_is_the_same_but_for_the_order_of_its_sums():
    """Mmcv's and torchvision's kernels add gradients atomically: only the forward repeats bit by bit."""
    ops = pytest.importorskip('mmcv.ops')
    feature = torch.randn(2, 8, 40, 40, device='cuda', requires_grad=True)
    corners = torch.rand(200, 2, device='cuda') * 100
    boxes = torch.cat([corners, corners + 5 + 50 * torch.rand(200, 2, device='cuda')], 1)
    rois = torch.cat([torch.randint(2, (200, 1), device='cuda').float(), boxes], 1)

    def pooled():
        output = ops.roi_align(feature, rois, (7, 7), 0.25, 0, 'avg', True)
        return output.detach(), torch.autograd.grad(output.square().sum(), feature)[0]

    (first, first_grad), (second, second_grad) = pooled(), pooled()
    assert torch.equal(first, second)
    torch.testing.assert_close(first_grad, second_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', HALVES)
def test_a_detector_trains_under_autocast(dtype):
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.optim import AmpOptimWrapper
    from mmengine.registry import init_default_scope

    from mmsvit import config_path

    cfg = Config.fromfile(config_path('svit_maskrcnn_shapes.py'))
    init_default_scope('mmdet')
    net = MODELS.build(cfg.model).cuda().train()
    classes = [cfg.model.roi_head.bbox_head.num_classes] * 2
    batch = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_classes=classes[0], with_mask=True)
    data = net.data_preprocessor(batch, True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=str(dtype).removeprefix('torch.'))
    with wrapper.optim_context(net):
        losses = net(**data, mode='loss')
    loss, _ = net.parse_losses(losses)
    wrapper.update_params(loss)
    assert torch.isfinite(loss)
