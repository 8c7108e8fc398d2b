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
        Steps and values of each scalar. Where a later file begins, what earlier ones have from
        there on is left out: it was resumed from an earlier checkpoint, or begun anew.
        Validations of an epoch-based run have epochs for steps.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: A file is no such log. (A last line that a kill cut off is left out.)
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
    # Seconds are logged for both; those of training are more.
    for records in (training, validations):
        for key in {key: None for record in records.values() for key in record}:
            at = [
                step for step in sorted(records) if isinstance(records[step].get(key), (int, float))
            ]
            if at:
                curves.setdefault(key, (at, [records[step][key] for step in at]))
    return curves


def _read_log(file: Path) -> tuple[dict[float, dict], dict[float, dict]]:
    """Records of training and those of validations, by their steps."""
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
    """Records up to the first of these steps, and later ones."""
    begin = min(steps, default=float('inf'))
    return {**{step: record for step, record in before.items() if step < begin}, **after}


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
