"""Every code block of README.md, CONTRIBUTING.md and docs/ is run here, or checked.

A page is gone through as a reader would, in a folder with stand-ins for what is downloaded or
trained. Python is run, and prints what the page says; parts of configs are built; of commands
the short ones are run, and the others (training, data sets, several GPUs, installation) given
to the parser of their tool. What nothing here knows is an error, so that no block escapes.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, import_tool, run_python
from markdown_it import MarkdownIt
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, VISUALIZERS, init_default_scope
from packaging.requirements import Requirement
from torch import nn

from mmsvit import config_path
from mmsvit.check_env import fix_for
from mmsvit.checkpoint import read_checkpoint
from mmsvit.cli import add_guards

DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(DOCS.rglob('*.md'))]

# What pages write for something of the reader.
PLACEHOLDERS = {
    'CONFIG': 'configs/svit_upernet_ade20k.py',
    'CHECKPOINT': 'checkpoints/stvit-small-224.pth',
}
WEIGHTS = (
    'checkpoints/stvit-small-224.pth',
    'work_dirs/mine/epoch_12.pth',
    'work_dirs/quickstart/epoch_3.pth',
    'theirs.pth',
)
# Commands, by how they begin, that are run and not only parsed, and a file that they leave.
RUN = {
    'tools/convert_checkpoint.py checkpoints/stvit-small-224.pth svit-': 'svit-small.safetensors',
    'tools/convert_checkpoint.py work_dirs/mine/': 'detector.safetensors',
    'tools/visualize_super_tokens.py docs/images/coffee.jpg': 'super_tokens/coffee_sheet.png',
    'tools/visualize_super_tokens.py photo.jpg --config configs/svit_upernet_ade20k.py': (
        'super_tokens/photo_sheet.png'
    ),
}


# --- what a page has ----------------------------------------------------------------------


class Block(NamedTuple):
    """A code block, or a command within a paragraph."""

    line: int
    language: str
    text: str


COMMAND = re.compile(r'(python|bash) (-m |-c |tools/)|pip install .|pytest ')


def blocks_of(page: Path) -> Iterator[Block]:
    """The code of a page, in order."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == 'fence':
            yield Block(token.map[0] + 1, token.info.strip(), token.content)
        elif token.type == 'code_block':  # Indented ones name no language.
            yield Block(token.map[0] + 1, 'shell', token.content)
        for child in token.children or []:
            if child.type == 'code_inline' and COMMAND.match(child.content):
                yield Block(token.map[0] + 1, 'shell', child.content)


