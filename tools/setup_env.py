"""Set up a Python environment in which mmsvit runs, mmcv's ops included.

    python3 tools/setup_env.py                      # the onedl-* releases, into .venv
    python3 tools/setup_env.py --family openmmlab   # OpenMMLab's own, into .venv-openmmlab
    python3 tools/setup_env.py --ops build          # compile mmcv's ops
    python3 tools/setup_env.py --download wheels    # fill a folder for a machine without network
    python3 tools/setup_env.py --wheels wheels      # install from it alone
    python tools/setup_env.py --use-torch           # with the torch of this Python, downloading none

Without --ops, torchvision's kernels stand in for mmcv's, unless compiled ones work already. An
environment that is active and works is used as it is. Prints the path of the
Python to use on the standard output, everything else on the standard error. Needs Python's
standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = {'onedl': 'requirements.txt', 'openmmlab': 'requirements-openmmlab.txt'}
# Every package that the requirements bring along, in one version; see CONTRIBUTING.md.
CONSTRAINTS = {family: f'constraints-{family}.txt' for family in REQUIREMENTS}
DEV_REQUIREMENTS = 'requirements-dev.txt'
MIN_PYTHON, MAX_PYTHON = (3, 10), (3, 12)
# An environment with torch's CUDA libraries takes 5.6 GB; pip unpacks beside it.
NEEDED_GB = 9
# In the environment's site-packages, where Python reads them at its start: the stand-in for mmcv's
# ops in every program, and a path to the torch of another Python.
STAND_IN_FILE, TORCH_FILE = 'mmsvit-ops.pth', 'mmsvit-torch.pth'
IMPORT_STAND_IN = 'import sys; exec("try:\\n    import mmsvit\\nexcept ImportError:\\n    pass")\n'
TORCH = ('torch', 'torchvision')


class SetupError(Exception):
    """Something is missing on this machine; the message says what, and how to get it."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(python: Path, *arguments: str) -> None:
    """Run a Python in the checkout, its output on our standard error."""
    subprocess.run([str(python), *arguments], check=True, stdout=sys.stderr, cwd=ROOT)


def pip(python: Path, *arguments: str) -> None:
    """Run pip; raise SetupError if that fails, after pip has said why."""
    try:
        run(python, '-m', 'pip', '--disable-pip-version-check', *arguments)
    except subprocess.CalledProcessError as error:
        raise SetupError('pip failed, see above; docs/install.md lists known causes') from error


def install(python: Path, *arguments: str) -> None:
    """Run pip install, see :func:`pip`."""
    pip(python, 'install', *arguments)


def check_python() -> None:
    """Raise SetupError for a Python that is too old, too new, or cannot make environments."""
    version = sys.version_info[:2]
    if not MIN_PYTHON <= version <= MAX_PYTHON:
        raise SetupError(
            f'Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} to {MAX_PYTHON[0]}.{MAX_PYTHON[1]} is needed, '
            f'this is {version[0]}.{version[1]} ({sys.executable})'
        )
    for module in ('venv', 'ensurepip'):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python has no '{module}' module: apt-get install python3-venv (Debian, Ubuntu)"
            )


def check_disk(folder: Path) -> None:
    """Raise SetupError if less than :data:`NEEDED_GB` are free."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDED_GB:
        raise SetupError(f'{free:.1f} GB are free in {folder}, about {NEEDED_GB} GB are needed')


def run_code(python: Path, code: str) -> subprocess.CompletedProcess:
    """Run Python code with this checkout's mmsvit."""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run([str(python), '-c', code], env=env, capture_output=True, text=True)


def works(python: Path) -> bool:
    """Whether mmsvit's own check passes in an environment."""
    return run_code(python, 'from mmsvit import check_env; check_env.main()').returncode == 0


