"""No run with weights that are only half loaded."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner, load_state_dict

from .checkpoint import model_state_dict
from .registry import HOOKS


@HOOKS.register_module()
class StrictCheckpointHook(Hook):
    """Load a whole model's checkpoint (``load_from``, ``resume``, a test) exactly or not at all.

    MMEngine by itself warns and goes on where weights are missing, left over or of another
    shape. The authors' classifier is taken as it is, under mmpretrain's names.
    """

    priority = 'VERY_HIGH'  # Before EMAHook, which copies what is loaded.

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Try the weights before the runner loads them.

        Raises:
            RuntimeError: They do not fit; the message names them.
            ValueError: There are none.
        """
        weights = model_state_dict(checkpoint)
        load_state_dict(runner.model, weights, strict=True)
        if weights is not checkpoint:
            checkpoint['state_dict'] = weights
