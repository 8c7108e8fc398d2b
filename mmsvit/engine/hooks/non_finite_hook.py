"""Detect NaN and infinity before they reach the weights, and trace their origin."""

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

    It checks both before each step, the gradients before they are clipped. Its report has the
    iteration, the images, the loss terms, the gradient norm, and the first module with a value
    that is not finite. To find that, the batch is run once more, forward and backward, with the
    same random numbers.

    Steps that ``GradScaler`` skips because scaled gradients overflow are part of mixed precision:
    they are counted, but not reported as long as the losses are finite.

    Args:
        action: ``'stop'``: end the run with an error; or ``'skip'``: skip the step (all of its
            iterations, where gradients are accumulated), and restore the running statistics.
        max_consecutive: Also end the run after more than so many skipped steps in a row.
        max_scaler_skips: Also end it after ``GradScaler`` skipped more than so many in a row.

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
        # Clipping may hide infinite gradients.
        self._unclipped[optimizer] = _norm(optimizer)
        clip()

    def _note_losses(self, model: nn.Module, inputs: tuple, output: object) -> None:
        if model.training and isinstance(output, dict):
            self._losses.append(output)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Remember what is needed to run the batch again."""
        self._batch, self._rng, self._norm, self._found = data_batch, _rng_states(), None, False
        self._unclipped.clear()
        if self.action == 'skip' and not self._losses:
            self._buffers = [(b, b.clone()) for b in unwrap(runner.model).buffers()]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if getattr(optimizer, 'found_inf', None):
            return  # GradScaler leaves it to fused optimizers to skip the step.
        norm = self._unclipped[optimizer] if optimizer in self._unclipped else _norm(optimizer)
        finite = torch.stack([_finite(terms) for terms in self._losses] + [norm.isfinite().cpu()])
        bad = torch.tensor(int(not finite.all()))
        all_reduce(bad, 'max')
        self._norm = float(norm)
        if bad:
            self._found = True
            for p in _parameters(optimizer):
                p.grad = None  # The step then changes no weights or momenta.

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Report a step that is not finite, and stop or skip it.

        Raises:
            FloatingPointError: The run stops; the weights are the last good ones.
        """
        if in_accumulation(runner):
            return
        if self._norm is None and isinstance(runner.optim_wrapper, OptimWrapper):
            self._after_scaler_skip()
        losses, self._losses = self._losses, []
        if not self._found:
            if self._norm is not None:
                self._consecutive = self._scaler_skips = 0
            return
        self._consecutive += 1
        self.skipped += 1
        report = self._report(runner, losses)
        self._losses = []  # Without those of the second run.
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
        """Tell an overflow, which a smaller scale cures, from losses that are not finite."""
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
        last = _terms(losses[-1]) if losses else ()
        terms = ', '.join(f'{name} {float(value):.4g}' for name, value in last)
        norm = 'not taken' if self._norm is None else f'{self._norm:.4g}'
        return (
            f'Losses or gradients are not finite at iteration {runner.iter + 1} (epoch '
            f'{runner.epoch + 1}).\n'
            f'  images: {", ".join(_images(self._batch)) or "unknown"}\n'
            f'  losses: {terms}\n'
            f'  gradient norm: {norm}\n'
            f'  first in: {_trace(runner, self._batch, self._rng)}'
        )


def in_accumulation(runner: Runner) -> bool:
    """Whether gradients are still being accumulated."""
    wrapper = runner.optim_wrapper
    return isinstance(wrapper, OptimWrapper) and not wrapper.should_update()


def first_non_finite(model: nn.Module, statistics: bool = True) -> str | None:
    """Name of the first parameter, or running statistic, that is not finite."""
    values: list[tuple[str, Tensor]] = [*model.named_parameters()]
    if statistics:
        values += [(name, value) for name, value in model.named_buffers() if 'running_' in name]
    bad = (name for name, x in values if x.is_floating_point() and not x.isfinite().all())
    return next(bad, None)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group['params']]


def _norm(optimizer: torch.optim.Optimizer) -> Tensor:
    gradients = [p.grad for p in _parameters(optimizer) if p.grad is not None]
    return get_total_norm(gradients) if gradients else torch.zeros(())


def _terms(losses: dict) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each term, reduced as MMEngine does."""
    for name, value in losses.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        tensors = [v.detach().float().mean() for v in values if isinstance(v, Tensor)]
        if tensors:
            yield name, torch.stack(tensors).sum()


def _finite(losses: dict) -> Tensor:
    """Whether all terms are finite, a bool on the CPU."""
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


def _set_rng_states(python: tuple, numpy: tuple, cpu: Tensor, cuda: Tensor | None) -> None:
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _trace(runner: Runner, batch: object, rng: tuple) -> str:
    """Run a batch again, and name what first gave a value that is not finite.

    Each rank does so alone. The model's gradients are None afterwards.
    """
    # The batch has already spoilt the running statistics.
    weight = first_non_finite(runner.model, statistics=False)
    if weight is not None:
        return f'the weights themselves: {weight}'
    model, before = unwrap(runner.model), _rng_states()
    if any(type(m).__name__ == 'FullyShardedDataParallel' for m in runner.model.modules()):
        return 'unknown (a single rank cannot run a sharded model again)'
    bad: list[str] = []

    def look(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if not bad and not all(t.isfinite().all() for t in _tensors(output)):
            bad.append(f'the output of {name} ({type(module).__name__})')

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in named]
    _set_rng_states(*rng)
    try:
        model.zero_grad()
        with runner.optim_wrapper.optim_context(model):
            losses = model._run_forward(model.data_preprocessor(batch, True), mode='loss')
        loss, _ = model.parse_losses(losses)
        if bad:
            return bad[0]
        if not loss.isfinite():
            return 'a loss; the outputs of all modules are finite'
        loss.backward()
        return _first_gradient(model)
    except Exception as error:  # The first run changed the batch, or memory is full.
        return f'unknown: running the batch again raised {type(error).__name__}: {error}'
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
        _set_rng_states(*before)


def _first_gradient(model: nn.Module) -> str:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if names:  # Backward goes from the end to the beginning.
        shown = ', '.join(reversed(names[-_NAMES_SHOWN:]))
        return f'the backward pass; {len(names)} gradients are not finite, the first {shown}'
    if not get_total_norm(list(gradients.values())).isfinite():
        return (
            'no single gradient, but their norm is infinite: the largest value is '
            f'{max(float(gradient.abs().max()) for gradient in gradients.values()):.4g}'
        )
    return (
        'nothing on this rank, where the batch gives finite values: another rank or another '
        'iteration of the same step did not, or the gradients overflow only when scaled'
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