@dataclass
class Reader:
    """Goes through a page, in a folder."""

    folder: Path
    patch: pytest.MonkeyPatch
    output: Callable[[], str]
    """What was printed since it was last asked."""
    names: dict = field(default_factory=dict)
    printed: str = ''

    def read(self, block: Block) -> None:
        """Run or check one block."""
        if block.language == 'python' and is_config(block.text):
            build_config(block.text, self.folder)
        elif block.language == 'python':
            self.run_python(block)
        elif block.language == 'shell':
            for words in commands_of(block.text):
                self.check_command(words)
        elif block.language == 'text':
            self.check_text(block.text)
        elif block.language == 'bibtex':
            assert re.match(r'@\w+\{\w+,\n(  \w+=\{.*\},?\n)+\}$', block.text)
        else:
            raise AssertionError(f'no test knows what a block of {block.language!r} is')

    def run_python(self, block: Block) -> None:
        """Run a block after those before it on the page."""
        for module in imported_modules(block.text):
            pytest.importorskip(module)
        self.output()
        exec(compile(block.text, f'line {block.line}', 'exec'), self.names)
        self.printed = self.output()

    def check_text(self, text: str) -> None:
        """Compare with what was printed, with the error it quotes, or with the configs."""
        if self.printed:
            assert self.printed == text
            self.printed = ''
        elif text.startswith('ValueError: '):
            with pytest.raises(ValueError) as error:
                torch.save(Malicious(), 'epoch_12.pth')
                read_checkpoint('epoch_12.pth')
            assert f'ValueError: {error.value}'.startswith(text.removesuffix(' ...\n'))
        elif text.startswith('data/'):
            check_data_folders(text)
        else:
            raise AssertionError('nothing compares this text with anything')

    def check_command(self, words: list[str]) -> None:
        """Run or parse a command."""
        check_files_are_there(words)
        settings = list(itertools.takewhile(re.compile(r'[A-Z_]+=').match, words))
        program, *arguments = words[len(settings) :]
        if program in ('python', 'python3'):
            self.check_python(arguments)
        elif program == 'bash':
            for setting in settings:
                assert setting.split('=')[0] in (ROOT / arguments[0]).read_text()
            for started in self.started_by_script(arguments):
                self.check_python(started)
        elif program == 'pytest':
            check_pytest(arguments)
        elif program == 'pip':
            check_pip(arguments)
        elif program == 'uv':  # As the file that it writes says itself.
            assert shlex.join(words) in (ROOT / arguments[-1]).read_text()
        elif program == 'git':  # Into where a config looks for it.
            _, url, folder = [*arguments, 'itself'][:3]
            if folder == 'itself':
                assert url.endswith('/mmsvit')
                return
            dataset = (ROOT / 'configs/_base_/datasets/camvid.py').read_text()
            assert url.removeprefix('https://') in dataset and folder in dataset
        elif program == 'cd':
            assert arguments == ['mmsvit']  # After the clone.
        elif program == 'source':
            assert arguments == ['.venv/bin/activate']
        else:
            assert Path(program).name in {*pins(), 'mkdocs'}, f'nothing checks {program!r}'

    def check_python(self, arguments: list[str]) -> None:
        """Check what ``python`` would do with these arguments; run it if it is short."""
        if arguments[0] == '-c':
            for module in imported_modules(arguments[1]):
                pytest.importorskip(module)
        elif arguments[:2] == ['-m', 'pytest']:
            check_pytest(arguments[2:])
        elif arguments[0].startswith('--nnodes='):  # torchrun's
            tool = next(i for i, word in enumerate(arguments) if word.endswith('.py'))
            self.check_python(arguments[tool:])
        elif arguments[0] == '-m':
            assert importlib.util.find_spec(arguments[1])
        else:
            check_cfg_options(self.parse(arguments))
            for begin, left in RUN.items():
                if ' '.join(arguments).startswith(begin):
                    import_tool(Path(arguments[0]).stem).main()
                    assert Path(left).is_file()

    def parse(self, arguments: list[str]) -> Namespace | None:
        """What the tool makes of its arguments; it exits where it does not know them."""
        # Whether there is a GPU is not a matter of the documentation.
        arguments = ['cpu' if argument == 'cuda' else argument for argument in arguments]
        self.patch.setattr(sys, 'argv', arguments)
        try:
            return import_tool(Path(arguments[0]).stem).parse_args()
        except SystemExit as end:
            assert not end.code, f'{shlex.join(arguments)} is refused, see the output'

    def started_by_script(self, arguments: list[str]) -> list[list[str]]:
        """The arguments of each Python that a script would start."""
        programs, record = self.folder / 'programs', self.folder / 'record'
        programs.mkdir(exist_ok=True)
        record.unlink(missing_ok=True)
        for name in ('python', 'python3', 'srun', 'torchrun', 'zizmor'):
            # It prints its own path because tools/setup_env.py prints that of a Python.
            script = f'#!/bin/bash\nprintf "%q " "$@" >> {record}\necho >> {record}\necho "$0"\n'
            (programs / name).write_text('#!/bin/bash\n' if name == 'zizmor' else script)
            (programs / name).chmod(0o755)
        env = {**os.environ, 'PATH': f'{programs}:{os.environ["PATH"]}'}
        subprocess.run(['bash', *arguments], cwd=self.folder, env=env, check=True, timeout=60)
        started = [shlex.split(line) for line in record.read_text().splitlines()]
        # srun has options before the Python that it starts.
        return [line[line.index('-u') + 1 :] if '-u' in line else line for line in started]


# --- Python and configs -------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ('true',)


def imported_modules(code: str) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    return modules


def is_config(code: str) -> bool:
    """Whether it sets names and does nothing else, as configs do."""
    return all(isinstance(node, ast.Assign) for node in ast.parse(code).body)


def build_model(cfg: Config, folder: Path) -> nn.Module:
    """Build a model, load the backbone's weights, and run backbone, neck and dense heads."""
    model = MODELS.build(cfg.model)
    model.backbone.init_weights()
    model.eval()
    if 'roi_head' in dict(model.named_children()):
        heads = [head for head in model.roi_head.modules() if hasattr(head, 'num_classes')]
        assert len({head.num_classes for head in heads}) == 1
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 64, 96))
        for name in ('rpn_head', 'bbox_head', 'decode_head', 'auxiliary_head'):
            if name in dict(model.named_children()):
                getattr(model, name)(features)
    return model


