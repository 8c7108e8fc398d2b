r"""Train backbones under one config of a segmentor, each at the best of the same learning rates.

    python tools/compare_backbones.py configs/camvid/svit-s_fpn_cpu_camvid.py \
        --models svit-s:16-8-1-1 swin-t r50 --out work_dirs/camvid

Neck, head, images and their order, augmentation, iterations and batch are the config's; weights
are random. A short search on the validation images chooses each backbone's learning rate; then
each seed is trained, and the last weights are evaluated on the test images. Finished runs are
kept: the same command goes on where it was killed. OUT/README.md and OUT/curves.png are written
anew after each run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from mmengine.config import Config
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mmseg.evaluation import IoUMetric
from mmseg.utils import register_all_modules

from mmsvit.benchmarking.candidates import Candidate, parse_candidate
from mmsvit.benchmarking.environment import describe_environment
from mmsvit.checkpoint.files import AtomicLocalBackend
from mmsvit.cli import add_config_options, add_guards, make_parser, read_config, run
from mmsvit.datasets.quick_checks import check_data
from mmsvit.visualization.training_curves import draw_curves, read_curves


@METRICS.register_module(force=True)
class ClassIoUMetric(IoUMetric):
    """MMSegmentation's metric, and the IoU of each class."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Per cent: ``IoU.NAME`` of each class, ``mIoU`` and the others."""
        metrics = super().compute_metrics(results)
        intersections, unions = (sum(areas) for areas in list(zip(*results))[:2])
        ious = (100 * intersections / unions).tolist()
        names = self.dataset_meta['classes']
        return metrics | {f'IoU.{name}': round(iou, 2) for name, iou in zip(names, ious)}


