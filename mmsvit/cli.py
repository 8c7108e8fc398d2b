"""What the tools share: options, reading a config, starting and ending a run."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import get_backend, is_distributed
from mmengine.hooks import CheckpointHook

from .compat.gpu import unseen_gpu
from .config_keys import check_keys, check_options
from .datasets.report import printable


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a tool as it is written, with ``--debug`` for :func:`run`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--debug', action='store_true', help='show where in the code an error arose'
    )
    return parser


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, for :func:`mmsvit.checkpoint.trust_checkpoints`."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='DANGEROUS: let the checkpoints that are read run code, with all your rights; only for '
        'files of people whose programs you would run',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, for :func:`read_config`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings to override, as key=value pairs: model.backbone.arch=base '
        "'train_dataloader.batch_size=4' 'key=[a,b]'",
    )
    parser.add_argument(
        '--allow-unknown-keys',
        action='store_true',
        help='accept settings that nothing is known to read, such as misspelt ones',
    )


# Of the 2.x generation of OpenMMLab's configs, at the top level.
OLD_KEYS = ('data', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'total_epochs')


def read_config(file: str | Path, args: argparse.Namespace) -> Config:
    """Read a config, and write the ``--cfg-options`` of :func:`add_config_options` into it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Nothing reads one of the settings, and the message says what may be meant; or the
            config is of an earlier generation.
    """
    try:
        cfg = Config.fromfile(file)
    except (AssertionError, ModuleNotFoundError, ValueError) as error:
        # What MMEngine says of '::' in _base_ where it cannot find the package.
        if re.search('load mmsvit config|please specify the package|please install', str(error)):
            raise ValueError(
                f"{file} inherits by '::' what MMEngine does not find ({error}). This always works: "
                "_base_ = [__import__('mmsvit').config_path('svit_maskrcnn_coco.py')] for mmsvit's "
                "configs, config_path('mmdet::NAME.py') for those of another package"
            ) from error
        raise
    old = [key for key in OLD_KEYS if key in cfg]
    if 'train_dataloader' not in cfg and len(old) > 1:
        raise ValueError(
            f'{file} is a config of MMDetection 2.x or MMSegmentation 0.x ({", ".join(old)}), which their '
            'present releases do not read. Inherit from a present config, as examples/ do: data becomes '
            'train_dataloader, val_dataloader and test_dataloader, optimizer goes into optim_wrapper, '
            'lr_config becomes param_scheduler, and runner train_cfg'
        )
    if not args.allow_unknown_keys:
        check_keys(cfg)
        check_options(cfg, args.cfg_options or {})
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``tools/train.py`` and ``tools/test.py`` share."""
    add_trust_option(parser)
    add_config_options(parser)
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='who starts the processes of a distributed run',
    )
    # torchrun's predecessor passes this on; torchrun sets the variable itself.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _find_sync_bn(node: dict | list | tuple, key: str) -> Iterator[str]:
    """The keys of a config under which a batch norm is one that processes share."""
    parts: Iterable = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in parts:
        if name == 'type' and 'SyncB' in str(value):
            yield f'{key}.type'
        elif isinstance(value, (dict, list, tuple)):
            yield from _find_sync_bn(value, f'{key}.{name}')