def working_environment(family: str | None) -> tuple[Path, str] | None:
    """The Python of an active environment, or this one, and its family, if mmsvit works in it.

    If ``family`` is not None, it must have these releases.
    """
    folder = os.environ.get('VIRTUAL_ENV') or os.environ.get('CONDA_PREFIX')
    python = Path(folder, 'bin', 'python') if folder else Path(sys.executable)
    if not python.is_file():
        return None
    code = 'from mmsvit.check_env import installed_families as f; print(*f())'
    installed = run_code(python, code).stdout.split()
    if len(installed) != 1 or family not in (None, *installed) or not works(python):
        return None
    return python, installed[0]


def read_requirements(family: str, with_torch: bool = True) -> tuple[list[str], str]:
    """The pins of a family: all but mmcv's, and mmcv's."""
    lines = map(str.strip, (ROOT / REQUIREMENTS[family]).read_text().splitlines())
    pins = [line for line in lines if line and not line.startswith('#')]
    mmcv = next(pin for pin in pins if re.match(r'(onedl-)?mmcv==', pin))
    others = [
        pin for pin in pins if pin != mmcv and (with_torch or pin.split('==')[0] not in TORCH)
    ]
    return others, mmcv


def without_ops(mmcv: str) -> str:
    """The pin of mmcv's Python files alone: OpenMMLab has a release of them."""
    return mmcv.replace('mmcv==', 'mmcv-lite==') if mmcv.startswith('mmcv==') else mmcv


def download(family: str, folder: Path, dev: bool, ops: str | None, with_torch: bool) -> None:
    """Fill a folder with all that ``--wheels`` installs, for this Python and kind of machine."""
    check_python()
    pins, mmcv = read_requirements(family, with_torch)
    wanted = [*pins, without_ops(mmcv), *(['-r', DEV_REQUIREMENTS] if dev else [])]
    python = Path(sys.executable)
    pip(python, 'wheel', '-w', str(folder), '-c', CONSTRAINTS[family], *wanted)
    if ops == 'build':  # Its source: compiled ops belong to the machine that they run on.
        pip(python, 'download', '--no-deps', '--no-binary', ':all:', '-d', str(folder), mmcv)
    say(
        f'copy {folder} and this checkout to the other machine, and run there: '
        f'python3 tools/setup_env.py --wheels {folder}{"" if with_torch else " --use-torch"}'
    )


def install_from(folder: Path) -> None:
    """Let every pip of this process and its children take what it installs from a folder alone."""
    if not any(folder.glob('*.whl')):
        raise SetupError(
            f'{folder} has no wheels: fill it with --download on a machine with network'
        )
    os.environ.update(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(folder.absolute()))


def site_packages(python: Path) -> Path:
    """Where an environment keeps its packages."""
    code = 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    return Path(run_code(python, code).stdout.strip())


def folder_of_torch() -> Path:
    """Where the torch of the Python that runs this is; raise SetupError if there is none to use."""
    code = 'import torch, torchvision; print(torch.__version__.split("+")[0], torch.__path__[0])'
    result = run_code(Path(sys.executable), code)
    if result.returncode != 0:
        raise SetupError(
            f'--use-torch: {sys.executable} has no torch with torchvision:\n{result.stderr}'
        )
    version, path = result.stdout.strip().split(' ', 1)
    if tuple(map(int, version.split('.')[:2])) < (2, 6):
        raise SetupError(f'--use-torch: torch {version} is too old, 2.6 or later is needed')
    return Path(path).parent


def reuse_torch(python: Path, constraints: str) -> Path:
    """Let an environment see the packages beside this Python's torch, after its own.

    Returns:
        Constraints for pip, without those on torch.
    """
    (site_packages(python) / TORCH_FILE).write_text(f'{folder_of_torch()}\n')
    file = python.parent.parent / 'constraints.txt'
    lines = (ROOT / constraints).read_text().splitlines()
    file.write_text('\n'.join(line for line in lines if line.split('==')[0] not in TORCH))
    return file


def keep_stand_in(python: Path, ops: str) -> None:
    """Have every Python of an environment start with the stand-in for mmcv's ops, or none."""
    file = site_packages(python) / STAND_IN_FILE
    if ops == 'torchvision':
        file.write_text(IMPORT_STAND_IN)
    else:
        file.unlink(missing_ok=True)


