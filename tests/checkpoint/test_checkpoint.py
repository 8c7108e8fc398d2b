"""Checkpoints: those that fit load whole, all others not at all and not in silence."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_arch, run_python, small_arch
from mmengine.logging import MessageHub
from mmengine.model import PretrainedInit

from mmsvit import SViT
from mmsvit.checkpoint import backbone_state_dict, model_state_dict, read_checkpoint


def load(path, arch, prefix=None, **arguments) -> SViT:
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    model = SViT(arch, init_cfg=init_cfg, **arguments)
    model.init_weights()
    return model


@pytest.fixture
def runner_checkpoint(tmp_path):
    """What a runner saves: the backbone inside a detector, and a log history."""
    model = SViT(small_arch())
    hub = MessageHub.get_instance('test_checkpoint')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('iter', 3)
    weights = {f'backbone.{key}': value for key, value in model.state_dict().items()}
    weights['neck.lateral_convs.0.conv.weight'] = torch.zeros(3)
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(meta=dict(epoch=1), state_dict=weights, message_hub=hub.state_dict()), path)
    return path, model


def test_the_authors_file_loads_as_it_is():
    path = GOLDEN / 'tiny.pth'
    torch.serialization.clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError):  # It is one that torch alone refuses.
        torch.load(path, weights_only=True)
    published = read_checkpoint(path)['model']
    model = load(path, golden_arch('tiny'))
    weight = published['layers.1.blocks.0.attn.stoken_refine.qkv.weight']
    assert torch.equal(model.stages[1].blocks[0].attn.attend.qkv.weight, weight[..., 0, 0])
    gamma = published['layers.2.blocks.0.gamma_1']
    assert torch.equal(model.stages[2].blocks[0].gamma_1, gamma.flatten())


def test_the_evaluated_weights_are_taken_not_the_average():
    checkpoint = read_checkpoint(GOLDEN / 'tiny.pth')
    checkpoint['model_ema'] = {key: value + 1 for key, value in checkpoint['model'].items()}
    weights = backbone_state_dict(checkpoint)
    assert torch.equal(weights['stem.0.bias'], checkpoint['model']['patch_embed.proj.0.bias'])


def test_runner_checkpoint(runner_checkpoint):
    path, expected = runner_checkpoint
    for prefix in (None, 'backbone.', 'backbone'):
        model = load(path, small_arch(), prefix)
        for key, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    # OpenMMLab's MMEngine reads it so, after us.
    assert torch.load(path, weights_only=True)['meta'] == dict(epoch=1)


def test_converted_file_is_the_same_and_needs_no_allow_list(tmp_path):
    out = tmp_path / 'converted.pth'
    run_python('tools/convert_checkpoint.py', GOLDEN / 'tiny.pth', out)
    torch.serialization.clear_safe_globals()
    torch.load(out, weights_only=True)
    converted, original = (load(p, golden_arch('tiny')) for p in (out, GOLDEN / 'tiny.pth'))
    for key, value in original.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    again = run_python('tools/convert_checkpoint.py', GOLDEN / 'tiny.pth', out, check=False)
    assert again.returncode != 0 and 'exists' in again.stderr


def test_norms_of_outputs_and_absent_stages_are_no_mismatch():
    model = load(GOLDEN / 'tiny.pth', golden_arch('tiny'), out_norm_cfg=dict(type='LN'))
    assert model.out_norms['0'].weight.eq(1).all()
    part = load(GOLDEN / 'tiny.pth', golden_arch('tiny'), out_indices=(0, 1))
    assert len(part.stages) == 2


def test_missing_file_says_where_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / 'stvit-small-224.pth', 'small')
    for word in ('github.com/hhb072/STViT', 'init_cfg=None', 'stvit-small-224.pth'):
        assert word in str(error.value)


def test_wrong_arch_names_both():
    with pytest.raises(ValueError, match=re.escape('depths [2, 2, 2, 1]')) as error:
        load(GOLDEN / 'tiny.pth', 'small')
    assert 'depths [3, 5, 9, 3]' in str(error.value)
    assert 'stages.0.blocks.2' in str(error.value)


def test_other_shape_names_the_weight_and_loads_nothing():
    arch = {**golden_arch('tiny'), 'embed_dims': (32, 64, 96, 192)}
    model = SViT(arch, init_cfg=dict(type='Pretrained', checkpoint=str(GOLDEN / 'tiny.pth')))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match='of another shape'):
        model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop('stem.0.weight'), 'missing from the file: stem.0.weight'),
        (lambda w: w.update(extra=torch.zeros(1)), 'not in the model: extra'),
    ],
)
def test_one_weight_too_few_or_too_many(tmp_path, change, message):
    weights = SViT(small_arch()).state_dict()
    change(weights)
    torch.save(dict(state_dict=weights), tmp_path / 'broken.pth')
    with pytest.raises(ValueError, match=message):
        load(tmp_path / 'broken.pth', small_arch())


def test_a_mask_may_hold_infinity():
    weights = {'head.weight': torch.ones(2, 2), 'mask': torch.tensor([0, -torch.inf])}
    assert model_state_dict(weights).keys() == weights.keys()


def test_foreign_checkpoint(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'foreign.pth')
    with pytest.raises(ValueError, match='not an SViT'):
        load(tmp_path / 'foreign.pth', small_arch())
    with pytest.raises(ValueError, match=r"start with 'encoder\.'"):
        load(tmp_path / 'foreign.pth', small_arch(), prefix='encoder.')
    torch.save(dict(epoch=3), tmp_path / 'empty.pth')
    with pytest.raises(ValueError, match='holds no weights'):
        load(tmp_path / 'empty.pth', small_arch())
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds list'):
        load(tmp_path / 'list.pth', small_arch())


@pytest.mark.parametrize('keep', [0, 100, 10_000, 0.5, 0.999])
def test_truncated_file(tmp_path, keep):
    whole = (GOLDEN / 'coarse.pth').read_bytes()
    size = keep if isinstance(keep, int) else int(len(whole) * keep)
    (tmp_path / 'cut.pth').write_bytes(whole[:size])
    with pytest.raises(ValueError, match='is corrupt or incomplete'):
        load(tmp_path / 'cut.pth', golden_arch('coarse'))


def test_web_page_instead_of_a_file(tmp_path):
    (tmp_path / 'page.pth').write_text('<!DOCTYPE html><html>Sign in</html>')
    with pytest.raises(ValueError, match='web page'):
        load(tmp_path / 'page.pth', 'small')


@pytest.mark.parametrize('kind', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_every_way_to_say_pretrained_loads(kind):
    checkpoint = dict(type=kind, checkpoint=str(GOLDEN / 'tiny.pth'))
    model = SViT(golden_arch('tiny'), init_cfg=[checkpoint])
    model.init_weights()
    published = read_checkpoint(GOLDEN / 'tiny.pth')['model']
    assert torch.equal(model.stem[0].weight, published['patch_embed.proj.0.weight'])


def test_pretrained_that_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match='needs a checkpoint'):
        SViT(small_arch(), init_cfg=dict(type='Pretrained'))
    entries = [dict(type='Pretrained', checkpoint='x.pth'), dict(type='Normal', layer='Linear')]
    with pytest.raises(ValueError, match='must be alone'):
        SViT(small_arch(), init_cfg=entries)


def test_files_of_both_numpy_generations_are_read(tmp_path):
    # A pickle names the module in a line of its own, so the name may change its length.
    saved = dict(state_dict=SViT(small_arch()).state_dict(), best=np.float64(0.5))
    torch.save(saved, tmp_path / 'a')
    with zipfile.ZipFile(tmp_path / 'a') as old, zipfile.ZipFile(tmp_path / 'b', 'w') as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith('data.pkl'):
                spellings = [b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n']
                there, other = sorted(spellings, key=lambda spelling: spelling not in data)
                assert there in data
                data = data.replace(there, other)
            new.writestr(name, data)
    for name in ('a', 'b'):
        assert read_checkpoint(tmp_path / name)['best'] == 0.5


class Harmful:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, 'w')


class Typical:
    def __reduce__(self):
        return os.system, ('true',)


class HarmlessLooking:
    """Reaches for an attribute, as MMEngine's log history does for its methods."""

    def __reduce__(self):
        return getattr, (argparse.Namespace, '__init__')


@pytest.mark.promise(
    'Safety',
    'Code of several kinds in a checkpoint is not run, `getattr` among them',
    '3 of 3',
)
def test_code_in_a_checkpoint_is_not_run(tmp_path):
    marker = tmp_path / 'was here'
    cases = ('open', Harmful(marker)), ('system', Typical()), ('getattr', HarmlessLooking())
    for name, content in cases:
        path = tmp_path / f'{name}.pth'
        torch.save(dict(state_dict=SViT(small_arch()).state_dict(), extra=content), path)
        with pytest.raises(ValueError, match=f'refused.*{name}'):
            load(path, small_arch())
    assert not marker.exists()
