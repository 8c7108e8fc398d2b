"""Nothing that is read runs code: checkpoints by every entry, metafiles, annotations."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mmengine.runner.checkpoint
import pytest
import torch
from conftest import GOLDEN, ROOT, golden_arch, run_python, small_arch
from mmengine.runner import CheckpointLoader, load_checkpoint

from mmsvit import SViT
from mmsvit.analysis.config_flops import read_metafile
from mmsvit.checkpoint import (
    backbone_state_dict,
    read_checkpoint,
    save_weights,
)
from mmsvit.checkpoint.mmengine_patch import load_from_weights_only


class Harmful:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


@pytest.fixture
def harmful(tmp_path):
    """A checkpoint that carries code, and the file that exists once the code has run."""
    file, marker = tmp_path / 'harmful.pth', tmp_path / 'code ran'
    weights = {f'backbone.{key}': value for key, value in SViT(small_arch()).state_dict().items()}
    torch.save(dict(state_dict=weights, meta=dict(epoch=1, iter=2), extra=Harmful(marker)), file)
    return file, marker


EVERY_ENTRY = """
import runpy, sys
from functools import partial
from pathlib import Path
root, config, data, file, url, work_dir = sys.argv[1:]
options = ['--work-dir', work_dir, '--cfg-options']
for split in ('train', 'val', 'test'):
    options += [f'{split}_dataloader.dataset.data_root={data}/', f'{split}_dataloader.num_workers=0',
                f'{split}_dataloader.persistent_workers=False']
    options += [f'{split}_evaluator.ann_file={data}/annotations/instances_val.json'] * (split != 'train')
Path(work_dir).mkdir()
Path(work_dir, 'last_checkpoint').write_text(file)
image = data + '/val/000000.jpg'

def pretrained(part, harmful):
    init_cfg = dict(type='Pretrained', checkpoint=harmful)
    if part == 'backbone':  # The config sets it to None.
        init_cfg['_delete_'] = True
    path = Path(work_dir, f'{part}_{harmful == url}.py')
    path.write_text(f'_base_ = {config!r}\\nmodel = dict({part}=dict(init_cfg={init_cfg}))')
    return str(path)

def tool(name, *arguments):
    def run():
        sys.argv[:] = [f'{root}/tools/{name}.py', '--debug', *arguments]  # the error itself
        runpy.run_path(sys.argv[0], run_name='__main__')
    return run

def detector(harmful):
    from mmdet.apis import init_detector
    init_detector(config, harmful, device='cpu')

def inferencer(harmful):
    from mmdet.apis import DetInferencer
    DetInferencer(model=config, weights=harmful, device='cpu')

def train(*arguments):
    return tool('train', *arguments, *options)

entries = {
    'resume the latest': train(config, '--resume'),
    'resume weights alone': train(config, '--resume', 'x.safetensors'),
    'convert': tool('convert_checkpoint', file, file + '.safetensors'),
    'visualize': tool('visualize_super_tokens', image, '--config', config, '--checkpoint', file),
}
for harmful in (file, url):
    entries.update({
        f'test {harmful}': tool('test', config, harmful, *options),
        f'load_from {harmful}': tool('train', config, *options, f'load_from={harmful}'),
        f'resume {harmful}': train(config, '--resume', harmful),
        f'init_cfg of the backbone {harmful}': train(pretrained('backbone', harmful)),
        f'init_cfg of the neck {harmful}': train(pretrained('neck', harmful)),
        f'init_detector {harmful}': partial(detector, harmful),
        f'DetInferencer {harmful}': partial(inferencer, harmful),
    })
for name, run in entries.items():
    try:
        run()
    except (Exception, SystemExit) as error:
        print(f'ENTRY {name}: {error}')
    else:
        print(f'ENTRY {name}: went through')
"""


@pytest.fixture
def address(tmp_path, monkeypatch) -> Iterator[str]:
    """Where a web server gives the files of ``tmp_path``; downloads go to its ``home``."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.promise('Runs', 'A run is not resumed from weights alone')
