"""Set up a Python environment in which mmsvit runs, mmcv's ops included.

    python3 tools/setup_env.py                      # the onedl-* releases, into .venv
    python3 tools/setup_env.py --family openmmlab   # OpenMMLab's own, into .venv-openmmlab
    python3 tools/setup_env.py --ops torchvision    # without a compiler

An environment that is active and works is used as it is. Prints the path of the
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


class SetupError(Exception):
    """Something is missing on this machine; the message says what, and how to get it."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(python: Path, *arguments: str) -> None:
    """Run a Python in the checkout, its output on our standard error."""
    subprocess.run([str(python), *arguments], check=True, stdout=sys.stderr, cwd=ROOT)


def install(python: Path, *arguments: str) -> None:
    """Run pip install; raise SetupError if that fails, after pip has said why."""
    try:
        run(python, '-m', 'pip', 'install', '--disable-pip-version-check', *arguments)
    except subprocess.CalledProcessError as error:
        raise SetupError('pip failed, see above; docs/install.md lists known causes') from error


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


def read_requirements(family: str) -> tuple[list[str], str]:
    """The pins of a family: all but mmcv's, and mmcv's."""
    lines = map(str.strip, (ROOT / REQUIREMENTS[family]).read_text().splitlines())
    pins = [line for line in lines if line and not line.startswith('#')]
    mmcv = next(pin for pin in pins if re.match(r'(onedl-)?mmcv==', pin))
    return [pin for pin in pins if pin != mmcv], mmcv


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


def install_mmcv(python: Path, mmcv: str, ops: str) -> None:
    """Install mmcv, of which ``mmcv`` is the pin; raise SetupError if its ops do not run then.

    As ``ops``, ``'build'`` compiles them or takes a wheel built before; ``'torchvision'`` installs
    mmcv's Python files alone, for mmsvit's stand-in; ``'auto'`` compiles where there is a compiler.
    """
    name, version = mmcv.split('==')
    torch = describe_torch(python)
    check_gpu(python)
    forced = os.environ.get('FORCE_CUDA')
    with_cuda = torch['gpu'] if forced is None else forced == '1'
    device = 'cuda' if with_cuda and torch['gpu'] else 'cpu'
    folder = wheel_folder(mmcv, torch, with_cuda)
    if ops == 'auto':
        built = list(folder.glob('*.whl'))
        obstacle = None if built else obstacle_to_build(torch, with_cuda)
        ops = 'build' if obstacle is None else 'torchvision'
        say(f'mmcv ops: {ops} ({obstacle or ("built before" if built else "there is a compiler")})')
    if ops == 'torchvision':
        pure = 'mmcv-lite' if name == 'mmcv' else name  # OpenMMLab has a release without ops.
        run(python, '-m', 'pip', 'uninstall', '--quiet', '--yes', name, pure)
        # The onedl release always builds its ops if it finds torch: pip's isolation hides it.
        install(python, '--quiet', '--no-deps', '--no-cache-dir', f'{pure}=={version}')
        result = try_nms(python, pure, version, 'cpu', compiled=False)
        if result.returncode != 0:
            raise SetupError(
                f"torchvision's kernels do not run in place of mmcv's:\n{result.stderr}"
            )
        return
    if try_nms(python, name, version, device, compiled=True).returncode == 0:
        return
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
            return
        # Ops that load and then fail, for want of memory on the GPU say, took half an hour to build.
        if run_code(python, 'import torch, mmcv.ops').returncode != 0:
            wheels[0].unlink()
    raise SetupError(f"mmcv's ops do not run although they were built just now:\n{result.stderr}")


def set_up(family: str, venv: Path, dev: bool, ops: str) -> Path:
    """Make the environment ``venv`` or bring it up to date, and return its Python."""
    python = venv / 'bin' / 'python'
    files = [REQUIREMENTS[family], CONSTRAINTS[family], DEV_REQUIREMENTS, 'setup.py']
    contents = [(ROOT / file).read_text() for file in files]
    wanted = dict(family=family, checkout=str(ROOT), dev=dev, ops=ops)
    wanted['digest'] = hashlib.sha256('\0'.join(contents).encode()).hexdigest()
    stamp = venv / 'mmsvit-setup.json'
    if stamp.is_file():
        there = json.loads(stamp.read_text())
        if there['family'] != family:
            raise SetupError(
                f'{venv} holds the {there["family"]} family, and the two cannot share an '
                'environment: remove it, or name another with --venv'
            )
        if ops == 'auto' and there.get('ops'):  # Whoever chose before chose for later, too.
            wanted['ops'] = ops = there['ops']
        # An environment with the test tools also serves those who do not need them.
        if there in (wanted, {**wanted, 'dev': True}) and works(python):
            say(f'{venv} is set up already')
            return python
    if not python.is_file():
        check_python()
        check_disk(venv.parent)
        say(f'making {venv}')
        run(Path(sys.executable), '-m', 'venv', str(venv))
    stamp.write_text(json.dumps(dict(family=family, finished=False)))
    pins, mmcv = read_requirements(family)
    install(python, '-c', CONSTRAINTS[family], *pins)
    install_mmcv(python, mmcv, ops)
    if dev:
        install(python, '-c', CONSTRAINTS[family], '-r', DEV_REQUIREMENTS)
    install(python, '--quiet', '--no-deps', '--no-build-isolation', '-e', '.')
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
        choices=('auto', 'build', 'torchvision'),
        default='auto',
        help="mmcv's ops: compiled, or torchvision's in their place, which needs no compiler",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        anywhere = args.venv is None and args.ops == 'auto'
        there = working_environment(args.family) if anywhere else None
        if there is not None:
            python, family = there
            say(f'using the environment of {python}, which works')
            install(python, '--quiet', '--no-deps', '--no-build-isolation', '-e', '.')
            if args.dev:
                install(python, '-c', CONSTRAINTS[family], '-r', DEV_REQUIREMENTS)
            print(python)
            return
        family = args.family or 'onedl'
        default = '.venv' if family == 'onedl' else f'.venv-{family}'
        print(set_up(family, (args.venv or ROOT / default).absolute(), args.dev, args.ops))
    except SetupError as error:
        sys.exit(f'\ncannot set up the environment: {error}')
    except subprocess.CalledProcessError as error:
        sys.exit(f'\ncannot set up the environment: {" ".join(error.cmd)} failed, see above')


if __name__ == '__main__':
    main()