def build_optimizer(cfg: Config, folder: Path) -> None:
    """Whether SViT is trained as it has to be: by AdamW, and norms without weight decay."""
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    if 'constructor' in cfg.optim_wrapper:
        assert len({group['lr'] for group in optimizer.param_groups}) > 1
    decay = {
        id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']
    }
    for name, parameter in model.backbone.named_parameters():
        assert (decay[id(parameter)] == 0) is (parameter.ndim == 1), name


def build_hooks(cfg: Config, folder: Path) -> None:
    for hook in cfg.custom_hooks:
        HOOKS.build(hook)


def build_default_hooks(cfg: Config, folder: Path) -> None:
    add_guards(cfg)
    for hook in cfg.default_hooks.values():
        if hook['type'].startswith('mmsvit.'):  # Others want a running visualizer.
            HOOKS.build(hook)


def build_visualizer(cfg: Config, folder: Path) -> None:
    pytest.importorskip('tensorboard')
    VISUALIZERS.build({**cfg.visualizer, 'name': str(folder), 'save_dir': str(folder)})


def compile_function(cfg: Config, folder: Path) -> None:
    torch.compile(nn.Identity(), **cfg.compile)


# What is built to try a name that a part of a config sets.
def check_test_data(cfg: Config, folder: Path) -> None:
    """Whether data set and metric, whose files are not here, take what the config sets."""
    for settings, registry in (
        (cfg.test_dataloader.dataset, DATASETS),
        (cfg.test_evaluator, METRICS),
    ):
        with registry.switch_scope_and_registry('mmdet') as known:
            kinds = known.get(settings['type']).__mro__
        taken = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
        assert set(settings) - {'type', '_scope_'} <= taken


BUILDERS = dict(
    compile=compile_function,
    _base_=build_model,
    model=build_model,
    optim_wrapper=build_optimizer,
    custom_hooks=build_hooks,
    default_hooks=build_default_hooks,
    visualizer=build_visualizer,
    test_dataloader=check_test_data,
    test_evaluator=check_test_data,
)


def build_config(code: str, folder: Path) -> None:
    """Build what a part of a config sets, in a config that it fits into."""
    names = [ast.unparse(target) for node in ast.parse(code).body for target in node.targets]
    unknown = set(names) - set(BUILDERS)
    assert not unknown, f'nothing builds what a config calls {unknown}'
    if '_base_' not in names:
        whole = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
        base = config_path(whole if 'model' in names else 'svit_maskrcnn_coco.py')
        code = f'_base_ = {base!r}\n{code}'
    file = folder / 'config.py'
    file.write_text(code)
    cfg = Config.fromfile(file)
    init_default_scope(cfg.get('default_scope', 'mmseg' if 'mmseg::' in code else 'mmdet'))
    if 'optim_wrapper' in cfg:  # From the base, if not from the page.
        names.append('optim_wrapper')
    for build in dict.fromkeys(BUILDERS[name] for name in names):
        build(cfg, folder)


# --- commands -----------------------------------------------------------------------------


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command, with something in place of what the reader puts there."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
        if words:
            yield words


def check_files_are_there(words: list[str]) -> None:
    """Whether what a command names of the repository is there."""
    for word in words:
        if re.match(r'(configs|docs|examples|tests|tools)/.*\.\w+$', word):
            assert (ROOT / word).is_file(), f'there is no {word}'


def check_cfg_options(args: Namespace | None) -> None:
    """Whether the config has what ``--cfg-options`` overrides."""
    if getattr(args, 'cfg_options', None) is not None:
        cfg = Config.fromfile(args.config)
        for key in args.cfg_options:
            node = cfg
            for part in key.split('.'):
                assert part in node, f'{args.config} has no {key}'
                node = node[part]


def check_pytest(arguments: list[str]) -> None:
    """Whether the marks are ours and the files are there."""
    settings = (ROOT / 'pyproject.toml').read_text()
    for flag, value in itertools.pairwise(arguments):
        if flag == '-m':
            for word in set(value.split()) - {'and', 'not', 'or'}:
                assert f'"{word}: ' in settings, f'there is no mark {word}'
    for argument in arguments:
        assert not argument.startswith('tests/') or (ROOT / argument).exists()


