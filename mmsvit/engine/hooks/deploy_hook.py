"""The faster form of a model for a test."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models.deploy import switch_to_deploy
from ...registry import HOOKS


@HOOKS.register_module()
class DeployHook(Hook):
    """Switch every part of a model that can to its form for inference, before a test.

    For tests only: a model that is evaluated during training must stay trainable.
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