@pytest.mark.promise(
    'Safety',
    'A checkpoint that carries code is refused with a message, wherever it is read',
    '17 entries of 17: from a file and from the web test, `load_from`, `--resume FILE`, '
    '`init_cfg` of backbone and neck, `init_detector`, `DetInferencer`; `--resume`, convert, '
    'visualize',
)
def test_a_checkpoint_with_code_is_refused_at_every_entry(harmful, address, shapes, tmp_path):
    file, marker = harmful
    config = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'
    arguments = [ROOT, config, shapes, file, f'{address}/harmful.pth', tmp_path / 'work']
    output = run_python('-c', 'import mmsvit\n' + EVERY_ENTRY, *arguments, cwd=tmp_path).stdout
    entries = [line for line in output.splitlines() if line.startswith('ENTRY')]
    assert len(entries) == 18
    (weights_alone,) = (entry for entry in entries if 'resume weights alone' in entry)
    assert 'holds weights alone' in weights_alone
    for entry in set(entries) - {weights_alone}:
        assert 'is refused' in entry and '--trust-checkpoint' in entry, entry
    assert not marker.exists()


@pytest.mark.promise(
    'Safety',
    "Models under MMEngine's names on the web run no code",
    '`torchvision://`, `modelzoo://`, `open-mmlab://`, `openmmlab://`, `mmcls://`',
)
@pytest.mark.parametrize('scheme', ['torchvision', 'modelzoo', 'open-mmlab', 'openmmlab', 'mmcls'])
def test_models_by_name_run_no_code(scheme, harmful, address, monkeypatch):
    file, marker = harmful
    names = dict(web=f'{address}/harmful.pth', local=str(file))
    for function in ('get_torchvision_models', 'get_external_models', 'get_mmcls_models'):
        monkeypatch.setattr(mmengine.runner.checkpoint, function, lambda: names)
    for name in ('web', 'local') if 'mmlab' in scheme else ('web',):
        with pytest.raises(ValueError, match='is refused'):
            CheckpointLoader.load_checkpoint(f'{scheme}://{name}')
    assert not marker.exists()


@pytest.mark.promise(
    'Safety',
    'A file from the web is downloaded once: the file that is checked is the file that is loaded',
)
def test_a_checkpoint_from_the_web_is_downloaded_once(address, tmp_path):
    weights, home = SViT(small_arch()).state_dict(), tmp_path / 'home' / 'hub' / 'checkpoints'
    meta = dict(epoch=1, config='raise RuntimeError("was run")')
    torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'x.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'x.pth').read_bytes()[:1000])
    url = f'{address}/x.pth?download=true'
    assert read_checkpoint(url)['meta'] == dict(epoch=1)
    (tmp_path / 'x.pth').unlink()
    assert CheckpointLoader.load_checkpoint(url)['meta'] == dict(epoch=1)
    with pytest.raises(ValueError, match=rf'{home}/\w+/cut\.pth.*Remove the file to download http'):
        read_checkpoint(f'{address}/cut.pth')
    with pytest.raises(OSError, match=r'cannot download .*absent.*404'):
        read_checkpoint(f'{address}/absent.pth')
    assert {path.name for path in home.rglob('*.pth')} == {'x.pth', 'cut.pth'}


def test_files_of_one_name_at_two_addresses_are_told_apart(address, tmp_path):
    for folder, epoch in (('a', 1), ('b', 2)):
        (tmp_path / folder).mkdir()
        torch.save(dict(meta=dict(epoch=epoch)), tmp_path / folder / 'same.pth')
    for folder, epoch in (('a', 1), ('b', 2), ('a', 1)):
        assert read_checkpoint(f'{address}/{folder}/same.pth')['meta'] == dict(epoch=epoch)


@pytest.mark.promise('Safety', '`--trust-checkpoint` warns, and ends with the process')
def test_trust_has_to_be_asked_for_and_warns(harmful, tmp_path):
    file, marker = harmful
    out = tmp_path / 'out.safetensors'
    arguments = ['tools/convert_checkpoint.py', file, out, '--whole', '--trust-checkpoint']
    result = run_python(*arguments)
    assert marker.exists() and 'CHECKPOINTS ARE TRUSTED' in result.stdout + result.stderr
    assert 'backbone.stem.0.weight' in read_checkpoint(out)['state_dict']
    with pytest.raises(ValueError, match='is refused'):  # It was for that process alone.
        read_checkpoint(file)


def test_mmengine_reads_by_our_reader():
    places = 'epoch_1.pth', '/x/epoch_1.pth', 's3://bucket/x.pth', 'petrel:s3://bucket/x.pth'
    for path in (*places, 'http://host/x.pth', 'https://host/x.pth'):
        assert CheckpointLoader._get_checkpoint_loader(path) is load_from_weights_only


