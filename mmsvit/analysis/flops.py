"""Count the multiply-adds of a model, which the field calls FLOPs.

There are two kinds:

- **layers**: an activation times a weight, in convolutions and linear layers. Counters that hook
  into modules see only these, and the paper's FLOPs of detectors and segmentors include only
  these.
- **products**: an activation times an activation. In attention, query by key and weights by
  value; in super token sampling, association, aggregation and distribution. The paper's FLOPs of
  classifiers include them.

Biases, norms, activation functions, pooling, interpolation and other element-wise arithmetic are
not counted; without them, the counts agree with the published figures within 1.5%.

Operators are counted, not modules, so fused attention is included. The formulas are those of
PyTorch and of ``torch.utils.flop_counter.register_flop_formula``. The result lists operators
that multiply, or may, and have no formula.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten

# Variants of attention, on CPUs and on third-party devices, for which PyTorch has no formula.
# Arguments and products are those of the other variants.
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

# Which arguments of an operator are the two factors of its matrix product.
FACTORS = {
    aten.mm: slice(0, 2),
    aten.bmm: slice(0, 2),
    aten.addmm: slice(1, 3),
    aten.baddbmm: slice(1, 3),
}

# Names of PyTorch's operators that multiply matrices.
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
    """Result of :func:`count`.

    Attributes:
        model: The model that ran.
        layers: Multiply-adds of activations and weights, by name of the innermost module.
        products: Multiply-adds of activations and activations, by name of the innermost module.
        uncounted: Number of calls without a formula: of operators whose name says that they
            multiply, of custom operators, and of modules of ``mmcv.ops``.
    """

    model: nn.Module
    layers: Counter[str]
    products: Counter[str]
    uncounted: Counter[str]

    def of(self, name: str = '') -> FlopCounts:
        """Counts of the submodule ``name``, by default of the model."""
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
        # Views, such as a transposed weight, share the storage. PyTorch has one Python object
        # for each storage while it is referenced.
        self.weights = {id(s): s for s in (p.untyped_storage() for p in model.parameters())}

    @contextlib.contextmanager
    def track_modules(self) -> Iterator[None]:
        """Keep ``running``, the names of the modules that run, up to date."""
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
        # MMCV's compiled functions are not PyTorch operators; only their modules are visible.
        if type(module).__module__.startswith('mmcv.ops.'):
            self.count.uncounted[f'mmcv.ops.{type(module).__name__}'] += 1

    def _leave(self) -> None:
        self.running.pop()

    def __torch_dispatch__(
        self, func: OpOverload, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        formula = flop_registry.get(operator) or ATTENTION_FORMULAS.get(operator)
        if formula is None and func.namespace == 'aten':
            # In inference mode, linear and matmul arrive here before they are decomposed.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            factors = args[FACTORS[operator]] if operator in FACTORS else ()
            is_layer = operator in CONVOLUTIONS or any(
                id(factor.untyped_storage()) in self.weights for factor in factors
            )
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
    """Count the multiply-adds of ``run``, with ``model`` in evaluation mode.

    Products made of element-wise arithmetic, as in ``(a * b).sum()``, are not counted.

    Args:
        model: Any model, on any device; on the ``meta`` device or with fake tensors, nothing is
            computed. The mode of its modules is restored.
        run: Calls the model, or methods or parts of it; not under autocast, whose copies of
            weights would count as activations.
    """
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    counter = _ProductCounter(model)
    model.eval()
    # The fast path runs a layer as a single operator, which has no formula.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter.track_modules(), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode
    return counter.count
