"""Measure the candidates of a case in turns, so that disturbances hit all alike."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..analysis.flops import FlopCounts
from .candidates import Candidate
from .memory import cpu_run_bytes, cuda_run_bytes, describe
from .workloads import Case, Workload, build_copy, build_workload, find_backend

COPY = 'copy'
"""Name of the memory copy that is measured along with operations."""

MIN_ROUNDS = 3
MIN_SECONDS = 0.02
"""Shorter runs are repeated to last this long, and the time divided."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: How often each candidate is measured.
        seconds: When to stop measuring a case, after three rounds at least; None for no limit.
        warmup: Calls before the first measurement.
        threads: Threads of CPU operations.
        memory: Whether to measure peak memory on the CPU, in a process for each candidate.
    """

    rounds: int = 10
    seconds: float | None = None
    warmup: int = 2
    threads: int = 1
    memory: bool = True


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Of at least one value."""
        low, q1, median, q3, high = map(float, np.percentile(values, [0, 25, 50, 75, 100]))
        return cls(median, q1, q3, low, high)


@dataclass
class Result:
    """The result of one candidate; None is unknown or does not apply.

    Attributes:
        name: Of the candidate.
        error: Why there are no times.
        backend: Of the super token operations of an SViT.
        parameters: Their number, including a detector's heads.
        layers: Multiply-adds of layers in inference of one image.
        total: ``layers`` plus products of activations, see :mod:`mmsvit.analysis.flops`.
        not_counted: Operators that multiply and are in neither, or why nothing was counted.
        weight_bytes: Size of parameters and buffers.
        run_bytes: Peak memory of a run on top, including gradients.
        first_seconds: Of the first call, with initialisation and any compilation.
        runs: How many runs each time is the mean of.
        seconds: Of one run, for each round.
        bytes_to_move: Fewest bytes that a run reads and writes.
        observed: Proposals and masks of a detector's batch, which depend on the weights.
        time: Of ``seconds``.
        ratio: Of ``seconds`` to the reference's, round by round.
        bandwidth_share: Bandwidth of moving ``bytes_to_move`` in ``seconds``, as a share of the
            copy's, round by round.
    """

    name: str
    error: str | None = None
    backend: str | None = None
    parameters: int | None = None
    layers: int | None = None
    total: int | None = None
    not_counted: str | None = None
    weight_bytes: int | None = None
    run_bytes: int | None = None
    first_seconds: float | None = None
    runs: int | None = None
    seconds: list[float] = field(default_factory=list)
    bytes_to_move: int | None = None
    observed: dict[str, int] = field(default_factory=dict)
    time: Spread | None = None
    ratio: Spread | None = None
    bandwidth_share: Spread | None = None

    @property
    def peak_bytes(self) -> int | None:
        """``weight_bytes`` plus ``run_bytes``."""
        if self.run_bytes is None or self.weight_bytes is None:
            return None
        return self.weight_bytes + self.run_bytes


@dataclass
class CaseResult:
    """The candidates of a case, all measured in the same rounds.

    ``reference`` is the candidate by whose times others are divided; None if none has times.
    """

    case: Case
    reference: str | None
    results: list[Result]


class _Runner:
    """A candidate ready to be timed, and its result."""

    def __init__(self, name: str, device: str) -> None:
        self.result = Result(name)
        self.device = device
        self.run: Callable[[], object] = _not_built
        self.calls = self.runs = 1

    @property
    def alive(self) -> bool:
        return self.result.error is None

    def attempt(self, step: Callable[[], None]) -> None:
        """Do ``step``; an error becomes the result, and memory is freed for others."""
        try:
            step()
        except Exception as error:  # Candidates raise anything.
            self.result.error = describe(error)
            self.result.seconds.clear()
            self.run = _not_built
        if not self.alive:  # Outside of `except`, where the error still holds tensors.
            _free(self.device)

    def find_backend(self, candidate: Candidate, case: Case) -> None:
        self.result.backend = find_backend(candidate, case)

    def measure_memory(self, candidate: Candidate, case: Case, threads: int) -> None:
        """Measure in a process of its own, first: the system may kill that one, not this one."""
        self.result.run_bytes = cpu_run_bytes(candidate, case, threads)

    def prepare(self, build: Callable[[], Workload], warmup: int, graph: bool = False) -> None:
        workload = build()
        result, self.run = self.result, workload.run
        result.parameters = workload.parameters
        result.weight_bytes = workload.weight_bytes
        result.bytes_to_move, result.observed = workload.bytes_to_move, workload.observed
        if workload.count is not None:
            self._count(workload.count)
        result.first_seconds = self.time(1)
        if self.device == 'cuda':
            workload.model.zero_grad(set_to_none=True)
            result.run_bytes = cuda_run_bytes(workload.run)
        if graph:
            self.run = _capture(workload.run)
        times = [self.time(1) for _ in range(max(warmup, 1))]
        self.calls = max(1, math.ceil(MIN_SECONDS / min(times)))
        result.runs = self.runs = self.calls * workload.runs

    def _count(self, count: Callable[[], tuple[FlopCounts, Counter[str]]]) -> None:
        """Count, or note why not: the times are of use without."""
        try:
            figures, uncounted = count()
        except Exception as error:
            self.result.not_counted = describe(error)
            return
        self.result.layers, self.result.total = figures.layers, figures.total
        if uncounted:
            names = (f'{name} ({times} times)' for name, times in uncounted.items())
            self.result.not_counted = ', '.join(names)

    def time(self, calls: int) -> float:
        """Seconds of ``calls`` calls, including the device's work."""
        if self.device == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                self.run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        start_time = time.perf_counter()
        for _ in range(calls):
            self.run()
        return time.perf_counter() - start_time

    def measure(self) -> None:
        self.result.seconds.append(self.time(self.calls) / self.runs)


