"""Write down the version of every package that a family's requirements bring along.

    python tools/lock_requirements.py onedl        # constraints-onedl.txt
    python tools/lock_requirements.py openmmlab    # constraints-openmmlab.txt

Run it with the Python of an environment in which the tests have passed, with the test tools
(tools/setup_env.py --dev): they narrow the versions that others may have. What the requirements
pin keeps that pin, everything else gets the version that is installed. Lines for Pythons before
3.11 are kept as they are: an environment of Python 3.11 knows nothing about them.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = {'onedl': 'requirements.txt', 'openmmlab': 'requirements-openmmlab.txt'}
OLDER = '; python_version < "3.11"'
NEWER = '; python_version >= "3.11"'
HEADER = """\
# Every package that {requirements} brings along, written by
#   python tools/lock_requirements.py {family}
# tools/setup_env.py passes this to pip (-c). Why each is there: docs/safety.md.
"""


def read_pins(family: str) -> list[Requirement]:
    """The lines of a family's requirements."""
    lines = (ROOT / REQUIREMENTS[family]).read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith('#')]


def find_distribution(wanted: Requirement) -> metadata.Distribution:
    """What is installed under the name of a requirement.

    Raises:
        SystemExit: Nothing is.
    """
    names = [wanted.name]
    if wanted.name == 'mmcv':  # Without compiled ops OpenMMLab's has another name.
        names.append('mmcv-lite')
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.distribution(name)
    raise SystemExit(f'{wanted} is not installed; run this in a complete environment')


def find_all(pins: list[Requirement]) -> dict[str, metadata.Distribution]:
    """What is installed of these requirements and of theirs, by canonical name.

    Raises:
        SystemExit: Something is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    extras: dict[str, set[str]] = {}
    todo = list(pins)
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found and wanted.extras <= extras[name]:
            continue
        found[name] = find_distribution(wanted)
        extras[name] = extras.get(name, set()) | wanted.extras
        for line in found[name].requires or ():
            inner = Requirement(line)
            if inner.marker is None or any(
                inner.marker.evaluate({'extra': extra}) for extra in {'', *extras[name]}
            ):
                todo.append(inner)
    return found


def lock(family: str, older: dict[str, str]) -> list[str]:
    """The constraints of a family, one a line.

    Args:
        family: A key of :data:`REQUIREMENTS`.
        older: Lines for Python 3.10, by canonical name.
    """
    pins = read_pins(family)
    pinned = {canonicalize_name(pin.name): str(pin) for pin in pins}
    lines = []
    for name, distribution in sorted(find_all(pins).items()):
        line = pinned.get(name, f'{name}=={distribution.version}')
        python = SpecifierSet(distribution.metadata.get('Requires-Python') or '')
        if name in pinned or '3.10' in python:
            lines.append(line)
        else:
            lines += [line + NEWER, *([older[name]] if name in older else [])]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('family', choices=sorted(REQUIREMENTS))
    family = parser.parse_args().family
    file = ROOT / f'constraints-{family}.txt'
    older = {}
    if file.is_file():
        kept = [line for line in file.read_text().splitlines() if line.endswith(OLDER)]
        older = {canonicalize_name(Requirement(line).name): line for line in kept}
    lines = lock(family, older)
    header = HEADER.format(requirements=REQUIREMENTS[family], family=family)
    file.write_text(header + '\n'.join(lines) + '\n')
    print(f'wrote {len(lines)} lines to {file}')


if __name__ == '__main__':
    main()
