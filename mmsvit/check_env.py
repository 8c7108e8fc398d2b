"""Say what is installed, whether it works, and how to mend what does not.

    python -m mmsvit.check_env

Needs nothing but Python itself, so that it can tell what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import re
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

FAMILIES = {
    'onedl': {
        'mmengine': 'onedl-mmengine',
        'mmcv': 'onedl-mmcv',
        'mmdet': 'onedl-mmdetection',
        'mmseg': 'onedl-mmsegmentation',
        'mmpretrain': 'onedl-mmpretrain',
    },
    'openmmlab': {
        'mmengine': 'mmengine',
        'mmcv': 'mmcv',
        'mmdet': 'mmdet',
        'mmseg': 'mmsegmentation',
        'mmpretrain': 'mmpretrain',
    },
}
"""Import names and the distributions that hold them, in the two families of releases."""

# What goes wrong in practice: a pattern of the error, and the way out.
KNOWN_ERRORS = {
    r'torchvision::nms does not exist|torchvision.*undefined symbol': (
        'torchvision was built for another torch. Install a pair that belongs together: '
        'pip install torch==2.11.0 torchvision==0.26.0'
    ),
    r'_ext.*undefined symbol|undefined symbol.*_ext': (
        "mmcv's ops were built for another torch. Build them again: "
        'bash tools/quickstart.sh, or the last lines of requirements.txt'
    ),
    r"No module named 'mmcv\._ext'|compiled with ops|mmcv\.ops.*not (found|available)": (
        "mmcv was installed without its compiled ops. Build them, after torch and without pip's "
        'isolation; the last lines of requirements.txt (requirements-openmmlab.txt for '
        "OpenMMLab's own releases) say how"
    ),
    r"No module named 'pkg_resources'": (
        "this mmcv needs an older setuptools: pip install 'setuptools<81'"
    ),
    r'libGL\.so|libgthread|libglib': (
        'OpenCV lacks system libraries: apt-get install libgl1 libglib2.0-0'
    ),
    r'numpy\.core\.multiarray failed to import|compiled using NumPy 1|_ARRAY_API not found': (
        'a package was built for another numpy: pip install numpy==2.2.6'
    ),
    r'MMCV==.* is used but incompatible|MMEngine==.* is used but incompatible': (
        'releases that do not belong together: install all of requirements.txt, or all of '
        'requirements-openmmlab.txt'
    ),
    r"No module named '(torch|torchvision|numpy|cv2|mmengine|mmcv|mmdet)'": (
        'not installed. See requirements.txt, or let tools/quickstart.sh install everything'
    ),
}


def fix_for(error: str) -> str | None:
    """The way out of a known error, found by its text."""
    fixes = (fix for known, fix in KNOWN_ERRORS.items() if re.search(known, error, re.DOTALL))
    return next(fixes, None)


@dataclass
class Report:
    """Lines to print, and what is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """What to do, and the checks that ask for it."""

    def add(self, name: str, value: str) -> None:
        """Add a line."""
        self.lines.append(f'{name:<22} {value}')

    def run(self, name: str, check: Callable[[], str], required: bool = True) -> None:
        """Add what ``check`` returns, or the error that it raises.

        An error is a problem if the check is ``required``, or where the fix is known: a
        broken part breaks others, a missing one does not.
        """
        try:
            self.add(name, check())
        except Exception as error:  # Whatever a broken installation raises.
            text = f'{type(error).__name__}: {error}'.splitlines()[0]
            self.add(name, text)
            if required or not isinstance(error, ModuleNotFoundError):
                self.problems.setdefault(fix_for(str(error)) or text, []).append(name)


def installed_families() -> dict[str, list[str]]:
    """Which distributions of each family are installed."""
    names = {(dist.metadata['Name'] or '').lower() for dist in metadata.distributions()}
    known = {family: [*distributions.values()] for family, distributions in FAMILIES.items()}
    known['openmmlab'].append('mmcv-lite')
    found = {family: [name for name in known[family] if name in names] for family in known}
    return {family: present for family, present in found.items() if present}


def _check_families(report: Report) -> None:
    found = installed_families()
    report.add('family', ' and '.join(found) or 'none')
    if len(found) > 1:
        both = ' beside '.join(', '.join(names) for names in found.values())
        problem = (
            f'{both}: both families have the same import names, and each overwrites files of the '
            'other. Make a new environment with one of them.'
        )
        report.problems[problem] = ['family']


def _version(module: str) -> Callable[[], str]:
    return lambda: importlib.import_module(module).__version__


