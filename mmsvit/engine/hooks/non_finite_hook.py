"""NaN and infinity: seen before they reach the weights, and traced to where they came from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ...models.mm_models import unwrap
from ...registry import HOOKS

_NAMES_SHOWN = 4


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop at, or skip, an optimizer step whose losses or gradients are not finite.

    It looks at both before each step, at the gradients before they are clipped, and says in the log
    at which iteration and images it was, the loss terms, the gradients' norm, and which module
    first gave a value that is not finite. For that the batch is run once more, forward and
    backward, with the same random numbers.

    That ``GradScaler`` skips steps whose scaled gradients overflow is part of mixed precision: it
    is counted, but not reported as long as the losses are finite.

    Args:
        action: ``'stop'``: end the run with an error; or ``'skip'``: do not apply the step (all
            of its iterations, where gradients are accumulated), and take back what the batch did to
            running statistics.
        max_consecutive: End the run nevertheless after so many skipped steps in a row.
        max_scaler_skips: End it also after so many steps in a row that ``GradScaler`` skipped.

    Raises:
        ValueError: Another action, or a limit below 1.
    """

    priority = 'VERY_HIGH'  # Before anything is logged, averaged or saved.

    def __init__(
        self, action: str = 'stop', max_consecutive: int = 10, max_scaler_skips: int = 100
    ) -> None:
        if action not in ('stop', 'skip'):
            raise ValueError(f"action must be 'stop' or 'skip', found {action!r}")
        if max_consecutive < 1 or max_scaler_skips < 1:
            raise ValueError(
                f'max_consecutive and max_scaler_skips must be 1 or more, found {max_consecutive} '
                f'and {max_scaler_skips}'
            )
        self.action = action
        self.max_consecutive, self.max_scaler_skips = max_consecutive, max_scaler_skips
        self.skipped = 0  # steps in all
        self._consecutive = self._scaler_skips = 0
        self._losses: list[dict] = []  # of the iterations since the last step
        self._norm: float | None = None  # None: no step was taken
        self._unclipped: dict[torch.optim.Optimizer, Tensor] = {}  # norms
        self._found = False
        self._rng: tuple = ()
        self._batch: object = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def before_train(self, runner: Runner) -> None:
        """Watch the model's losses and the optimizers' steps."""
        runner.model.register_forward_hook(self._note_losses)
        wrappers = runner.optim_wrapper
        wrappers = wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]
        for wrapper in wrappers:
            wrapper.optimizer.register_step_pre_hook(self._before_step)
            if isinstance(wrapper, OptimWrapper):
                wrapper._clip_grad = partial(self._clip, wrapper.optimizer, wrapper._clip_grad)

    def _clip(self, optimizer: torch.optim.Optimizer, clip: Callable[[], None]) -> None:
        # Afterwards infinite gradients may be zero, or as large as is allowed.
        self._unclipped[optimizer] = _norm(optimizer)
        clip()

    def _note_losses(self, model: nn.Module, inputs: tuple, output: object) -> None:
        if model.training and isinstance(output, dict):
            self._losses.append(output)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Remember what the batch can be run again with."""
        self._batch, self._rng, self._norm, self._found = data_batch, _rng_states(), None, False
        self._unclipped.clear()
        if self.action == 'skip' and not self._losses:
            self._buffers = [(b, b.clone()) for b in unwrap(runner.model).buffers()]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if getattr(optimizer, 'found_inf', None):
            return  # GradScaler skips the step; with fused optimizers it leaves that to them.
        norm = self._unclipped[optimizer] if optimizer in self._unclipped else _norm(optimizer)
        finite = torch.stack([_finite(terms) for terms in self._losses] + [norm.isfinite().cpu()])
        bad = torch.tensor(int(not finite.all()))
        all_reduce(bad, 'max')
        self._norm = float(norm)
        if bad:
            self._found = True
            for p in _parameters(optimizer):
                p.grad = None  # Such a step leaves weights, momenta and decay alone.

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict | None = None,
    ) -> None:
        """Report, and stop if it is time to.

        Raises:
            FloatingPointError: The run stops; the weights are the last good ones.
        """
        if isinstance(runner.optim_wrapper, OptimWrapper):
            if not runner.optim_wrapper.should_update():
                return
            if self._norm is None:
                self._after_scaler_skip()
        losses, self._losses = self._losses, []
        if not self._found:
            if self._norm is not None:
                self._consecutive = self._scaler_skips = 0
            return
        self._consecutive += 1
        self.skipped += 1
        report = self._report(runner, losses)
        self._losses = []  # Those of the second run are no part of the next step.
        if self.action == 'skip':
            for buffer, before in self._buffers:
                buffer.copy_(before)
        if self.action == 'stop' or self._consecutive > self.max_consecutive:
            raise FloatingPointError(
                f'{report}\nThe step was not applied, and the last checkpoint is good. '
                "(default_hooks.non_finite.action='skip' skips such steps.)"
            )
        runner.logger.warning(f'{report}\nSkipped: {self.skipped} steps so far.')

    def _after_scaler_skip(self) -> None:
        """GradScaler took no step: overflow, or losses that no smaller scale makes finite."""
        bad = torch.tensor(int(not all(_finite(terms) for terms in self._losses)))
        all_reduce(bad, 'max')
        self._found = bool(bad)
        self._scaler_skips += 1
        if not bad and self._scaler_skips > self.max_scaler_skips:
            raise FloatingPointError(
                f'GradScaler skipped {self._scaler_skips} steps in a row: nothing is learned. '
                'Gradients overflow at any scale; try --cfg-options optim_wrapper.dtype=bfloat16, a '
                'lower learning rate, or no --amp'
            )

    def _report(self, runner: Runner, losses: list[dict]) -> str:
        terms = [
            f'{name} {float(value):.4g}' for name, value in (_terms(losses[-1]) if losses else ())
        ]
        norm = 'not taken' if self._norm is None else f'{self._norm:.4g}'
        lines = [
            f'Losses or gradients are not finite at iteration {runner.iter + 1} (epoch '
            f'{runner.epoch + 1}).',
            f'  images: {", ".join(_images(self._batch)) or "unknown"}',
            f'  losses: {", ".join(terms)}',
            f'  gradient norm: {norm}',
            f'  first in: {_trace(runner, self._batch, self._rng)}',
        ]
        return '\n'.join(lines)


def first_non_finite(model: nn.Module, statistics: bool = True) -> str | None:
    """Name of the first parameter, or running statistic, that is not finite."""
    values: list[tuple[str, Tensor]] = [*model.named_parameters()]
    if statistics:
        values += [(name, value) for name, value in model.named_buffers() if 'running_' in name]
    for name, value in values:
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group['params']]


def _norm(optimizer: torch.optim.Optimizer) -> Tensor:
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    return get_total_norm(gradients) if gradients else torch.zeros(())


def _terms(losses: dict) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each term, as MMEngine sums them up."""
    for name, value in losses.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        tensors = [v.detach().float().mean() for v in values if isinstance(v, Tensor)]
        if tensors:
            yield name, torch.stack(tensors).sum()


