"""Packaging of mmsvit. The configs travel in the wheel where MIM and mmsvit.config_path look."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


# Tools that set up a checkout make no sense in an installed package.
CHECKOUT_ONLY = (
    '__pycache__',
    'setup_env.py',
    'lock_requirements.py',
    'quickstart.*',
    'run_tests.sh',
)


class BuildWithConfigs(build_py):
    """Copy what MIM expects beside the package into ``mmsvit/.mim``."""

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


setup(
    name='mmsvit',
    version=re.search(r"__version__ = '(.+)'", (ROOT / 'mmsvit/__init__.py').read_text()).group(1),
    description='SViT, the Super Token Vision Transformer, for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    author='mmsvit contributors',
    license='Apache-2.0',
    classifiers=[
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=['mmsvit', 'mmsvit.*']),
    # MMEngine, MMCV and MMDetection are not named here on purpose: two families of releases
    # hold them under different names, and pip would put the second beside the first.
    install_requires=['torch>=2.6', 'numpy'],
    extras_require=dict(
        safetensors=['safetensors'],
        export=['onnx', 'onnxscript', 'onnxruntime'],
        demo=['gradio>=6'],
    ),
    cmdclass={'build_py': BuildWithConfigs},
)
