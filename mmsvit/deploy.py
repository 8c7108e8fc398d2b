"""The form of SViT for inference: batch norms and layer scale folded into the layers beside them.

:meth:`mmsvit.SViT.switch_to_deploy` does it, once the weights are loaded; outputs stay the
same to float rounding, and the model cannot be trained any more. The batch norms of the stem
stand before convolutions with zero padding, for which no weights give the same at the border:
they become one multiplication and addition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .ops.cpu_cache import rows_in_cache
from .ops.torch_backend import in_one_graph, wants_gradient
from .registry import HOOKS


class GELUAndAffine(nn.Module):
    """GELU, and what a batch norm with fixed statistics does: a factor and a shift a channel.

    Without gradients it writes into its input, some pixels at a time: new memory, and another
    way through it, cost more than the computation.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        pixels = x.permute(0, 2, 3, 1)
        can_write = pixels.is_contiguous() and not in_one_graph()
        if wants_gradient(x) or not can_write:
            pixels = torch.addcmul(self.shift, F.gelu(pixels), self.scale).to(x.dtype)
            return pixels.permute(0, 3, 1, 2)
        pixels = pixels.flatten(0, 2)
        if x.device.type == 'cpu':
            parts = pixels.split(rows_in_cache(x.shape[1] * x.element_size()))
        else:
            parts = [pixels]
        for part in parts:
            torch.ops.aten.gelu_(part)
            torch.addcmul(self.shift, part, self.scale, out=part)
        return x


def fuse_activations_and_norms(layers: nn.Sequential) -> nn.Sequential:
    """The same with one layer for each GELU and the batch norm behind it."""
    fused = []
    for layer in layers:
        if isinstance(layer, _BatchNorm):
            fused[-1] = GELUAndAffine(layer)
        else:
            fused.append(layer)
    return nn.Sequential(*fused)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and shift, ``(C,)`` each, of a batch norm in evaluation mode."""
    scale, shift = torch.rsqrt(norm.running_var + norm.eps), 0.0
    if norm.affine:
        scale, shift = scale * norm.weight, norm.bias
    return scale, shift - norm.running_mean * scale


def fold_norm_into_linear(norm: _BatchNorm, linear: nn.Linear) -> None:
    """Change ``linear`` so that it does what ``linear(norm(x))`` did, over channels."""
    scale, shift = scale_and_shift(norm)
    linear.bias += linear.weight @ shift
    linear.weight *= scale


def fold_scale_into_linear(linear: nn.Linear, scale: Tensor) -> None:
    """Change ``linear`` so that it does what ``scale * linear(x)`` did."""
    linear.weight *= scale[:, None]
    linear.bias *= scale


def fuse_conv_and_norm(layers: nn.Sequential) -> nn.Module:
    """One convolution for a convolution and the batch norm behind it."""
    conv, norm = layers
    return fuse_conv_bn_eval(conv.eval(), norm.eval())


def refuse_weights(module: nn.Module, *_: object) -> None:
    """Keep weights of a trained model out of one into which norms were folded.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f'this {type(module).__name__} was switched to its form for inference, in which weights '
        'mean something else: load them before switch_to_deploy()'
    )


def switch_to_deploy(model: nn.Module) -> int:
    """Switch every part of a model that can to its form for inference, and count them."""
    modules = [module for module in model.modules() if hasattr(module, 'switch_to_deploy')]
    for module in modules:
        module.switch_to_deploy()
    return len(modules)


@HOOKS.register_module()
class DeployHook(Hook):
    """Switch every part of a model that can to its form for inference, before a test.

    For a model that is tested only: one that is evaluated during training has to go on
    training.
    """

    priority = 'VERY_LOW'  # After the weights are loaded and whatever else looks at them.

    def before_test(self, runner: Runner) -> None:
        """Call ``switch_to_deploy`` of every module that has it.

        Raises:
            ValueError: No module has it.
        """
        if not switch_to_deploy(runner.model):
            raise ValueError(
                f'nothing in this {type(runner.model).__name__} can be switched to a form for '
                'inference; mmsvit.SViT can'
            )