def describe_torch(python: Path) -> dict:
    """Ask an environment's torch what decides how mmcv is built; raise SetupError without torch."""
    code = (
        'import json, os, platform, re, subprocess, sys, torch; from torch.utils import cpp_extension; '
        'print(json.dumps(dict(torch=torch.__version__, cuda=torch.version.cuda, '
        'gpu=torch.cuda.is_available(), cuda_home=cpp_extension.CUDA_HOME, '
        'nvcc=os.path.isfile(nvcc := f"{cpp_extension.CUDA_HOME}/bin/nvcc") and "".join('
        're.findall(r"release ([0-9.]+)", subprocess.run([nvcc, "--version"], text=True, '
        'capture_output=True).stdout)), '
        'arch=sorted({"sm%d%d" % torch.cuda.get_device_capability(i) '
        'for i in range(torch.cuda.device_count())}), '
        'python="cp%d%d" % sys.version_info[:2], machine=platform.machine())))'
    )
    result = run_code(python, code)
    if result.returncode != 0:
        raise SetupError(f'torch does not import:\n{result.stderr}')
    return json.loads(result.stdout)


def check_gpu(python: Path) -> None:
    """Raise SetupError if there is a GPU that the environment's torch does not see."""
    code = (ROOT / 'mmsvit' / 'compat' / 'gpu.py').read_text()
    result = run_code(python, f'{code}\nprint(unseen_gpu() or "")')
    if unseen := result.stdout.strip():
        raise SetupError(f'{unseen} in front of this command')


def wheel_folder(mmcv: str, torch: dict, with_cuda: bool) -> Path:
    """Where a built mmcv is kept: one folder for each combination that its binary depends on."""
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    compute = '-'.join([f'cuda{torch["cuda"]}', *torch['arch']]) if with_cuda else 'cpu'
    key = f'{mmcv.replace("==", "-")}-torch{torch["torch"]}-{compute}-{torch["python"]}-{torch["machine"]}'
    return Path(cache) / 'mmsvit' / 'wheels' / key


def obstacle_to_build(torch: dict, with_cuda: bool) -> str | None:
    """What is missing to build mmcv's ops, and how to get it; None if nothing is."""
    compiler = os.environ.get('CXX', 'c++')
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) to build mmcv's ops: apt-get install g++ (Debian, Ubuntu)"
    if with_cuda and torch['cuda_home'] is None:
        return (
            f"there is a GPU, but no CUDA toolkit (nvcc) to build mmcv's ops for it: install CUDA "
            f'{torch["cuda"]}, set CUDA_HOME, or set FORCE_CUDA=0 to continue without the GPU'
        )
    if (
        with_cuda
        and torch.get('nvcc')
        and torch['nvcc'].split('.')[0] != torch['cuda'].split('.')[0]
    ):
        return (
            f'nvcc in {torch["cuda_home"]} is of CUDA {torch["nvcc"]}, and torch is built for CUDA '
            f'{torch["cuda"]}: install that toolkit and set CUDA_HOME to it, or use --ops torchvision'
        )
    return None


def build_mmcv(python: Path, mmcv: str, folder: Path, torch: dict, with_cuda: bool) -> None:
    """Build a wheel of mmcv into ``folder``, showing progress; raise SetupError if that fails."""
    if obstacle := obstacle_to_build(torch, with_cuda):
        raise SetupError(obstacle)
    jobs = os.environ.get('MAX_JOBS', str(os.cpu_count() or 1))
    env = dict(
        os.environ,
        MMCV_WITH_OPS='1',
        FORCE_CUDA='1' if with_cuda else '0',
        MAX_JOBS=jobs,
        # Without debug information: a third of the time, a twentieth of the space.
        CFLAGS=os.environ.get('CFLAGS', '-g0 -O2'),
        PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}',  # where ninja is
    )
    kind = 'CUDA' if with_cuda else 'CPU'
    say(f'building {mmcv} with {kind} ops, {jobs} jobs; 5 to 30 minutes, once')
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / 'build.log'
    # Unlike pip's cache, the folder tells builds for different versions of torch apart.
    command = [str(python), '-m', 'pip', 'wheel', '-v', '--no-build-isolation', '--no-deps']
    command += ['--no-cache-dir', '--no-binary', ':all:', '-w', str(folder), mmcv]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log_file.open('w') as log, subprocess.Popen(command, **pipe, env=env) as process:
        shown = ''
        for line in process.stdout:
            log.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step:
                shown = f'  mmcv: {step[1]} of {step[2]} files compiled'
                # A terminal gets one line that counts, a log file a line now and then.
                if sys.stderr.isatty():
                    print(f'\r{shown}', end='', file=sys.stderr, flush=True)
                elif int(step[1]) % 10 == 0:
                    say(shown)
        if shown and sys.stderr.isatty():
            say('')
    if process.returncode != 0:
        tail = ''.join(log_file.read_text().splitlines(keepends=True)[-15:])
        raise SetupError(f'building {mmcv} failed:\n{tail}\nThe whole log: {log_file}')