@pytest.mark.promise('Safety', 'A config inside a checkpoint is not run by `--resume`')
def test_a_config_hidden_in_a_checkpoint_is_dropped(tmp_path):
    # MMEngine's Runner.resume runs meta['config'] as Python.
    marker = tmp_path / 'code ran'
    meta = dict(epoch=1, config=f'open({str(marker)!r}, "w")')
    torch.save(dict(state_dict=SViT(small_arch()).state_dict(), meta=meta), tmp_path / 'x.pth')
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
    assert found['meta'] == dict(epoch=1)


@pytest.mark.promise('Safety', 'Metafiles run no code and name no config outside their folder')
def test_metafiles_run_no_code_and_name_configs_of_their_own_folder(tmp_path):
    marker, folder = tmp_path / 'code ran', tmp_path / 'inner'
    folder.mkdir()
    (folder / 'metafile.yml').write_text(
        f'Models: [!!python/object/apply:builtins.open [{str(marker)!r}, w]]'
    )
    with pytest.raises(Exception, match='could not determine a constructor'):
        read_metafile(folder / 'metafile.yml')
    assert not marker.exists()
    (tmp_path / 'other.yml').write_text('Models: []')
    for elsewhere in ('../other.yml', str(tmp_path / 'other.yml')):
        (folder / 'index.yml').write_text(f'Import: [{elsewhere}]')
        with pytest.raises(ValueError, match='not below its folder'):
            read_metafile(folder / 'index.yml')
    (tmp_path / 'elsewhere.py').touch()
    (folder / 'linked.py').symlink_to(tmp_path / 'elsewhere.py')
    (folder / 'metafile.yml').write_text('Models: [{Config: linked.py, In Collection: x}]')
    with pytest.raises(ValueError, match=r'linked\.py, a link out of its folder'):
        read_metafile(folder / 'metafile.yml')
    (tmp_path / 'index.yml').write_text('Import: [other.yml]')
    assert read_metafile(tmp_path / 'index.yml') == []


@pytest.mark.promise(
    'Safety',
    'safetensors files are read and written; broken ones are named',
    'weights bit-identical',
)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_backbone_loads_weights_of_either_format(suffix, tmp_path):
    pytest.importorskip('safetensors')
    weights = backbone_state_dict(read_checkpoint(GOLDEN / 'tiny.pth'))
    save_weights(weights, tmp_path / f'converted{suffix}', dict(source='tiny.pth'))
    path = str(tmp_path / f'converted{suffix}')
    model = SViT(golden_arch('tiny'), init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert read_checkpoint(path)['meta'] == dict(source='tiny.pth')


@pytest.mark.promise('Safety', 'safetensors files are read and written; broken ones are named')
def test_a_whole_model_as_safetensors_keeps_its_classes(tmp_path):
    pytest.importorskip('safetensors')
    model = torch.nn.ModuleDict(dict(backbone=SViT(small_arch())))
    shared = model.backbone.stem[0].weight  # The format knows no two names of one tensor.
    weights = {**model.state_dict(), 'head.weight': shared, 'turned': torch.ones(2, 3).T}
    meta = dict(dataset_meta=dict(classes=('circle', 'ring'), palette=[(1, 2, 3)]), epoch=3)
    torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'epoch_3.pth')
    out = tmp_path / 'whole.safetensors'
    run_python('tools/convert_checkpoint.py', tmp_path / 'epoch_3.pth', out, '--whole')
    torch.nn.init.zeros_(shared)
    read = load_checkpoint(model, str(out))  # MMEngine's, as its users call it.
    assert read['meta']['dataset_meta'] == dict(classes=['circle', 'ring'])
    assert set(read['state_dict']) == set(weights) and shared.abs().sum() > 0
    assert torch.equal(read['state_dict']['turned'], weights['turned'])


@pytest.mark.promise('Safety', 'safetensors files are read and written; broken ones are named')
@pytest.mark.parametrize('keep', [0, 7, 100, 0.5])
def test_a_broken_safetensors_file_is_named(keep, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    file = tmp_path / 'cut.safetensors'
    safetensors.save_file(SViT(small_arch()).state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(ValueError, match=r'cut\.safetensors.*is corrupt or incomplete'):
        read_checkpoint(file)
    torch.save(dict(a=torch.zeros(1)), file)  # A pickle under that name.
    with pytest.raises(ValueError, match='is corrupt or incomplete'):
        read_checkpoint(file)


def test_missing_safetensors_names_the_install(tmp_path, monkeypatch):
    (tmp_path / 'x.safetensors').write_bytes(json.dumps({}).encode())
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='pip install safetensors'):
        read_checkpoint(tmp_path / 'x.safetensors')
