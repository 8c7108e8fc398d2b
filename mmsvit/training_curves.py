"""Curves of losses and metrics, from what MMEngine's runner logs."""

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
        work_dir: A run's folder, with ``*/vis_data/scalars.json`` of the run and of what
            resumed it, or one such file.

    Returns:
        Steps and values of each scalar. What was logged again after a resumption replaces
        what was there. Validations of an epoch-based run have epochs for steps.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A file is no such log.
    """
    path = Path(work_dir)
    files = [path] if path.is_file() else sorted(path.glob('*/vis_data/scalars.json'))
    if not files:
        raise FileNotFoundError(
            f'no log of a run in {str(path)!r}: looked for */vis_data/scalars.json, which '
            'LocalVisBackend of the config writes'
        )
    values: dict[str, dict[float, float]] = {}
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                step = record['step']
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {number}: expected a record with a step, found {line[:80]!r}'
                ) from error
            for key, value in record.items():
                if isinstance(value, (int, float)):
                    values.setdefault(key, {})[step] = value
    return {key: (sorted(at), [at[step] for step in sorted(at)]) for key, at in values.items()}


def choose_metrics(names: Sequence[str]) -> list[str]:
    """Of the scalars of a run, the metrics that one looks at first."""
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
        ValueError: No run has one of the scalars; the message names those that there are.
    """
    known = sorted({name for curves in runs.values() for name in curves})
    unknown = [name for name in (*losses, *metrics) if name not in known]
    if unknown or not (losses or metrics):
        raise ValueError(f'no run has {unknown or "a loss or metric"}; there are {known}')
    # The runner has averaged losses over a window before it logs them.
    panels = [
        (names, label, style)
        for names, label, style in (
            (losses, 'step', dict()),
            (metrics, 'epoch or step of the validation', dict(marker='o', clip_on=False)),
        )
        if names
    ]
    figure = Figure((5.6 * len(panels), 3.8), dpi=130, layout='constrained')
    for axes, (names, label, style) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
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