def try_nms(
    python: Path, distribution: str, version: str, device: str, compiled: bool
) -> subprocess.CompletedProcess:
    """Call mmcv's nms in an environment that must have this release.

    Fails where mmcv has no ops of its own and ``compiled`` ones are wanted, or the other way. The
    compiled ones are tried without mmsvit.
    """
    code = (
        f'import {"" if compiled else "mmsvit, "}torch, mmcv.ops; '
        'from importlib.metadata import version; '
        f'boxes = torch.tensor([[0.0, 0, 1, 1]], device={device!r}); '
        'mmcv.ops.nms(boxes, boxes[:, 2], 0.5); '
        f'assert version({distribution!r}) == {version!r}; '
        f'assert mmcv._ext.__file__.endswith("torchvision_ops.py") is {not compiled}'
    )
    return run_code(python, code)


def install_mmcv(python: Path, mmcv: str, ops: str | None) -> str:
    """Install mmcv, of which ``mmcv`` is the pin; raise SetupError if its ops do not run then.

    As ``ops``, ``'build'`` compiles them or takes a wheel built before; ``'torchvision'`` installs
    mmcv's Python files alone, for mmsvit's stand-in; None does so unless compiled ones work. Returns which.
    """
    name, version = mmcv.split('==')
    torch = describe_torch(python)
    check_gpu(python)
    forced = os.environ.get('FORCE_CUDA')
    with_cuda = torch['gpu'] if forced is None else forced == '1'
    device = 'cuda' if with_cuda and torch['gpu'] else 'cpu'
    folder = wheel_folder(mmcv, torch, with_cuda)
    if (
        ops != 'torchvision'
        and try_nms(python, name, version, device, compiled=True).returncode == 0
    ):
        return 'build'
    if ops != 'build':
        pure = without_ops(mmcv)
        run(python, '-m', 'pip', 'uninstall', '--quiet', '--yes', name, pure.split('==')[0])
        # The onedl release always builds its ops if it finds torch: pip's isolation hides it.
        install(python, '--quiet', '--no-deps', '--no-cache-dir', pure)
        result = try_nms(python, pure.split('==')[0], version, 'cpu', compiled=False)
        if result.returncode != 0:
            raise SetupError(
                f"torchvision's kernels do not run in place of mmcv's:\n{result.stderr}"
            )
        return 'torchvision'
    for attempt in ('cached', 'built'):
        if attempt == 'built':
            build_mmcv(python, mmcv, folder, torch, with_cuda)
        wheels = sorted(folder.glob('*.whl'))
        if not wheels:
            continue
        say(f'installing {attempt} {wheels[0]}')
        install(python, '--quiet', '--no-deps', '--no-index', '--force-reinstall', str(wheels[0]))
        result = try_nms(python, name, version, device, compiled=True)
        if result.returncode == 0:
            return 'build'
        # Ops that load and then fail, for want of memory on the GPU say, took half an hour to build.
        if run_code(python, 'import torch, mmcv.ops').returncode != 0:
            wheels[0].unlink()
    raise SetupError(f"mmcv's ops do not run although they were built just now:\n{result.stderr}")


