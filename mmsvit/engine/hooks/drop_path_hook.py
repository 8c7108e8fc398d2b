"""Another drop path rate from an epoch on."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...models import SViT
from ...models.mm_models import unwrap
from ...registry import HOOKS


@HOOKS.register_module()
class DropPathHook(Hook):
    """Change the stochastic depth rate of SViT backbones in a run; a resumed run continues with it.

    The authors train SViT-L so: 0.4 for 260 epochs, then 0.6.

    Args:
        schedule: Pairs of the first epoch (or iteration), counted from 0, and the rate from then on.
            Before the first, the rate is the config's.
        by_epoch: Whether the schedule counts epochs.

    Raises:
        ValueError: The schedule is not ascending, or a rate is not in [0, 1).
    """

    def __init__(self, schedule: Sequence[tuple[int, float]], by_epoch: bool = True) -> None:
        begins = [begin for begin, _ in schedule]
        if not begins or begins != sorted(set(begins)) or begins[0] < 0:
            raise ValueError(f'schedule needs ascending epochs or iterations, found {schedule}')
        if not all(0 <= rate < 1 for _, rate in schedule):
            raise ValueError(f'rates of schedule must be in [0, 1), found {schedule}')
        self.schedule, self.by_epoch = schedule, by_epoch
        self._rate: float | None = None
        self._backbones: list[SViT] = []

    def before_train(self, runner: Runner) -> None:
        """Find the backbones.

        Raises:
            ValueError: The model has no SViT.
        """
        self._backbones = [
            module for module in unwrap(runner.model).modules() if isinstance(module, SViT)
        ]
        if not self._backbones:
            raise ValueError('DropPathHook changes SViT backbones, and the model has none')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Set the rate of the present epoch or iteration."""
        done = runner.epoch if self.by_epoch else runner.iter
        rates = [rate for begin, rate in self.schedule if begin <= done]
        if rates and rates[-1] != self._rate:
            self._rate = rates[-1]
            runner.logger.info(f'The drop path rate is {self._rate} from here on.')
            for backbone in self._backbones:
                backbone.set_drop_path_rate(self._rate)