class Run(NamedTuple):
    """One training run; the name is that of its folder."""

    model: str
    lr: float
    iterations: int
    seed: int
    search: bool

    @property
    def name(self) -> str:
        """Such as ``swin-t_lr0.0005_500_seed0``."""
        model = self.model.replace(':', '-')
        return f'{model}_lr{self.lr:g}_{self.iterations}_seed{self.seed}'


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('config', type=Path, help='a config of MMSegmentation with an FPN neck')
    parser.add_argument(
        '--models',
        nargs='+',
        type=parse_candidate,
        required=True,
        metavar='NAME',
        help='backbones, by the names of tools/benchmark.py',
    )
    parser.add_argument(
        '--lrs', nargs='+', type=float, default=[2e-4, 5e-4, 1e-3], help='learning rates to try'
    )
    parser.add_argument(
        '--search-iters', type=int, default=400, help='iterations of a run of the search'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument('--out', type=Path, required=True, help='folder of runs and results')
    add_config_options(parser)
    return parser.parse_args()


def make_config(base: Config, candidate: Candidate, one: Run, folder: Path) -> Config:
    """The config of one run."""
    cfg = Config(base.to_dict())
    cfg.work_dir, cfg.experiment_name = str(folder), one.name
    norm = {'norm_cfg': base.model.backbone.norm_cfg} if candidate.is_svit else {}
    cfg.model.backbone = dict(candidate.backbone, **norm)
    cfg.model.neck.in_channels = candidate.out_channels
    cfg.optim_wrapper.optimizer.lr = one.lr
    cfg.randomness = dict(seed=one.seed)
    # The schedule of a search is the whole one, in less time.
    cfg.train_cfg.max_iters = one.iterations
    cfg.train_cfg.val_interval = min(base.train_cfg.val_interval, one.iterations)
    for scheduler in cfg.param_scheduler:
        for key in ('begin', 'end'):
            if key in scheduler:
                steps = scheduler[key] * one.iterations / base.train_cfg.max_iters
                scheduler[key] = round(steps) if key == 'begin' else max(round(steps), 1)
    cfg.default_hooks.checkpoint.interval = cfg.train_cfg.val_interval
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.default_hooks.checkpoint.save_best = None
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.type = 'ClassIoUMetric'
    cfg.visualizer.name = one.name  # By its name MMEngine finds the last one, with its folder.
    cfg.resume = True
    add_guards(cfg)
    return cfg


def train(base: Config, candidate: Candidate, one: Run, out: Path) -> dict:
    """Train and evaluate, unless it is done; the record of the run."""
    folder = out / one.name
    record = folder / 'result.json'
    if record.is_file():
        return json.loads(record.read_text())
    runner = Runner.from_cfg(make_config(base, candidate, one, folder))
    runner.train()
    curves = read_curves(folder)
    metrics = {key: curves[key][1][-1] for key in curves if 'IoU' in key}
    if not one.search:
        metrics = runner.test()
    result = dict(
        one._asdict(),
        metrics={key: float(value) for key, value in metrics.items()},
        parameters=sum(p.numel() for p in runner.model.backbone.parameters()),
        seconds_per_iteration=median(curves['time'][1]),
        environment=describe_environment(),
    )
    AtomicLocalBackend().put_text(json.dumps(result, indent=1), record)
    return result


def compare(args: argparse.Namespace, base: Config) -> Iterator[list[dict]]:
    """Train what is missing; all results so far, after each run."""
    results: list[dict] = []
    best: dict[str, float] = {}
    total = base.train_cfg.max_iters
    for candidate in args.models:
        for lr in args.lrs:
            one = Run(candidate.name, lr, args.search_iters, args.seeds[0], search=True)
            results.append(train(base, candidate, one, args.out))
            yield results
        found = [result for result in results if result['model'] == candidate.name]
        best[candidate.name] = max(found, key=lambda result: result['metrics']['mIoU'])['lr']
    for seed in args.seeds:
        for candidate in args.models:
            one = Run(candidate.name, best[candidate.name], total, seed, search=False)
            results.append(train(base, candidate, one, args.out))
            yield results


def _row(cells: list[object]) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def _table(heading: list[str], rows: list[list[object]]) -> str:
    return '\n'.join(map(_row, [heading, ['---', *['---:'] * (len(heading) - 1)], *rows]))


def markdown(results: list[dict], lrs: list[float]) -> str:
    """The tables: results on the test images, of each class, and the search."""
    final = [result for result in results if not result['search']]
    models = list(dict.fromkeys(result['model'] for result in results))
    rows, classes = [], []
    names = [key for key in results[0]['metrics'] if key.startswith('IoU.')]
    for model in models:
        mine = [result for result in final if result['model'] == model]
        if not mine:
            continue
        scores = [result['metrics']['mIoU'] for result in mine]
        seconds = median(result['seconds_per_iteration'] for result in mine)
        parameters = f'{mine[0]["parameters"] / 1e6:.1f}'
        each = ', '.join(f'{score:.2f}' for score in scores)
        rows.append(
            [model, parameters, f'{mine[0]["lr"]:g}', f'{mean(scores):.2f}', each, f'{seconds:.2f}']
        )
        means = [mean(result['metrics'][name] for result in mine) for name in names]
        classes.append([model, *(f'{value:.1f}' for value in means)])
    search = [
        [
            model,
            *(
                f'{result["metrics"]["mIoU"]:.2f}'
                for lr in lrs
                for result in results
                if result['search'] and (result['model'], result['lr']) == (model, lr)
            ),
        ]
        for model in models
    ]
    heading = ['backbone', 'parameters, M', 'learning rate', 'test mIoU', 'of each seed']
    parts = [
        _table([*heading, 'seconds an iteration'], rows),
        'IoU of each class, mean of the seeds:',
        _table(['backbone', *(name.removeprefix('IoU.') for name in names)], classes),
        f'The search, mIoU on the validation images after {results[0]["iterations"]} iterations:',
        _table(['backbone', *(f'{lr:g}' for lr in lrs)], search),
    ]
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    args = parse_args()
    register_all_modules()
    base = read_config(args.config, args)
    check_data(base, ('train', 'val', 'test'))
    for results in compare(args, base):
        AtomicLocalBackend().put_text(markdown(results, args.lrs), args.out / 'README.md')
        first = min(args.seeds)
        final = [Run(**{key: result[key] for key in Run._fields}) for result in results]
        curves = {
            one.model: read_curves(args.out / one.name)
            for one in final
            if not one.search and one.seed == first
        }
        if curves:
            figure = draw_curves(curves, ['loss'], ['mIoU'])
            figure.savefig(args.out / 'curves.png')


if __name__ == '__main__':
    run(main)