def set_up(
    family: str, venv: Path, dev: bool, ops: str | None = None, use_torch: bool = False
) -> Path:
    """Make the environment ``venv`` or bring it up to date, and return its Python."""
    python = venv / 'bin' / 'python'
    files = [REQUIREMENTS[family], CONSTRAINTS[family], DEV_REQUIREMENTS, 'setup.py']
    contents = [(ROOT / file).read_text() for file in files]
    wanted = dict(family=family, checkout=str(ROOT), dev=dev, ops=ops, use_torch=use_torch)
    wanted['digest'] = hashlib.sha256('\0'.join(contents).encode()).hexdigest()
    stamp = venv / 'mmsvit-setup.json'
    if stamp.is_file():
        there = json.loads(stamp.read_text())
        if there['family'] != family:
            raise SetupError(
                f'{venv} holds the {there["family"]} family, and the two cannot share an '
                'environment: remove it, or name another with --venv'
            )
        if ops is None and there.get('ops'):  # Whoever chose before chose for later, too.
            wanted['ops'] = ops = there['ops']
        # An environment with the test tools also serves those who do not need them.
        if there in (wanted, {**wanted, 'dev': True}) and works(python):
            say(f'{venv} is set up already')
            return python
    if not python.is_file():
        check_python()
        if not use_torch:
            check_disk(venv.parent)
        say(f'making {venv}')
        run(Path(sys.executable), '-m', 'venv', str(venv))
    stamp.write_text(json.dumps(dict(family=family, finished=False)))
    pins, mmcv = read_requirements(family, with_torch=not use_torch)
    constraints = CONSTRAINTS[family]
    if use_torch:
        constraints = str(reuse_torch(python, constraints))
    install(python, '-c', constraints, *pins)
    wanted['ops'] = install_mmcv(python, mmcv, ops)
    if dev:
        install(python, '-c', constraints, '-r', DEV_REQUIREMENTS)
    install(python, '--quiet', '--no-deps', '--no-build-isolation', '-e', '.')
    keep_stand_in(python, wanted['ops'])
    run(python, '-m', 'mmsvit.check_env')
    stamp.write_text(json.dumps(wanted))
    return python


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--family', choices=[*REQUIREMENTS], help='releases to install (onedl)')
    parser.add_argument('--venv', type=Path, help='folder of the environment')
    parser.add_argument('--dev', action='store_true', help=f'also install {DEV_REQUIREMENTS}')
    parser.add_argument(
        '--ops',
        choices=('torchvision', 'build'),
        help="mmcv's ops: torchvision's in their place, which needs no compiler, or compiled ones",
    )
    parser.add_argument(
        '--use-torch',
        action='store_true',
        help='install no torch: use the one of the Python that runs this',
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument('--download', type=Path, metavar='DIR', help='fill a folder with wheels')
    place.add_argument(
        '--wheels', type=Path, metavar='DIR', help='install from such a folder alone'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        family = args.family or 'onedl'
        if args.download is not None:
            download(family, args.download.absolute(), args.dev, args.ops, not args.use_torch)
            return
        if args.wheels is not None:
            install_from(args.wheels)
        anywhere = args.venv is None and args.ops is None and not args.use_torch
        there = working_environment(args.family) if anywhere else None
        if there is not None:
            python, family = there
            say(f'using the environment of {python}, which works')
            install(python, '--quiet', '--no-deps', '--no-build-isolation', '-e', '.')
            if args.dev:
                install(python, '-c', CONSTRAINTS[family], '-r', DEV_REQUIREMENTS)
            print(python)
            return
        default = '.venv' if family == 'onedl' else f'.venv-{family}'
        venv = (args.venv or ROOT / default).absolute()
        print(set_up(family, venv, args.dev, args.ops, args.use_torch))
    except SetupError as error:
        sys.exit(f'\ncannot set up the environment: {error}')
    except subprocess.CalledProcessError as error:
        sys.exit(f'\ncannot set up the environment: {" ".join(error.cmd)} failed, see above')


if __name__ == '__main__':
    main()
