"""Refuse checkpoints that do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.hooks import Hook
from mmengine.runner import Runner, load_state_dict
from torch import Tensor, nn

from ...checkpoint.loading import check_fit, inside_wrappers
from ...checkpoint.published import backbone_state_dict, model_state_dict
from ...models.mm_models import backbones_by_name, unwrap
from ...models.svit import SViT
from ...registry import HOOKS


@HOOKS.register_module()
class StrictCheckpointHook(Hook):
    """Load a model's checkpoint (``load_from``, ``resume``, a test) strictly.

    MMEngine only warns about weights that are missing, unexpected or of another shape. The
    authors' classifier gets mmpretrain's names.

    Args:
        backbone_only: Whether to check only the backbone, for heads trained for other classes.
    """

    priority = 'VERY_HIGH'  # Before EMAHook, which copies what is loaded.

    def __init__(self, backbone_only: bool = False) -> None:
        self.backbone_only = backbone_only

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights before the runner loads them.

        Raises:
            RuntimeError, ValueError: They do not fit, or there are none; the message names them.
        """
        weights = model_state_dict(checkpoint)
        if self.backbone_only:
            for name, backbone in backbones_by_name(unwrap(runner.model)).items():
                # MMDetection loads a plain detector into both branches of a semi-supervised one.
                if not any(key.startswith(f'{name}.') for key in weights):
                    name = 'backbone'
                fitted = _fit(
                    backbone_state_dict(weights, name), backbone, f'load_from={runner._load_from!r}'
                )
                others = {k: v for k, v in weights.items() if not k.startswith(f'{name}.')}
                weights = {**others, **{f'{name}.{key}': value for key, value in fitted.items()}}
        else:
            load_state_dict(runner.model, weights, strict=True)
        if weights is not checkpoint:
            checkpoint['state_dict'] = weights


def _fit(found: Mapping[str, Tensor], backbone: nn.Module, source: str) -> dict[str, Tensor]:
    """Weights under the names of a backbone, also where wrappers such as LoRA's keep it or its layers.

    Raises:
        ValueError: They do not fit.
    """
    modules = backbone.named_modules()
    where = next((name for name, module in modules if isinstance(module, SViT)), '')
    if where and not any(key.startswith(f'{where}.') for key in found):  # Without the wrapper.
        inner = _fit(found, backbone.get_submodule(where), source)
        return {f'{where}.{key}': value for key, value in inner.items()}
    expected = backbone.state_dict()
    fitted = inside_wrappers(found, expected)
    check_fit(fitted, expected, source)
    return fitted
