"""Hours of work in small: memory that does not grow, workers that die, a thousand images.

pytest -m stress tests/stress -s
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from mmengine.config import Config

pytestmark = pytest.mark.stress

ITERATIONS = 2000
IMAGES = 1000
KILLS = 3
# Allocators keep what they got; more than this is a leak.
SLACK_MB = 25

TINY = """
_base_ = {base!r}
data_root = {data!r}
model = dict(
    backbone=dict(
        arch=dict(
            embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
            super_token_sizes=(8, 4, 1, 1), num_iters=(1, 1, 1, 1), layer_scale=(None,) * 4,
        ),
    ),
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
        mask_head=dict(in_channels=16, conv_out_channels=8, num_convs=1),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))
    ),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20)),
)
train_dataloader = dict(
    batch_size=2, num_workers=2, persistent_workers=True, dataset=dict(data_root=data_root)
)
val_cfg = val_dataloader = val_evaluator = None
test_dataloader = dict(dataset=dict(data_root=data_root))
test_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
default_hooks = dict(logger=dict(interval=50))
"""


def resident_mb(pid: int | str = 'self') -> float:
    """Resident memory of a process, in MB."""
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> Path:
    """The config of a very small Mask R-CNN on images of 64 pixels."""
    folder = tmp_path_factory.mktemp('stress')
    data = folder / 'shapes'
    sizes = ['--num-train', '40', '--num-val', '4', '--size', '64']
    run_python('tools/make_shapes_dataset.py', data, *sizes)
    config = folder / 'tiny.py'
    base = str(ROOT / 'configs' / 'svit_maskrcnn_shapes.py')
    config.write_text(TINY.format(base=base, data=f'{data}/'))
    return config


def small_images(config: Path) -> list[str]:
    cfg = Config.fromfile(config)
    found = []
    for split in ('train', 'test'):
        pipeline = cfg[f'{split}_dataloader'].dataset.pipeline
        place = next(i for i, step in enumerate(pipeline) if step['type'] == 'Resize')
        found.append(f'{split}_dataloader.dataset.pipeline.{place}.scale=(64,64)')
    return found


def start_training(config: Path, work_dir: Path, epochs: int, *more: str) -> subprocess.Popen:
    options = [*small_images(config), f'train_cfg.max_epochs={epochs}']
    command = [sys.executable, ROOT / 'tools' / 'train.py', config, '--work-dir', work_dir, *more]
    command += ['--cfg-options', *options]
    log = (work_dir.parent / f'{work_dir.name}.log').open('a')
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)


def read_log(work_dir: Path) -> str:
    return (work_dir.parent / f'{work_dir.name}.log').read_text()


@pytest.mark.promise(
    'Load',
    'Memory does not grow in training',
    '[stress.md](stress.md): 916 MB in the second and 917 MB in the last quarter of 2,000 '
    'iterations',
)
def test_memory_of_two_thousand_iterations(tiny, tmp_path, record):
    work_dir = tmp_path / 'work'
    start = time.monotonic()
    process = start_training(tiny, work_dir, ITERATIONS // 20)
    samples: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(1)
        log = read_log(work_dir)
        done = re.findall(r'Epoch\(train\) *\[(\d+)\]\[ *(\d+)/ *(\d+)\]', log)
        if done:
            epoch, iteration, length = map(int, done[-1])
            try:
                samples.append(((epoch - 1) * length + iteration, resident_mb(process.pid)))
            except (FileNotFoundError, ProcessLookupError):
                break
    assert process.wait() == 0, read_log(work_dir)[-2000:]
    warm = [mb for iteration, mb in samples if ITERATIONS // 4 <= iteration < ITERATIONS // 2]
    late = [mb for iteration, mb in samples if iteration >= 3 * ITERATIONS // 4]
    assert len(warm) > 3 and len(late) > 3, 'too few looks to tell anything'
    record(
        f'{ITERATIONS} iterations in {time.monotonic() - start:.0f} s; {max(warm):.0f} MB at most in '
        f'the second quarter, {max(late):.0f} MB in the last'
    )
    assert max(late) - max(warm) < SLACK_MB


def workers_of(pid: int) -> list[int]:
    """Processes that a run has forked: its DataLoader's workers, and a resource tracker or two."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    own = Path(f'/proc/{pid}/cmdline').read_bytes()
    return [int(c) for c in children if Path(f'/proc/{c}/cmdline').read_bytes() == own]


@pytest.mark.promise(
    'Runs',
    'A killed data worker ends the run with a message, and the run can be resumed',
    '3 kills ([stress.md](stress.md)), each named within 1.4 s, then resumed to the end',
)
def test_killed_workers_end_the_run_loudly_and_it_goes_on(tiny, tmp_path, record):
    work_dir, epochs, waited = tmp_path / 'work', 12, []
    latest = work_dir / 'last_checkpoint'
    for kill in range(KILLS + 1):
        process = start_training(tiny, work_dir, epochs, '--resume')
        before = len(read_log(work_dir))
        if kill == KILLS:
            break
        # Until this run has saved a checkpoint of its own.
        saved = latest.read_text() if latest.is_file() else None
        while not latest.is_file() or latest.read_text() in (saved, ''):
            assert process.poll() is None, read_log(work_dir)[-2000:]
            time.sleep(0.1)
        victims = workers_of(process.pid)
        assert len(victims) == 2
        os.kill(victims[kill % 2], signal.SIGKILL)
        start = time.monotonic()
        assert process.wait(timeout=60) != 0
        waited.append(time.monotonic() - start)
        message = read_log(work_dir)[before:]
        assert re.search(r'DataLoader worker \(pid.*\) (is killed by signal|exited)', message)
        assert 'resumed epoch' in message or kill == 0
    assert process.wait(timeout=170) == 0, read_log(work_dir)[-2000:]
    checkpoint = torch.load(work_dir / f'epoch_{epochs}.pth', weights_only=True)
    assert checkpoint['meta']['epoch'] == epochs and checkpoint['meta']['iter'] == 20 * epochs
    record(
        f'{KILLS} workers killed; each run said so and ended within {max(waited):.1f} s, and went on '
        f'with --resume to epoch {epochs}'
    )


@pytest.mark.promise(
    'Load',
    'Memory does not grow in inference',
    '1,000 images: 922 MB in the first quarter, 933 MB after it',
)
def test_a_thousand_images_of_mixed_sizes(tiny, record):
    from mmdet.apis import inference_detector, init_detector

    torch.manual_seed(0)
    cfg = Config.fromfile(tiny)
    cfg.test_dataloader.dataset.pipeline[1].scale = (256, 128)  # Kept in ratio: mixed inputs, too.
    model = init_detector(cfg, device='cpu')
    random = np.random.default_rng(0)
    seen, memory, start = set(), [], time.monotonic()
    for _ in range(IMAGES):
        height, width = random.integers(20, 600, size=2)
        image = random.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        result = inference_detector(model, image)
        assert result.pred_instances.scores.isfinite().all()
        seen.add(result.img_shape)
        memory.append(resident_mb())
    warm, rest = max(memory[: IMAGES // 4]), max(memory[IMAGES // 4 :])
    record(
        f'{IMAGES} images, {len(seen)} sizes after resizing, in {time.monotonic() - start:.0f} s; '
        f'{warm:.0f} MB at most in the first quarter, {rest:.0f} MB after it'
    )
    assert len(seen) > 100
    assert rest - warm < SLACK_MB
