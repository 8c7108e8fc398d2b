"""Refuse checkpoints that do not fit the model."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner, load_state_dict

from ...checkpoint.loading import check_fit
from ...checkpoint.published import backbone_state_dict, model_state_dict
from ...models.mm_models import backbones_by_name, unwrap
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
                inside = any(key.startswith(f'{name}.') for key in weights)
                found = backbone_state_dict(weights, name if inside else 'backbone')
                check_fit(found, backbone.state_dict(), f'load_from={runner._load_from!r}')
        else:
            load_state_dict(runner.model, weights, strict=True)
        if weights is not checkpoint:
            checkpoint['state_dict'] = weights
