"""Setting up an environment, and saying what is wrong with one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, fail_if_required, import_tool, run_python
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmsvit import check_env
from mmsvit.compat.mmcv_ext import is_stand_in


@pytest.fixture(scope='module')
def setup_env() -> ModuleType:
    return import_tool('setup_env')


def read_constraints(family: str, python: str) -> dict[str, str]:
    """The pins for a version of Python, by canonical name."""
    pins: dict[str, str] = {}
    for line in (ROOT / f'constraints-{family}.txt').read_text().splitlines():
        if not line.startswith('#'):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(
                {'python_version': python, 'python_full_version': f'{python}.0'}
            ):
                name = canonicalize_name(pin.name)
                assert name not in pins, f'two pins of {name} for Python {python}'
                pins[name] = str(pin.specifier)
    return pins


def test_this_environment_is_ready(tmp_path):
    output = run_python('-m', 'mmsvit.check_env', cwd=tmp_path).stdout
    for part in ('torch', 'mmcv ops', 'family', 'triton', 'attention backend', 'READY'):
        assert part in output


def test_report_without_torch_names_the_fix(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ModuleNotFoundError("No module named \'torch\'")')
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); '
    code += 'from mmsvit import check_env; check_env.main()'
    result = run_python('-c', code, check=False)
    assert result.returncode == 1 and 'NOT READY' in result.stdout
    assert 'requirements.txt' in result.stdout


@pytest.mark.parametrize(
    ('error', 'fix'),
    [
        ('operator torchvision::nms does not exist', 'torchvision==0.26.0'),
        (
            '/x/mmcv/_ext.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c10',
            'another torch',
        ),
        ("No module named 'mmcv._ext'", 'the last lines of requirements.txt'),
        ("No module named 'pkg_resources'", 'setuptools<81'),
        ('libGL.so.1: cannot open shared object file', 'libgl1'),
        ('A module that was compiled using NumPy 1.x cannot be run', 'numpy==2.2.6'),
        ('MMCV==2.3.6 is used but incompatible. Please install mmcv', 'requirements-openmmlab'),
        ("No module named 'mmdet'", 'requirements.txt'),
    ],
)
def test_known_errors_have_a_fix(error, fix):
    assert fix in check_env.fix_for(error)


def test_mixed_families_are_found(monkeypatch):
    names = ['onedl-mmengine', 'mmcv-lite', 'torch']
    found = [SimpleNamespace(metadata={'Name': name}) for name in names]
    monkeypatch.setattr(metadata, 'distributions', lambda: found)
    # Not the whole check: what is imported while the metadata are faked stays broken.
    report = check_env.Report()
    check_env._check_families(report)
    (problem,) = (text for text, who in report.problems.items() if who == ['family'])
    assert 'onedl-mmengine beside mmcv-lite' in problem


@pytest.mark.parametrize('family', ['onedl', 'openmmlab'])
def test_everything_is_pinned(setup_env, family):
    pins, mmcv = setup_env.read_requirements(family)
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+', pin) for pin in [*pins, mmcv])
    names = {pin.split('==')[0] for pin in [*pins, mmcv]}
    assert set(check_env.FAMILIES[family].values()) <= names


@pytest.mark.promise(
    'Safety',
    'Every package is pinned to one version',
    '188 packages (onedl) and 179 (openmmlab), with the tools of developers',
)
@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12'])
@pytest.mark.parametrize('family', ['onedl', 'openmmlab'])
def test_constraints_hold_the_pins_of_the_requirements(setup_env, family, python):
    constraints = read_constraints(family, python)
    assert all(re.fullmatch(r'==[\w.]+', version) for version in constraints.values())
    for file in (setup_env.REQUIREMENTS[family], setup_env.DEV_REQUIREMENTS):
        for line in (ROOT / file).read_text().splitlines():
            if not line or line.startswith('#'):
                continue
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({'python_version': python}):
                assert constraints[canonicalize_name(pin.name)] == str(pin.specifier)


def test_everything_that_is_brought_along_is_in_the_constraints():
    (family,) = check_env.installed_families()
    constraints = read_constraints(family, '.'.join(map(str, sys.version_info[:2])))
    missing = {
        f'{one.name} needs {needed.name}'
        for one in metadata.distributions()
        if canonicalize_name(one.name) in constraints
        for needed in map(Requirement, one.requires or ())
        if needed.marker is None or needed.marker.evaluate({'extra': ''})
        if canonicalize_name(needed.name) not in constraints
    }
    assert not missing


def test_the_environment_is_made_with_the_constraints(setup_env, tmp_path, monkeypatch):
    commands = []
    for name in ('run', 'check_python', 'check_disk', 'install_mmcv', 'keep_stand_in'):
        monkeypatch.setattr(setup_env, name, lambda *args: None)
    monkeypatch.setattr(setup_env, 'install', lambda python, *args: commands.append(args))
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').touch()
    setup_env.set_up('onedl', tmp_path, dev=True, ops='torchvision')
    resolving = [command for command in commands if '--no-deps' not in command]
    assert len(resolving) == 2
    assert all(command[:2] == ('-c', 'constraints-onedl.txt') for command in resolving)


def test_an_active_environment_gets_the_test_tools_with_its_constraints(
    setup_env, monkeypatch, capsys
):
    commands = []
    there = Path('bin', 'python'), 'openmmlab'
    monkeypatch.setattr(setup_env, 'working_environment', lambda family: there)
    monkeypatch.setattr(setup_env, 'install', lambda python, *args: commands.append(args))
    monkeypatch.setattr(sys, 'argv', ['setup_env.py', '--dev'])
    setup_env.main()
    assert commands[-1] == ('-c', 'constraints-openmmlab.txt', '-r', 'requirements-dev.txt')
    assert capsys.readouterr().out == 'bin/python\n'


def test_source_distribution_has_what_sets_it_up(tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    (source / 'mmsvit').mkdir()
    shutil.copy(ROOT / 'mmsvit' / '__init__.py', source / 'mmsvit')
    shutil.copytree(ROOT / 'tools', source / 'tools')
    wanted = {f'tools/{path.name}' for path in (ROOT / 'tools').glob('*.*')}
    for kind in ('txt', 'md', 'yml', 'py', 'toml'):
        for path in ROOT.glob(f'[!.]*.{kind}'):
            shutil.copy(path, source)
            wanted.add(path.name)
    shutil.copy(ROOT / 'MANIFEST.in', source)
    run_python('-c', 'from setuptools.build_meta import build_sdist as f; f(".")', cwd=source)
    (packed,) = source.glob('*.tar.gz')
    with tarfile.open(packed) as archive:
        found = {name.partition('/')[2] for name in archive.getnames()}
    assert not wanted - found


def test_wheels_are_told_apart_by_all_that_matters(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    torch = dict(torch='2.11.0+cu130', cuda='13.0', python='cp311', machine='x86_64')
    torch['arch'] = ['sm90']
    folders = {setup_env.wheel_folder('mmcv==2.1.0', torch, False)}
    folders.add(setup_env.wheel_folder('onedl-mmcv==2.3.6', torch, False))
    folders.add(setup_env.wheel_folder('mmcv==2.1.0', torch, True))
    for key, value in (('torch', '2.12.0'), ('python', 'cp312'), ('machine', 'aarch64')):
        folders.add(setup_env.wheel_folder('mmcv==2.1.0', {**torch, key: value}, False))
    for key, value in (('cuda', '12.8'), ('arch', ['sm80'])):
        folders.add(setup_env.wheel_folder('mmcv==2.1.0', {**torch, key: value}, True))
    assert len(folders) == 8 and all(tmp_path in folder.parents for folder in folders)


@pytest.mark.parametrize('loads', [True, False])
def test_only_a_wheel_that_does_not_load_is_removed(setup_env, monkeypatch, tmp_path, loads):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    torch = dict(torch='2.11.0', cuda=None, gpu=False, arch=[], python='cp311', machine='x86_64')
    built = []

    def build(python, mmcv, folder, torch, with_cuda):
        folder.mkdir(parents=True, exist_ok=True)
        built.append(folder / 'mmcv-2.1.0.whl')
        built[-1].touch()

    tried = SimpleNamespace(returncode=1, stderr='out of memory', stdout='')
    loaded = SimpleNamespace(returncode=0 if loads else 1, stdout='')
    monkeypatch.setattr(setup_env, 'describe_torch', lambda python: torch)
    monkeypatch.setattr(setup_env, 'build_mmcv', build)
    monkeypatch.setattr(setup_env, 'install', lambda *args: None)
    monkeypatch.setattr(setup_env, 'try_nms', lambda *args, **kwargs: tried)
    monkeypatch.setattr(setup_env, 'run_code', lambda python, code: loaded)
    with pytest.raises(setup_env.SetupError, match='out of memory'):
        setup_env.install_mmcv(Path('python'), 'mmcv==2.1.0', 'build')
    assert len(built) == 1 and built[0].is_file() is loads


def test_missing_pieces_have_messages(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env, 'NEEDED_GB', 1e9)
    with pytest.raises(setup_env.SetupError, match='GB are free'):
        setup_env.check_disk(tmp_path)
    monkeypatch.setattr(setup_env.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(setup_env.SetupError, match='python3-venv'):
        setup_env.check_python()
    monkeypatch.setattr(setup_env, 'MIN_PYTHON', (4, 0))
    with pytest.raises(setup_env.SetupError, match=r'Python 4\.0 to'):
        setup_env.check_python()
    monkeypatch.setenv('CXX', 'no-such-compiler')
    torch = dict(torch='2.11.0', cuda=None, cuda_home=None, python='cp311', machine='x86_64')
    with pytest.raises(setup_env.SetupError, match='g\\+\\+'):
        setup_env.build_mmcv(tmp_path / 'python', 'mmcv==2.1.0', tmp_path, torch, False)
    monkeypatch.setenv('CXX', sys.executable)
    with pytest.raises(setup_env.SetupError, match='nvcc'):
        setup_env.build_mmcv(tmp_path / 'python', 'mmcv==2.1.0', tmp_path, torch, True)
    torch.update(cuda='13.0', cuda_home='/opt/cuda', nvcc='12.4')
    with pytest.raises(setup_env.SetupError, match=r'of CUDA 12\.4, .* built for CUDA 13\.0'):
        setup_env.build_mmcv(tmp_path / 'python', 'mmcv==2.1.0', tmp_path, torch, True)


def test_a_failed_build_shows_the_end_of_its_log(setup_env, monkeypatch, tmp_path):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "[10/20] c++"\necho no such header\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setenv('CXX', sys.executable)
    with pytest.raises(setup_env.SetupError, match=r'failed:\n\[10/20\] c\+\+\nno such header\n'):
        setup_env.build_mmcv(python, 'mmcv==2.1.0', tmp_path / 'wheels', {}, False)


def test_a_failed_pip_ends_in_one_sentence(setup_env):
    with pytest.raises(setup_env.SetupError, match=r'pip failed, see above; docs/install\.md'):
        setup_env.install(Path(sys.executable), '--no-index', 'no-such-package-of-mmsvit')


def test_an_environment_of_the_other_family_is_not_touched(setup_env, tmp_path):
    (tmp_path / 'mmsvit-setup.json').write_text('{"family": "openmmlab", "finished": false}')
    with pytest.raises(setup_env.SetupError, match='openmmlab'):
        setup_env.set_up('onedl', tmp_path, dev=False)


def test_ops_chosen_before_are_kept(setup_env, tmp_path, monkeypatch):
    stamp = tmp_path / 'mmsvit-setup.json'
    made = []

    def install_mmcv(python, mmcv, ops):
        made.append(ops)
        return ops or 'torchvision'

    for name in ('run', 'install', 'check_python', 'check_disk', 'keep_stand_in'):
        monkeypatch.setattr(setup_env, name, lambda *args: None)
    monkeypatch.setattr(setup_env, 'install_mmcv', install_mmcv)
    monkeypatch.setattr(setup_env, 'works', lambda python: True)
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').touch()
    for dev in (False, False, True, False):
        setup_env.set_up('onedl', tmp_path, dev=dev)
    assert made == [None, 'torchvision']  # again for the test tools, and with the same
    setup_env.set_up('onedl', tmp_path, dev=False, ops='build')
    assert made[-1] == 'build' and '"ops": "build"' in stamp.read_text()
    setup_env.set_up('onedl', tmp_path, dev=True)
    assert made[-1] == 'build'


@pytest.mark.parametrize('ops', [None, 'torchvision', 'build'])
def test_compiled_ops_that_work_are_kept(setup_env, monkeypatch, ops):
    torch = dict(torch='2.11.0', cuda=None, gpu=False, arch=[], python='cp311', machine='x86_64')
    done = []
    monkeypatch.setattr(setup_env, 'describe_torch', lambda python: torch)
    monkeypatch.setattr(setup_env, 'check_gpu', lambda python: None)
    monkeypatch.setattr(setup_env, 'try_nms', lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(setup_env, 'install', lambda python, *args: done.append(args))
    monkeypatch.setattr(setup_env, 'run', lambda *args: done.append(args))
    found = setup_env.install_mmcv(Path('python'), 'onedl-mmcv==2.3.6', ops)
    assert found == ('torchvision' if ops == 'torchvision' else 'build')
    assert bool(done) == (ops == 'torchvision')


def test_every_program_of_the_environment_has_the_stand_in(setup_env, tmp_path, monkeypatch):
    """MMDetection imported first, and nothing of mmsvit named, in a Python that set-up prepared."""
    monkeypatch.setattr(setup_env, 'site_packages', lambda python: tmp_path)
    setup_env.keep_stand_in(Path('python'), 'torchvision')
    (file,) = tmp_path.iterdir()
    code = (
        f'import site, sys; site.addsitedir({str(tmp_path)!r}); '
        'print(any("mmsvit" in type(finder).__module__ for finder in sys.meta_path))'
    )
    assert run_python('-c', code).stdout == 'True\n'
    # Where mmsvit is gone, Python starts without a word.
    alone = run_python('-I', '-S', '-c', f'import site; site.addsitedir({str(tmp_path)!r})')
    assert not alone.stdout + alone.stderr
    setup_env.keep_stand_in(Path('python'), 'build')
    assert not file.exists()


def test_wheels_for_a_machine_without_network(setup_env, tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(
        setup_env, 'subprocess', SimpleNamespace(run=lambda command, **_: commands.append(command))
    )
    folder = tmp_path / 'wheels'
    setup_env.download('onedl', folder, dev=True, ops='build', with_torch=False)
    (wheels, source) = (' '.join(map(str, command)) for command in commands)
    assert '-c constraints-onedl.txt' in wheels and '-r requirements-dev.txt' in wheels
    assert 'onedl-mmcv==2.3.6' in wheels and 'torch==' not in wheels
    assert '--no-binary :all:' in source and source.endswith('onedl-mmcv==2.3.6')
    assert f'--wheels {folder} --use-torch' in capsys.readouterr().err
    setup_env.download('openmmlab', folder, dev=False, ops=None, with_torch=True)
    assert 'mmcv-lite==' in commands[-1][-1] and len(commands) == 3
    assert any(part.startswith('torch==') for part in commands[-1])


def test_wheels_are_the_only_source(setup_env, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    with pytest.raises(setup_env.SetupError, match='has no wheels: fill it with --download'):
        setup_env.install_from(tmp_path)
    (tmp_path / 'a-1-py3-none-any.whl').touch()
    setup_env.install_from(tmp_path)
    # As pip, started by any of our functions, says itself.
    with pytest.raises(subprocess.CalledProcessError) as error:
        command = [sys.executable, '-m', 'pip', 'download', 'no-such-package', '-d', tmp_path]
        subprocess.run(command, check=True, capture_output=True, text=True)
    assert f'Looking in links: {tmp_path}' in error.value.stdout
    assert 'index' not in error.value.stdout


def test_torch_of_another_python_is_used(setup_env, tmp_path, monkeypatch):
    """A bare environment sees the torch of this one, and pip's constraints say nothing of it."""
    run_python('-m', 'venv', '--without-pip', tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    constraints = setup_env.reuse_torch(python, 'constraints-onedl.txt').read_text()
    assert 'numpy==' in constraints and '\ntorch==' not in constraints
    assert 'torchvision==' not in constraints
    code = 'import sys, torch, torchvision; print(torch.__file__, sys.prefix)'
    found = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout
    assert found.split() == [torch.__file__, str(tmp_path / 'venv')]
    (tmp_path / 'bare').mkdir()
    run_python('-m', 'venv', '--without-pip', tmp_path / 'bare')
    monkeypatch.setattr(setup_env.sys, 'executable', str(tmp_path / 'bare' / 'bin' / 'python'))
    with pytest.raises(setup_env.SetupError, match='has no torch with torchvision'):
        setup_env.folder_of_torch()


def test_an_active_environment_must_have_the_family_that_is_asked_for(setup_env, monkeypatch):
    (family,) = check_env.installed_families()
    other = {'onedl': 'openmmlab', 'openmmlab': 'onedl'}[family]
    monkeypatch.setenv('VIRTUAL_ENV', sys.prefix)
    assert setup_env.working_environment(other) is None
    python, found = setup_env.working_environment(family)
    assert Path(sys.prefix) in python.parents and found == family
    assert setup_env.working_environment(None) == (python, family)
    monkeypatch.setattr(setup_env, 'works', lambda python: False)
    assert setup_env.working_environment(family) is None


@pytest.mark.parametrize('script', ['quickstart.sh', 'run_tests.sh'])
def test_scripts_have_help(script):
    command = ['bash', str(ROOT / 'tools' / script), '--help']
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f'bash tools/{script}' in result.stdout and not result.stderr


@pytest.mark.parametrize('compiled', [True, False])
def test_a_build_without_ops_does_not_pass_for_one_with_them(setup_env, compiled):
    (names,) = check_env.installed_families().values()
    name = next(name for name in names if name in ('onedl-mmcv', 'mmcv', 'mmcv-lite'))
    result = setup_env.try_nms(
        Path(sys.executable), name, metadata.version(name), 'cpu', compiled=compiled
    )
    assert (result.returncode == 0) is (is_stand_in() is not compiled), result.stderr


@pytest.mark.parametrize(
    ('reason', 'outcome'),
    [
        ("could not import 'onnx': No module named 'onnx'", 'failed'),
        ('gradio is not installed: pip install "gradio==6.31.0"', 'failed'),
        ('chromium is not on the PATH', 'failed'),
        ('needs CUDA', 'skipped'),
    ],
)
def test_what_is_not_installed_is_no_excuse_if_all_is_required(reason, outcome):
    for required, expected in ((True, outcome), (False, 'skipped')):
        report = SimpleNamespace(skipped=True, outcome='skipped', longrepr=('file', 1, reason))
        fail_if_required(
            report, SimpleNamespace(getoption=lambda name, required=required: required)
        )
        assert report.outcome == expected