def pins() -> dict[str, set[str]]:
    """Versions of what the requirements name."""
    found: dict[str, set[str]] = {}
    for file in ROOT.glob('requirements*.txt'):
        for line in file.read_text().splitlines():
            if line and not line.startswith('#'):
                pin = Requirement(line)
                found.setdefault(pin.name, set()).update(each.version for each in pin.specifier)
    return found


def check_pip(arguments: list[str]) -> None:
    """Whether pip would install versions that we pin."""
    assert arguments[0] == 'install'
    if arguments[1:] in (['-e', '.'], ['.']):
        return
    for requirement in map(Requirement, arguments[1:]):
        versions = pins()[requirement.name]
        assert any(map(requirement.specifier.contains, versions)), f'{requirement}: {versions}'


# --- texts --------------------------------------------------------------------------------


def listed_paths(tree: str) -> set[str]:
    """The folders and files of a tree as ``tree`` draws it."""
    top, *lines = tree.splitlines()
    paths, parents = {top}, [top]
    for line in lines:
        indent, name = re.match(r'([│ ]*)[├└]── (\S+)', line).groups()
        parents[len(indent) // 4 + 1 :] = [name]
        paths.add('/'.join(parents))
    return paths


# The configs whose data a page shows.
DATA_CONFIGS = {
    'data/coco': 'svit_maskrcnn_coco.py',
    'data/ade/ADEChallengeData2016': 'svit_upernet_ade20k.py',
    'data/imagenet': 'svit/svit-small_8xb128_in1k.py',
}


def check_data_folders(tree: str) -> None:
    """Whether the tree has what the config reads."""
    cfg = Config.fromfile(config_path(DATA_CONFIGS[tree.split('\n')[0]]))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        dataset = loader.dataset
        prefix = dataset.get('data_prefix') or dataset.get('split')
        parts = [*(prefix.values() if isinstance(prefix, dict) else [prefix])]
        parts += [dataset.ann_file] if dataset.get('ann_file') else []
        for part in parts:
            assert os.path.normpath(Path(dataset.data_root, part)) in listed_paths(tree)


# --- tests --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader has: the repository, weights, a photo, an exported file."""
    folder = tmp_path_factory.mktemp('reader')
    for name in ('configs', 'docs', 'examples', 'tests', 'tools', 'README.md', 'model-index.yml'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'photo.jpg').symlink_to(DOCS / 'images' / 'coffee.jpg')
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(config_path('svit/svit-small_8xb128_in1k.py'))
    classifier = MODELS.build(cfg.model)
    torch.save(dict(state_dict=classifier.state_dict()), folder / 'weights.pth')
    for name in WEIGHTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(folder / 'weights.pth')
    return folder


@pytest.fixture
def exported(stand_ins: Path) -> None:
    """A model with the inputs and outputs of an exported segmentor."""
    if importlib.util.find_spec('onnx') is None:
        return  # The page cannot be run, and says so.
    from onnx import TensorProto, helper, save

    images = helper.make_tensor_value_info('images', TensorProto.FLOAT, ['N', 3, 'H', 'W'])
    labels = helper.make_tensor_value_info('labels', TensorProto.INT64, ['N', 'H', 'W'])
    node = helper.make_node('ArgMax', ['images'], ['labels'], axis=1, keepdims=0)
    graph = helper.make_graph([node], 'segmentor', [images], [labels])
    opset = [helper.make_opsetid('', 20)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=9), stand_ins / 'upernet.onnx')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, stand_ins, exported, tmp_path, monkeypatch, capsys):
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'upernet.onnx').unlink(missing_ok=True)  # An export writes one.
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, monkeypatch, lambda: capsys.readouterr().out)
    for block in blocks_of(page):
        if 'onnxruntime.InferenceSession' in block.text:
            (tmp_path / 'upernet.onnx').symlink_to(stand_ins / 'upernet.onnx')
        try:
            reader.read(block)
        except Exception as error:
            raise AssertionError(f'{page}, line {block.line}:\n{block.text}') from error