def _finite(losses: dict) -> Tensor:
    """Whether all terms are, a bool on the CPU."""
    values = [value for _, value in _terms(losses)]
    return torch.stack(values).isfinite().all().cpu() if values else torch.tensor(True)


def _images(batch: object) -> list[str]:
    """Paths or ids of a batch's images."""
    if isinstance(batch, BaseDataElement):
        found = [batch.get(key) for key in ('img_path', 'img_id', 'sample_idx')]
        return [str(next(value for value in [*found, 'unknown'] if value is not None))]
    if isinstance(batch, dict):
        batch = batch.get('data_samples', batch)
        batch = list(batch.values()) if isinstance(batch, dict) else batch
    if isinstance(batch, (list, tuple)):
        return [name for part in batch for name in _images(part)]
    return []


def _rng_states() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_rng_states(states: tuple) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _trace(runner: Runner, batch: object, rng: tuple) -> str:
    """Run a batch again, and name what first gave a value that is not finite.

    On each process by itself. The model's gradients are None afterwards.
    """
    weight = first_non_finite(runner.model, statistics=False)  # The batch has spoilt those.
    if weight is not None:
        return f'the weights themselves: {weight}'
    model, before = unwrap(runner.model), _rng_states()
    if any(type(m).__name__ == 'FullyShardedDataParallel' for m in runner.model.modules()):
        return 'unknown (a sharded model cannot be run again by one process)'
    bad: list[str] = []

    def look(name: str, module: nn.Module, output: object) -> None:
        if not bad and not all(t.isfinite().all() for t in _tensors(output)):
            bad.append(f'the output of {name} ({type(module).__name__})')

    handles = [
        module.register_forward_hook(lambda m, _, output, name=name: look(name, m, output))
        for name, module in model.named_modules()
        if name
    ]
    _set_rng_states(rng)
    try:
        model.zero_grad()
        with runner.optim_wrapper.optim_context(model):
            data = model.data_preprocessor(batch, True)
            losses = model._run_forward(data, mode='loss')
        loss, _ = model.parse_losses(losses)
        if bad:
            return bad[0]
        if not loss.isfinite():
            return 'a loss; the outputs of all modules are finite'
        loss.backward()
        return _first_gradient(model)
    except Exception as error:  # A batch that was changed by its first run, or a full memory.
        return f'unknown: running the batch again ended in {type(error).__name__}: {error}'
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
        _set_rng_states(before)


def _first_gradient(model: nn.Module) -> str:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not names and not get_total_norm(gradients).isfinite():
        return (
            'no gradient by itself, but they are so large that their norm is infinite, up to '
            f'{max(float(gradient.abs().max()) for gradient in gradients):.4g}'
        )
    if not names:
        return (
            'nothing on this process: here the batch gives finite values, as it may where '
            'another process or another iteration of the same step did not, or where the gradients '
            'overflow only when scaled'
        )
    # Backward goes from the end to the beginning.
    shown = ', '.join(reversed(names[-_NAMES_SHOWN:]))
    return f'the backward pass; {len(names)} gradients are not finite, the first {shown}'


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
