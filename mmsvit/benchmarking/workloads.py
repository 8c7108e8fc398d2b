"""What one run of a candidate is: operation, backbone, training step or detector.

Weights and images are random (zeros would be too fast), and the same in each process.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ..analysis.config_flops import count_config
from ..analysis.flops import FlopCounts, count
from ..config_path import config_path
from ..models.super_token_attention import SuperTokenAttention
from ..ops import choose_backend
from .candidates import Candidate

MODES = {
    'op': 'super token sampling forward: sample and distribute, without the attention between',
    'op-train': 'super token sampling, forward and backward',
    'backbone': 'inference of the backbone',
    'train': 'forward and backward of the backbone in training mode: batch statistics, nothing '
    'frozen or dropped; without optimizer',
    'detector': 'Mask R-CNN up to its heads: normalisation and padding, backbone, FPN, RPN with '
    'NMS, box head on up to 1000 proposals an image, mask head on 100 proposals of the batch',
}
"""What can be measured, and what it includes."""

DTYPES = ('float32', 'float16', 'bfloat16')

# Operations on maps that fit into a cache would measure the cache, so they cycle through enough
# inputs to fill this.
WORKING_SET_BYTES = 256 * 2**20
MAX_INPUTS = 64


@dataclass(frozen=True)
class Case:
    """What the candidates run.

    Attributes:
        mode: Of :data:`MODES`.
        shape: Height and width of the images in pixels.
        batch: Images in a batch.
        dtype: ``'float32'``, or ``'float16'`` or ``'bfloat16'`` for autocast to it. An operation
            takes tokens of this dtype.
        device: ``'cpu'`` or ``'cuda'``.
        stage: Whose tokens an operation takes, from 1; other modes run all stages.
    """

    mode: str
    shape: tuple[int, int]
    batch: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    stage: int = 1

    @property
    def is_op(self) -> bool:
        """Whether it is only the operation."""
        return self.mode in ('op', 'op-train')

    @property
    def trains(self) -> bool:
        """Whether gradients are computed."""
        return self.mode in ('op-train', 'train')

    def __str__(self) -> str:
        stage = f', tokens of stage {self.stage}' if self.is_op else ''
        amp = '' if self.is_op or self.dtype == 'float32' else ' autocast'
        height, width = self.shape
        return f'{self.mode} {height}x{width}{stage}, batch {self.batch}, {self.dtype}{amp}, {self.device}'


@dataclass
class Workload:
    """Something to run.

    Attributes:
        model: Has the parameters.
        run: Runs it ``runs`` times, on CUDA asynchronously.
        count: Counts the multiply-adds of one image in inference, and the operators without a
            formula; None for a copy.
        runs: How many runs a call of ``run`` is.
        bytes_to_move: Fewest bytes that a run reads and writes; None if unknown.
        observed: Numbers of the latest run, such as its masks, by name.
    """

    model: nn.Module
    run: Callable[[], object]
    count: Callable[[], tuple[FlopCounts, Counter[str]]] | None
    runs: int = 1
    bytes_to_move: int | None = None
    observed: dict[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Size of parameters and buffers."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def build_workload(candidate: Candidate, case: Case) -> Workload:
    """Build the model of ``candidate`` and what ``case`` does with it.

    Raises:
        ValueError: The candidate cannot run the case.
        ImportError, KeyError: The library of the model is not installed.
    """
    if 'graph' in candidate.flags and case.device == 'cpu':
        raise ValueError('+graph needs a CUDA device')
    if 'graph' in candidate.flags and case.mode == 'detector':
        raise ValueError('a detector has no +graph: its shapes depend on values')
    if 'deploy' in candidate.flags and case.trains:
        raise ValueError('+deploy is a form for inference and cannot train')
    torch.manual_seed(0)
    if case.is_op:
        return _build_op(candidate, case)
    if case.mode == 'detector':
        return _build_detector(candidate, case)
    return _build_backbone(candidate, case)


def autocast_of(case: Case) -> torch.autocast:
    """Autocast to the dtype of a case; off for float32."""
    dtype = getattr(torch, case.dtype)
    return torch.autocast(case.device, dtype=dtype, enabled=case.dtype != 'float32')


def apply_flags(model: BaseModule, candidate: Candidate) -> None:
    """Bring an SViT, a peer or a super token attention into the candidate's form."""
    if 'deploy' in candidate.flags:
        if not hasattr(model, 'switch_to_deploy'):
            raise ValueError(f'+deploy: {type(model).__name__} has no switch_to_deploy()')
        model.switch_to_deploy()
    if 'channels-last' in candidate.flags:
        model.to(memory_format=torch.channels_last)
    if 'compile' in candidate.flags:
        model.compile()


def find_backend(candidate: Candidate, case: Case) -> str | None:
    """The backend of the super token operations; None for a peer.

    Raises:
        RuntimeError: The candidate names a backend that cannot run here.
    """
    if not candidate.is_svit:
        return None
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    return choose_backend(device, dtype, candidate.backend)[0]


def _count(
    model: nn.Module, shape: tuple[int, ...], device: str
) -> tuple[FlopCounts, Counter[str]]:
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        shapes_only = copy.deepcopy(model)
    with mode:
        x = torch.zeros(shape, device=device)
        found = count(shapes_only, lambda: shapes_only(x))
    return found.of(), found.uncounted