def test_a_block_that_nothing_knows_is_an_error(tmp_path, monkeypatch):
    reader = Reader(tmp_path, monkeypatch, str)
    for block in (
        Block(1, 'rust', 'fn main() {}'),
        Block(1, '', 'x'),
        Block(1, 'text', 'nobody printed this'),
        Block(1, 'shell', 'make install'),
        Block(1, 'shell', 'python tools/train.py configs/svit_maskrcnn_coco.py --no-such-option'),
        Block(1, 'shell', 'python tools/train.py configs/no_such_config.py'),
        Block(1, 'shell', 'pip install torch==1.0'),
        Block(1, 'python', 'no_such_name'),
        Block(1, 'python', 'compile = dict(dynmaic=False)'),
        Block(1, 'python', 'optim_wraper = dict(type="OptimWrapper")'),
        Block(1, 'python', 'custom_hook = []'),
        Block(1, 'python', 'default_hooks = dict(non_finit=dict(action="skip"))'),
        Block(1, 'python', 'default_hooks = dict(non_finite=dict(acton="skip"))'),
    ):
        with pytest.raises((AssertionError, KeyError, NameError, TypeError)):
            reader.read(block)


def sources() -> str:
    """Our code, and that of others whose errors the page on installing quotes."""
    import mmdet.engine.hooks.num_class_check_hook
    import mmengine.config.config
    import mmengine.optim.optimizer.amp_optimizer_wrapper
    import torch.serialization

    tools = ROOT / 'tools'
    files = [*(ROOT / 'mmsvit').rglob('*.py'), *tools.glob('*.py'), *tools.glob('*.sh')]
    theirs = (
        mmdet.engine.hooks.num_class_check_hook,
        mmengine.config.config,
        mmengine.optim.optimizer.amp_optimizer_wrapper,
        torch.serialization,
    )
    texts = [file.read_text() for file in files] + [inspect.getsource(module) for module in theirs]
    # Texts that go on in the next line of the source.
    return re.sub(r"""['"]\s*\n\s*f?['"]""", '', '\n'.join(texts))


@pytest.mark.parametrize('asked', ['not slow', 'stress'])
def test_what_runs_on_demand_runs_on_demand_alone(asked):
    """Whatever else ``-m`` selects."""
    files = ['tests/stress', 'tests/peers/test_mmseg_suite.py', 'tests/engine/test_layer_decay.py']
    result = run_python('-m', 'pytest', '--collect-only', '-q', '-m', asked, *files)
    found = {line.split('::')[0] for line in result.stdout.splitlines() if '::' in line}
    stress = {str(path.relative_to(ROOT)) for path in ROOT.glob('tests/stress/test_*.py')}
    assert found == (stress if asked == 'stress' else {'tests/engine/test_layer_decay.py'})


def test_error_texts_are_those_that_appear():
    page = (DOCS / 'install.md').read_text()
    rows = re.findall(r'^\| `(.*?)` \|', page, re.MULTILINE)
    assert len(rows) > 20  # No row is written in another way.
    known = sources()
    for row in rows:
        # What is quoted in a text is filled in when it is raised.
        parts = re.split(r"'\w+'", row)
        assert fix_for(row) or all(part in known for part in parts), row


def test_pictures_are_small():
    for page in PAGES:
        for image in re.findall(r'!\[.*?\]\((.*?)\)', page.read_text()):
            assert (page.parent / image).stat().st_size < 150_000, image


def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    for module in ('mkdocs', 'material', 'mkdocstrings'):
        pytest.importorskip(module)
    run_python('-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', tmp_path)
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*.html')}
    names = {
        'index.html',
        'model_zoo.html',
        'contributing.html',
        '404.html',
        'benchmarks/index.html',
    }
    names |= {f'{path.stem}.html' for path in DOCS.glob('*.md')}
    assert names <= pages
    for page in pages:
        html = (tmp_path / page).read_text()
        assert not re.search(r'<(script|img|link)\b[^>]*(src|href)="?(https?:)?//', html), page
    # The signature of the backbone, from its source, and files of the repository.
    assert 'super_token_sizes' in (tmp_path / 'api.html').read_text()
    assert (tmp_path / 'configs' / 'svit_maskrcnn_coco.py').is_file()


def test_the_notebook_runs_from_end_to_end(monkeypatch, capsys):
    content = json.loads((DOCS / 'super_tokens.ipynb').read_text())
    assert content['nbformat'] == 4 and not any(cell.get('outputs') for cell in content['cells'])
    monkeypatch.chdir(DOCS)
    names: dict = {}
    for number, cell in enumerate(content['cells']):
        if cell['cell_type'] == 'code':
            exec(compile(''.join(cell['source']), f'cell {number}', 'exec'), names)
    assert names['borders'].shape == names['colours'].shape
    assert torch.unique(names['labels']).numel() > 20
    losses = names['losses']
    assert losses[-1] < losses[0] / 2
    assert 'shares add up to 1.0' in capsys.readouterr().out