def _not_built() -> None:
    raise RuntimeError('this candidate was not built, or has failed')


def _free(device: str) -> None:
    gc.collect()
    if device == 'cuda':
        torch.cuda.empty_cache()


def _capture(run: Callable[[], object]) -> Callable[[], object]:
    """Record ``run`` in a CUDA graph; it must have run before, to be initialised."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure_case(
    candidates: Sequence[Candidate],
    case: Case,
    settings: Settings,
    references: Sequence[str],
    progress: Callable[[str], None],
) -> CaseResult:
    """Measure all candidates in rounds, each of which starts with another candidate.

    If a candidate fails, its result has the error, and the others are measured.

    Args:
        candidates: What to compare.
        case: What they run.
        settings: How to measure.
        references: Names of candidates; times are divided by those of the first that has times.
        progress: Called with a description of each step.
    """
    torch.set_num_threads(settings.threads)
    _free(case.device)
    # Earlier cases would count towards the recompile limit, at which torch silently runs uncompiled
    # code; fail there instead.
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        runners = _prepare(candidates, case, settings, progress)
        _run_rounds(runners, settings, lambda done: progress(f'{case}: round {done + 1}'))
    results = [runner.result for runner in runners]
    measured = {result.name for result in results if not result.error}
    reference = next((name for name in references if name in measured), None)
    _summarise(results, reference)
    return CaseResult(case, reference, results)


def _prepare(
    candidates: Sequence[Candidate],
    case: Case,
    settings: Settings,
    progress: Callable[[str], None],
) -> list[_Runner]:
    """Build all candidates, measure their memory and warm them up; for operations also a copy."""
    runners = []
    for candidate in candidates:
        progress(f'{case}: preparing {candidate.name}')
        runner = _Runner(candidate.name, case.device)
        runners.append(runner)
        runner.attempt(partial(runner.find_backend, candidate, case))
        if runner.alive and case.device == 'cpu' and settings.memory:
            runner.attempt(partial(runner.measure_memory, candidate, case, settings.threads))
        if runner.alive:
            build = partial(build_workload, candidate, case)
            graph = 'graph' in candidate.flags
            runner.attempt(partial(runner.prepare, build, settings.warmup, graph))
    if case.is_op:
        copy = _Runner(COPY, case.device)
        copy.attempt(partial(copy.prepare, partial(build_copy, case.device), settings.warmup))
        runners.append(copy)
    return runners


def _run_rounds(
    runners: list[_Runner], settings: Settings, progress: Callable[[int], None]
) -> None:
    start = time.perf_counter()
    for done in range(settings.rounds):
        alive = [runner for runner in runners if runner.alive]
        late = settings.seconds is not None and time.perf_counter() - start > settings.seconds
        if not alive or (late and done >= MIN_ROUNDS):
            return
        progress(done)
        first = done % len(alive)
        for runner in alive[first:] + alive[:first]:
            runner.attempt(runner.measure)


def _summarise(results: list[Result], reference: str | None) -> None:
    """Compare candidates round by round, as the speed of a machine varies."""
    times = {result.name: np.array(result.seconds) for result in results if not result.error}
    copy = next((result for result in results if result.name == COPY and not result.error), None)
    for result in results:
        if result.error:
            continue
        seconds = times[result.name]
        result.time = Spread.of(seconds)
        if reference in times and result.name != COPY:
            result.ratio = Spread.of(seconds / times[reference])
        if copy is not None and result.bytes_to_move:
            bandwidth = copy.bytes_to_move / times[COPY]
            result.bandwidth_share = Spread.of(result.bytes_to_move / seconds / bandwidth)
