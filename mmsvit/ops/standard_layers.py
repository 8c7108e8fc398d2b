"""Which layers a backend may compute itself from their weights, without calling them.

A layer may have been replaced (low-rank adapters, quantisation), be watched by hooks, have a
patched ``forward`` (accelerate does that) or other settings. Such a layer runs as written.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# Compared at every call: somebody may replace these methods later, for all layers of a class.
_KINDS = (nn.Linear, nn.Conv2d, nn.GELU, nn.Dropout, nn.LayerNorm)
_FORWARDS: dict[type, Callable] = {kind: kind.forward for kind in _KINDS}
# Quantised and sharded weights are other subclasses of Tensor.
PLAIN: set[type] = {nn.Parameter, Tensor}
# Names that PyTorch looks up on the instance to call a layer.
_CALLED = {'forward', '_call_impl', '_compiled_call_impl', '_conv_forward'}


def is_watched(layer: nn.Module) -> bool:
    """Whether a layer has hooks or a patched method of its own."""
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    backward = layer._backward_pre_hooks or layer._backward_hooks
    return bool(before or after or backward or _CALLED & vars(layer).keys())


def _has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether nobody patched the class, before mmsvit was imported or after."""
    return kind.forward is _FORWARDS[kind] and kind.forward.__module__ == kind.__module__


def _has_standard_settings(layer: nn.Module) -> bool:
    if isinstance(layer, nn.GELU):
        return layer.approximate == 'none'
    if isinstance(layer, nn.Dropout):
        return layer.p == 0 or not layer.training
    if isinstance(layer, nn.Conv2d):
        settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        if settings != ((3, 3), (1, 1), (1, 1), (1, 1)) or layer.padding_mode != 'zeros':
            return False
        if not layer.groups == layer.in_channels == layer.out_channels:
            return False
    return all(type(values) in PLAIN for values in (layer.weight, layer.bias))


def is_standard(layer: nn.Module | None) -> bool:
    """Whether a layer's weights say all that it does.

    Args:
        layer: ``nn.Linear`` with a bias, a depthwise 3x3 ``nn.Conv2d`` with padding 1 and a bias,
            exact ``nn.GELU``, ``nn.Dropout`` that drops nothing, or ``nn.LayerNorm`` with weight
            and bias. Anything else, None and subclasses included, is not standard.
    """
    return (
        layer is not None
        and type(layer) in _FORWARDS
        and _has_own_forward(type(layer))
        and not is_watched(layer)
        and not torch_module._has_any_global_hook()
        and _has_standard_settings(layer)
    )
