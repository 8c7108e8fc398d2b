"""Counting what a model multiplies, in the paper's way and in full.

A multiply-add is what the field calls a FLOP. There are two kinds:

- **layers**: convolutions and linear layers, an activation times a weight. A counter that hooks
  into modules sees these alone, and the paper's FLOPs of detectors and segmentors are these.
- **products**: an activation times an activation. In attention, query by key and weights by
  value; in super token sampling, the association, its use and the way back. The paper's FLOPs of
  classifiers contain them.

Biases, norms, activation functions, pooling, interpolation and other element-wise arithmetic are
in neither: without them, the published figures are met within 1.5%.

Operators are counted, not modules, so that fused attention is not missed. The formulas are
PyTorch's and whatever ``torch.utils.flop_counter.register_flop_formula`` was given. What
multiplies, or may, and has no formula is named in the result.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten

# What PyTorch has no formulas for: attention on CPUs, and on devices that bring their own. The
# arguments and the products are those of its other variants.
ATTENTION_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_fused_attention_overrideable: sdpa_flop,
}

CONVOLUTIONS = {
    aten.convolution,
    aten._convolution,
    aten.cudnn_convolution,
    aten.convolution_overrideable,
    aten._slow_conv2d_forward,
}

# Where the two factors of a matrix product are among the operator's arguments.
FACTORS = {
    aten.mm: slice(0, 2),
    aten.bmm: slice(0, 2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
}

# The names of PyTorch's operators that multiply matrices.
PRODUCT_NAME = re.compile(
    '(^|_)((b?add)?b?mm|(add)?mv|v?dot|matmul|(tri)?linear|attention|transformer|'
    'conv([123]d|olution)?|rnn|lstm|gru)(_|$)'
)


@dataclass(frozen=True)
class FlopCounts:
    """Parameters, and multiply-adds of one run."""

    parameters: int
    trainable: int
    layers: int
    products: int

    @property
    def total(self) -> int:
        """Multiply-adds of layers and products."""
        return self.layers + self.products


@dataclass(frozen=True)
class Count:
    """What :func:`count` found.

    Attributes:
        model: The model that ran.
        layers: Multiply-adds of activations and weights, by the name of the innermost module.
        products: Multiply-adds of activations and activations, likewise.
        uncounted: What ran and has no formula, and how often: operators that multiply, by their
            name or because PyTorch does not know them, and modules of ``mmcv.ops``.
    """

    model: nn.Module
    layers: Counter[str]
    products: Counter[str]
    uncounted: Counter[str]

    def of(self, name: str = '') -> FlopCounts:
        """Counts of the module ``name`` with all that is in it; of the whole model if empty."""
        prefix = f'{name}.' if name else ''

        def inside(counts: Counter[str]) -> int:
            return sum(n for module, n in counts.items() if f'{module}.'.startswith(prefix))

        parameters = list(self.model.get_submodule(name).parameters())
        return FlopCounts(
            parameters=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            layers=inside(self.layers),
            products=inside(self.products),
        )


class _ProductCounter(TorchDispatchMode):
    """Sees every operator that PyTorch runs, below modules and autograd."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = Count(model, Counter(), Counter(), Counter())
        self.running = ['']
        # Views, such as a transposed weight, share the storage. PyTorch has one object for each
        # storage as long as somebody holds it.
        self.weights = {id(s): s for s in (p.untyped_storage() for p in model.parameters())}

    @contextlib.contextmanager
    def track_modules(self) -> Iterator[None]:
        """Keep ``running`` up to date while this is open."""
        with contextlib.ExitStack() as hooks:
            for name, module in self.count.model.named_modules():
                for hook in (
                    module.register_forward_pre_hook(lambda m, _, name=name: self._enter(m, name)),
                    module.register_forward_hook(lambda *_: self._leave(), always_call=True),
                ):
                    hooks.callback(hook.remove)
            yield

    def _enter(self, module: nn.Module, name: str) -> None:
        self.running.append(name)
        # MMCV's compiled functions are not PyTorch operators; only their modules can be seen.
        if type(module).__module__.startswith('mmcv.ops.'):
            self.count.uncounted[f'mmcv.ops.{type(module).__name__}'] += 1

    def _leave(self) -> None:
        self.running.pop()

    def _is_weight(self, factor: Tensor) -> bool:
        return id(factor.untyped_storage()) in self.weights

    def __torch_dispatch__(
        self, func: OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        formula = flop_registry.get(operator) or ATTENTION_FORMULAS.get(operator)
        if formula is None and func.namespace == 'aten':
            # In inference mode, linear and matmul arrive here before they are taken apart.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            factors = args[FACTORS[operator]] if operator in FACTORS else ()
            is_layer = operator in CONVOLUTIONS or any(map(self._is_weight, factors))
            counts = self.count.layers if is_layer else self.count.products
            counts[self.running[-1]] += formula(*args, **kwargs, out_val=out) // 2
        elif _may_multiply(func):
            self.count.uncounted[func.name()] += 1
        return out


def _may_multiply(func: OpOverload) -> bool:
    if func.namespace == 'aten':
        name = func.name().removeprefix('aten::').partition('.')[0]
        return PRODUCT_NAME.search(name) is not None
    return func.namespace not in ('prim', 'prims', 'profiler')


@torch.no_grad()
def count(model: nn.Module, run: Callable[[], object]) -> Count:
    """Count what ``run`` multiplies, with ``model`` in evaluation mode.

    Element-wise arithmetic that amounts to a product, as in ``(a * b).sum()``, is not noticed.

    Args:
        model: Any model, on any device; on the ``meta`` device or with fake tensors, nothing is
            computed. Its modules keep their mode.
        run: Calls the model, or methods or parts of it; not under autocast, whose copies of
            weights would be taken for activations.
    """
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = _ProductCounter(model)
    model.eval()
    # The fast path is a single operator for a whole layer, which has no formula.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter.track_modules(), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
    return counter.count