def _build_op(candidate: Candidate, case: Case) -> Workload:
    if not candidate.is_svit:
        raise ValueError(f'{candidate.model} has no super token sampling')
    if 'deploy' in candidate.flags:
        raise ValueError('an operation has no +deploy')
    arch, i = candidate.arch, case.stage - 1
    size = (arch['super_token_sizes'][i],) * 2
    if size == (1, 1):
        raise ValueError(f'stage {case.stage} of {candidate.name} does not sample: its size is 1')
    model = SuperTokenAttention(
        arch['embed_dims'][i], 1, size, arch['num_iters'][i], ops_backend=candidate.backend
    )
    model.add_module('attend', nn.Identity())  # Leaves sampling and distribution.
    apply_flags(model, candidate)

    stride = 4 * 2**i
    grid = tuple(math.ceil(pixels / stride) for pixels in case.shape)
    shape = (case.batch, *grid, arch['embed_dims'][i])
    dtype = getattr(torch, case.dtype)
    number = min(MAX_INPUTS, math.ceil(WORKING_SET_BYTES / (math.prod(shape) * dtype.itemsize)))
    inputs = [
        torch.randn(shape, device=case.device, dtype=dtype, requires_grad=case.trains)
        for _ in range(number)
    ]
    gradient = torch.randn(shape, device=case.device, dtype=dtype)

    def infer() -> None:
        with torch.no_grad():
            for x in inputs:
                model(x)

    def train() -> None:
        for x in inputs:
            torch.autograd.grad(model(x), x, gradient)

    return Workload(
        model,
        train if case.trains else infer,
        lambda: _count(model, (1, *shape[1:]), case.device),
        runs=number,
        bytes_to_move=op_bytes(shape, size, arch['num_iters'][i], dtype.itemsize, case.trains),
    )


def op_bytes(
    shape: tuple[int, int, int, int],
    super_token_size: tuple[int, int],
    num_iters: int,
    itemsize: int,
    backward: bool,
) -> int:
    """Fewest bytes that super token sampling reads and writes, with any backend.

    Forward, tokens are read once for the means of cells and once for each iteration, and written
    once. Backward, the gradient is read once and written once. In both, association (nine numbers
    a token) and super tokens are written once and read once; backward, the association is read
    twice. All are in the dtype of the tokens; a backend that keeps the association in float32
    moves more.

    Args:
        shape: Of the tokens, ``(N, H, W, C)``.
        super_token_size: Height and width of a cell in tokens.
        num_iters: Iterations of sampling.
        itemsize: Bytes of a number.
        backward: Whether to count forward and backward, not forward alone.
    """
    n, height, width, channels = shape
    h, w = super_token_size
    tokens = n * height * width
    super_tokens = n * math.ceil(height / h) * math.ceil(width / w)
    passes = num_iters + 2 + 2 * backward
    numbers = passes * tokens * channels
    numbers += (1 + backward) * 2 * (9 * tokens + super_tokens * channels)
    return numbers * itemsize


def _build_backbone(candidate: Candidate, case: Case) -> Workload:
    model = MODELS.build(candidate.backbone).to(case.device)
    model.train(case.trains)
    apply_flags(model, candidate)
    images = torch.randn(case.batch, 3, *case.shape, device=case.device)
    if 'channels-last' in candidate.flags:
        images = images.contiguous(memory_format=torch.channels_last)

    def forward() -> tuple[Tensor, ...]:
        with autocast_of(case):
            return tuple(model(images))

    def infer() -> None:
        with torch.no_grad():
            forward()

    gradients: list[Tensor] = []

    def train() -> None:
        model.zero_grad(set_to_none=True)
        outputs = forward()
        if not gradients:
            gradients.extend(map(torch.randn_like, outputs))
        torch.autograd.backward(outputs, gradients)

    return Workload(
        model,
        train if case.trains else infer,
        lambda: _count(model, (1, 3, *case.shape), case.device),
    )


def _build_detector(candidate: Candidate, case: Case) -> Workload:
    from mmdet.structures import DetDataSample

    cfg = Config.fromfile(config_path('mmdet::_base_/models/mask-rcnn_r50_fpn.py'))
    cfg.default_scope = 'mmdet'
    cfg.model.pop('backbone')
    cfg.model.backbone = candidate.backbone
    cfg.model.neck.in_channels = candidate.out_channels
    init_default_scope('mmdet')
    model = MODELS.build(copy.deepcopy(cfg.model)).to(case.device)
    model.eval()
    apply_flags(model.backbone, candidate)
    images = [
        torch.randint(256, (3, *case.shape), dtype=torch.uint8, device=case.device)
        for _ in range(case.batch)
    ]
    observed: dict[str, int] = {}
    meta = dict(img_shape=case.shape, ori_shape=case.shape, scale_factor=(1.0, 1.0))

    def infer() -> None:
        samples = [DetDataSample(metainfo=meta) for _ in images]
        with torch.no_grad(), autocast_of(case):
            data = model.data_preprocessor(dict(inputs=images, data_samples=samples))
            ((box_scores, _, masks),) = model(**data, mode='tensor')
        observed.update(proposals=len(box_scores), masks=len(masks))

    def count_detector() -> tuple[FlopCounts, Counter[str]]:
        found = count_config(cfg, case.shape)
        return found.model, found.uncounted

    return Workload(model, infer, count_detector, observed=observed)


def build_copy(device: str) -> Workload:
    """A copy of memory, for the bandwidth that is possible."""
    numbers = torch.randn(WORKING_SET_BYTES // 4, device=device)
    target = torch.empty_like(numbers)
    return Workload(
        nn.Identity(),
        lambda: target.copy_(numbers),
        count=None,
        bytes_to_move=2 * WORKING_SET_BYTES,
    )
