"""The build step that pyproject.toml cannot express: configs and tools travel in the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Tools that set up a checkout make no sense in an installed package.
CHECKOUT_ONLY = ('__pycache__', 'setup_env.py', 'quickstart.*', 'run_tests.sh')


class BuildWithConfigs(build_py):
    """Copy configs and tools to ``mmsvit/.mim``, where MIM and ``mmsvit.config_path`` look."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ('configs', 'tools'):
                shutil.copytree(
                    ROOT / name,
                    Path(self.build_lib, 'mmsvit', '.mim', name),
                    ignore=shutil.ignore_patterns(*CHECKOUT_ONLY),
                    dirs_exist_ok=True,
                )
            shutil.copy(ROOT / 'model-index.yml', Path(self.build_lib, 'mmsvit', '.mim'))


setup(cmdclass={'build_py': BuildWithConfigs})