def _check_mmengine() -> str:
    """Also compare its private parts with those that mmsvit relies on."""
    import mmengine

    from mmsvit.compat.mmengine_private import check_mmengine

    check_mmengine()
    return mmengine.__version__


def _check_torch() -> str:
    import torch

    version = torch.__version__
    release = tuple(map(int, version.split('.')[:2]))
    if release < (2, 6):
        raise RuntimeError(
            f'torch {version} is too old: 2.6 or later is needed, to read checkpoints safely'
        )
    if release < (2, 10):
        return f'{version}: of others, read only .safetensors (CVE-2026-24747, fixed in 2.10)'
    return version


def _check_cuda() -> str:
    import torch

    from .compat.gpu import unseen_gpu

    if unseen := unseen_gpu():
        raise RuntimeError(unseen)
    if not torch.cuda.is_available():
        return f'no GPU (torch built for CUDA {torch.version.cuda})' if torch.version.cuda else 'no'
    names = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
    return f'{torch.version.cuda}: {", ".join(names)}'


def _check_torchvision() -> str:
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    return torchvision.__version__


def _check_ops() -> str:
    """Run the two ops that the detectors need, where they will be needed."""
    import torch
    from mmcv.ops import nms, roi_align

    devices = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
    for device in devices:
        box = torch.tensor([[0.0, 0, 4, 4]], device=device)
        kept, _ = nms(box, torch.ones(1, device=device), 0.5)
        rois = torch.cat([torch.zeros(1, 1, device=device), box], dim=1)
        pooled = roi_align(torch.ones(1, 1, 8, 8, device=device), rois, 2)
        if len(kept) != 1 or not torch.allclose(pooled, torch.ones_like(pooled)):
            raise RuntimeError(f"mmcv's ops give wrong results on {device}")
    from mmsvit.compat.mmcv_ext import is_stand_in

    whose = 'compiled'
    if is_stand_in():
        everywhere = Path(sysconfig.get_paths()['purelib'], 'mmsvit-ops.pth').is_file()
        users = 'every program' if everywhere else 'programs that import mmsvit before mmdet'
        whose = f"torchvision's in place of compiled ones, in {users}"
    return f'{whose}: nms and roi_align work on {" and ".join(devices)}'


def _check_backend() -> str:
    """Run the super token operations where the backbone will."""
    import torch

    from mmsvit.ops import choose_backend, distribute, proofs, sample
    from mmsvit.ops.backend import named_backend

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    backend, reason = choose_backend(device, torch.float32)
    # A single cell of ones: its super token is ones, and the tokens get back their share of it.
    ones = torch.ones(1, 4, 4, 16, device=device)
    super_tokens, association = sample(ones, (4, 4))
    tokens = distribute(association, super_tokens, (4, 4), (4, 4))
    share = association[0, 0, 0, 4].reshape(1, 4, 4, 1)
    expected = (ones[:, :1, :1], share * ones)
    if not all(map(torch.allclose, (super_tokens, tokens), expected)):
        raise RuntimeError(f'the {backend} backend gives wrong results on {device}')
    if device.type == 'cuda' and named_backend() == 'auto':
        taken = sum(entry['proven'] for entry in proofs.records(device).values())
        reason = f'{taken} Triton kernels are proven on this GPU, see python -m mmsvit.prove_gpu'
    return f'{backend} ({reason})'


def check() -> Report:
    """Look at the environment that this Python runs in."""
    report = Report()
    report.add('system', f'{platform.platform()}, Python {platform.python_version()}')
    report.add('python', sys.executable)
    report.run('mmsvit', _version('mmsvit'))
    report.run('torch', _check_torch)
    report.run('CUDA', _check_cuda)
    report.run('triton', _version('triton'), required=False)
    report.run('torchvision', _check_torchvision, required=False)
    report.run('numpy', _version('numpy'))
    report.run('opencv', _version('cv2'))
    _check_families(report)
    report.run('mmengine', _check_mmengine)
    report.run('mmcv', _version('mmcv'))
    report.run('mmcv ops', _check_ops)
    report.run('mmdet', _version('mmdet'))
    report.run('mmseg', _version('mmseg'), required=False)
    report.run('mmpretrain', _version('mmpretrain'), required=False)
    report.run('attention backend', _check_backend)
    return report


def main() -> None:
    """Print the report; exit with 1 if something does not work."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    report = check()
    print(*report.lines, '', sep='\n')
    if report.problems:
        print('NOT READY:')
        for problem, names in report.problems.items():
            print(f'  - {", ".join(names)}: {problem}')
        sys.exit(1)
    print('READY: detectors with SViT train and run here.')


if __name__ == '__main__':
    main()
