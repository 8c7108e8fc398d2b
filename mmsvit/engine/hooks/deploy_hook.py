"""Test a model in its inference form, which is faster."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models.deploy import switch_to_deploy
from ...registry import HOOKS


@HOOKS.register_module()
class DeployHook(Hook):
    """Switch a model to its inference form before a test.

    Not before a validation: the model must stay trainable.
    """

    priority = 'VERY_LOW'  # After the weights are loaded and other hooks have used them.

    def before_test(self, runner: Runner) -> None:
        """Call ``switch_to_deploy`` of every module that has it.

        Raises:
            ValueError: No module has it.
        """
        if not switch_to_deploy(runner.model):
            raise ValueError(
                f'no module of this {type(runner.model).__name__} has an inference form; '
                'mmsvit.SViT has one'
            )
