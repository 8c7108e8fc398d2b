"""One choice of kernels for all ranks of a run, and for its resumption."""

from __future__ import annotations

from collections.abc import Collection

import torch
from mmengine.dist import broadcast_object_list
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner

from ...models.kernels import kernels_of
from ...ops import choose_backend, proofs
from ...ops.backend import VARIABLE, fix_choice, named_backend
from ...registry import HOOKS

KEY = 'triton_kernels'


@HOOKS.register_module()
class OpsBackendHook(Hook):
    """Say at the start of a run on a GPU which kernels backend ``'auto'`` takes, and keep to it.

    Rank 0's choice goes to all ranks, and into ``meta['triton_kernels']`` of each checkpoint. A resumed
    run takes the same kernels, less those that no record proves where it goes on.
    """

    priority = 'VERY_HIGH'  # Before anything computes.

    def __init__(self) -> None:
        self._chosen: frozenset[str] | None = None

    def before_run(self, runner: Runner) -> None:
        """Choose.

        Raises:
            RuntimeError: Triton does not work on this rank, where rank 0 takes its kernels.
        """
        device = next(runner.model.parameters()).device
        kernels = kernels_of(runner.model, _dtypes(runner))
        if proofs.environment(device) is None or not kernels:
            return  # Nothing to choose.
        if named_backend() != 'auto':
            runner.logger.info(f'ops_backend: {VARIABLE}={named_backend()} asks for it')
            return
        fix_choice(None)
        verdicts = {str(kernel): proofs.verdict(kernel, device) for kernel in kernels}
        outcome = [[name for name, (taken, _) in verdicts.items() if taken]]
        broadcast_object_list(outcome)
        self._use(outcome[0])
        if self._chosen:
            choose_backend(device, torch.float32, 'triton')  # Refuses where it cannot run.
        others = {name: why for name, (taken, why) in verdicts.items() if name not in outcome[0]}
        line = f"ops_backend: Triton's for {len(outcome[0])} of {len(verdicts)} kernels"
        if others:
            name, why = next(iter(others.items()))
            line += (
                f", plain PyTorch for {len(others)} ({name}: {why}). To prove this GPU's: "
                f'python -m mmsvit.prove_gpu {runner.cfg.filename or ""}'.rstrip()
            )
        runner.logger.info(line)

    def _use(self, names: Collection[str]) -> None:
        self._chosen = frozenset(names)
        fix_choice(self._chosen)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Resume with the kernels that the run began with."""
        meta = checkpoint.get('meta')
        before = meta.get(KEY) if isinstance(meta, dict) else None
        if not runner._resume or self._chosen is None or not isinstance(before, list):
            return
        began = frozenset(name for name in before if isinstance(name, str))
        lost, gained = sorted(began - self._chosen), sorted(self._chosen - began)
        if lost:
            runner.logger.warning(
                f"ops_backend: {len(lost)} kernels of the run were Triton's, and plain PyTorch goes on, "
                f'because nothing proves them here; the first is {lost[0]}'
            )
        if gained:
            runner.logger.info(
                f'ops_backend: {len(gained)} kernels stay with plain PyTorch, with which the run '
                f'began; the first is {gained[0]}',
            )
        self._use(self._chosen & began)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the choice."""
        if self._chosen is not None:
            checkpoint['meta'][KEY] = sorted(self._chosen)

    def after_run(self, runner: Runner) -> None:
        """Let another run in this process choose for itself."""
        self._chosen = None
        fix_choice(None)


def _dtypes(runner: Runner) -> list[torch.dtype]:
    """What the model computes in: in training perhaps under autocast, in evaluation not."""
    wrapper = runner.optim_wrapper
    amp = isinstance(wrapper, AmpOptimWrapper)
    return [torch.float32, *([wrapper.cast_dtype or torch.float16] if amp else [])]
