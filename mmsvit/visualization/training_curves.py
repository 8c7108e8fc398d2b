"""Curves of losses and metrics, from the logs of MMEngine's runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""

Curve = tuple[list[float], list[float]]


def read_curves(work_dir: str | Path) -> dict[str, Curve]:
    """All scalars of a run, in the order of their steps.

    Args:
        work_dir: A run's work_dir, with ``*/vis_data/scalars.json`` of the run and of those that
            resumed it, or one such file.

    Returns:
        Steps and values of each scalar. Earlier files count up to the step where a later file
        begins, which was resumed from an earlier checkpoint or started anew. The steps of
        validations in an epoch-based run are epochs.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A file is not such a log. (An incomplete last line is skipped.)
    """
    path = Path(work_dir)
    files = [path] if path.is_file() else sorted(path.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(
            f'no log of a run in {str(path)!r}: looked for */vis_data/scalars.json, which '
            'LocalVisBackend of the config writes'
        )
    training: dict[float, dict] = {}
    validations: dict[float, dict] = {}
    for file in files:
        trained, validated = _read_log(file)
        begins = [first.get('epoch', step) for step, first in list(trained.items())[:1]]
        training = _continued(training, trained, list(trained))
        validations = _continued(validations, validated, [*begins, *validated])
    curves: dict[str, Curve] = {}
    # Times are logged for both; prefer those of training, which are more.
    for records in (training, validations):
        for key in {key: None for record in records.values() for key in record}:
            at = [
                step for step in sorted(records) if isinstance(records[step].get(key), (int, float))
            ]
            if at:
                curves.setdefault(key, (at, [records[step][key] for step in at]))
    return curves


def _read_log(file: Path) -> tuple[dict[float, dict], dict[float, dict]]:
    """Records of training and of validations, by step."""
    training: dict[float, dict] = {}
    validations: dict[float, dict] = {}
    for number, line in enumerate(file.read_text().splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            step = record['step']
        except (ValueError, KeyError, TypeError) as error:
            if not line.endswith('\n'):
                break
            raise ValueError(
                f'{file}, line {number}: expected a record with a step, found {line[:80]!r}'
            ) from error
        records = training if 'iter' in record else validations
        records[step] = {**records.get(step, {}), **record}
    return training, validations


def _continued(
    before: dict[float, dict], after: dict[float, dict], steps: Sequence[float]
) -> dict[float, dict]:
    """Records of ``before`` below the first of these steps, and all of ``after``."""
    begin = min(steps, default=float('inf'))
    return {**{step: record for step, record in before.items() if step < begin}, **after}


def choose_metrics(names: Sequence[str]) -> list[str]:
    """The main metrics among the scalars of a run, in order of importance."""
    usual = ('bbox_mAP', 'segm_mAP', 'mIoU', 'aAcc', 'top1', 'top5')
    return [name for ending in usual for name in names if name.rpartition('/')[2] == ending]


def draw_curves(
    runs: dict[str, dict[str, Curve]], losses: Sequence[str], metrics: Sequence[str]
) -> Figure:
    """Losses on the left, metrics on the right.

    Args:
        runs: The curves of each run, by its name.
        losses: Scalars logged in training.
        metrics: Scalars logged in validation.

    Raises:
        ValueError: No run has one of the scalars; the message lists the available ones.
    """
    known = sorted({name for curves in runs.values() for name in curves})
    unknown = [name for name in (*losses, *metrics) if name not in known]
    if unknown or not (losses or metrics):
        raise ValueError(f'no run has {unknown or "a loss or metric"}; available: {known}')
    # The runner smooths losses before it logs them.
    panels = [
        (names, label, style)
        for names, label, style in (
            (losses, 'step', dict()),
            (metrics, 'epoch or step of the validation', dict(marker='o', clip_on=False)),
        )
        if names
    ]
    figure = Figure((5.6 * len(panels), 3.8), dpi=130, layout='constrained')
    columns = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (names, label, style) in zip(columns, panels):
        drawn = [(run, name) for run, curves in runs.items() for name in names if name in curves]
        for i, (run, name) in enumerate(drawn):
            axes.plot(
                *runs[run][name],
                color=COLOURS[i % len(COLOURS)],
                linewidth=2,
                label=name if len(runs) == 1 else f'{run}: {name}',
                **style,
            )
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
    return figure