def check_sync_bn(cfg: Config) -> None:
    """Refuse to train in several processes without GPUs what torch can only train on GPUs.

    Raises:
        ValueError: The model has SyncBN; the message says how to do without.
    """
    keys = list(_find_sync_bn(cfg.model, 'model'))
    if keys:
        options = ' '.join(f'{key}=BN' for key in keys)
        raise ValueError(
            'several processes train SyncBN on CUDA GPUs only, and torch finds none. Train in one '
            'process (--launcher none), or with batch statistics of each process: --cfg-options '
            f'{options}'
        )


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of ``args``, with the options of :func:`add_arguments` written into it.

    Raises:
        FileNotFoundError: There is no such config.
    """
    cfg = read_config(args.config, args)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def start_processes(cfg: Config, local_rank: int, trains: bool) -> None:
    """Join the other processes of a distributed run without GPUs.

    MMEngine's own start-up and model wrapper insist on CUDA devices. With GPUs, or in a single
    process, MMEngine does it by itself.

    Args:
        cfg: From :func:`load_config`; the model wrapper is set for CPUs.
        local_rank: The rank on this machine, unless the environment has it.
        trains: Whether the model is trained.

    Raises:
        ValueError: The model has SyncBN, which cannot be trained without GPUs.
    """
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    if cfg.launcher != 'pytorch' or torch.cuda.is_available():
        return
    if trains:
        check_sync_bn(cfg)
    torch.distributed.init_process_group('gloo')
    cfg.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel'))
    cfg.model_wrapper_cfg.device_ids = None
    cfg.model_wrapper_cfg.setdefault(
        'find_unused_parameters', cfg.get('find_unused_parameters', False)
    )


def add_hook(cfg: Config, hook: dict) -> None:
    """Add a hook to a config, unless it has one of that type already."""
    hooks = cfg.get('custom_hooks') or []
    if not any(other.get('type') == hook['type'] for other in hooks):
        cfg.custom_hooks = [*hooks, hook]


# What keeps a run from being lost, by the names that the configs give them.
GUARDS = dict(
    exact_resume='mmsvit.ExactResumeHook',
    stop_signal='mmsvit.StopSignalHook',
    non_finite='mmsvit.NonFiniteHook',
    bad_samples='mmsvit.BadSamplesHook',
    run_record='mmsvit.RunRecordHook',
    ops_backend='mmsvit.OpsBackendHook',
    log_errors='mmsvit.LogErrorsHook',
)


def add_guards(cfg: Config) -> None:
    """Add to a config of any origin what mmsvit's own have in ``default_hooks``.

    What the config sets stays as it is; one that is set to None is left out.
    """
    hooks = cfg.setdefault('default_hooks', {})
    for name, kind in GUARDS.items():
        if hooks.setdefault(name, {}) is None:
            del hooks[name]
        else:
            hooks[name].setdefault('type', kind)
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint is not None and checkpoint['type'] in ('CheckpointHook', CheckpointHook):
        checkpoint['type'] = 'mmsvit.SafeCheckpointHook'


def is_refusal(error: BaseException) -> bool:
    """Whether an error was raised on purpose, by mmsvit or its tools, so that its message says all."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    package = Path(__file__).parent
    file = Path(frames[-1].filename)
    if isinstance(error, AssertionError) and file.name == 'num_class_check_hook.py':
        return True  # MMDetection's, whose message says what differs.
    if not (frames[-1].line or '').startswith('raise '):
        return False
    return file.is_relative_to(package) or file.parent == Path(sys.argv[0]).absolute().parent


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another process of a distributed run is gone."""
    lost = (
        'Connection closed by peer',
        'Connection reset by peer',
        'Broken pipe',
        'Timed out waiting',
    )
    return is_distributed() and (
        isinstance(error, torch.distributed.DistError)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in lost))
    )


def require_gpu() -> None:
    """Refuse to compute on the CPU where there is a GPU that torch does not see.

    Raises:
        ValueError: It says why, and what to do.
    """
    if unseen := unseen_gpu():
        raise ValueError(unseen)


def run(main: Callable[[], None]) -> None:
    """Run the main function of a tool: a refusal ends it in a sentence; then close its process group.

    Threads of a gloo group that the interpreter does not outlive abort the process when it ends, and
    a run that has finished is reported as failed, an error as a crash. They go with the last that
    refers to the group: what wraps the model, which the runner and a traceback hold.

    Raises:
        SystemExit: With the status that ``main`` left with, if it did not return; 1 after a refusal
            (:func:`is_refusal`, without ``--debug``), or after an error in a gloo group, whose
            traceback has been printed.
    """
    status: int | str | None = None
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        if is_refusal(error) and '--debug' not in sys.argv:
            # Printed by sys.exit, which then exits with 1.
            status = f'{Path(sys.argv[0]).name}: {error} (--debug shows where this arose)'
        elif is_lost_rank(error) and '--debug' not in sys.argv:
            status = (
                f'{Path(sys.argv[0]).name}: another rank of this run is gone, or does not answer '
                f'({str(error).partition(chr(10))[0]}). Its own output, or the report of torchrun, says '
                'why. Start all ranks again with --resume: they continue from the latest valid checkpoint'
            )
        elif get_backend() == 'gloo':
            traceback.print_exc()
            status = 1
        else:
            raise
        if get_backend() not in (None, 'gloo'):
            sys.exit(status)  # NCCL could wait for the others.
    if is_distributed():
        torch.distributed.destroy_process_group()
        gc.collect()
    if status is not None:
        sys.exit(printable(status) if isinstance(status, str) else status)
