"""Wrappers that keep a backbone's weights, such as LoRA's, load pretrained ones."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import small_arch
from mmengine.model import BaseModel
from mmengine.runner import load_state_dict
from torch import Tensor, nn

from mmsvit import SViT
from mmsvit.checkpoint import load_pretrained
from mmsvit.engine.hooks import StrictCheckpointHook
from mmsvit.visualization.super_token_maps import SuperTokenRecorder


class Adapter(nn.Module):
    """A linear layer as peft wraps it: its weight is ``base_layer.weight``."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict(
            dict(default=nn.Linear(base_layer.in_features, rank, bias=False))
        )
        self.lora_B = nn.ModuleDict(
            dict(default=nn.Linear(rank, base_layer.out_features, bias=False))
        )
        nn.init.kaiming_uniform_(self.lora_A['default'].weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B['default'].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B['default'](self.lora_A['default'](x))


def add_adapters(backbone: SViT) -> SViT:
    for name, module in list(backbone.named_modules()):
        if name.endswith(('attend.qkv', 'ffn.fc1')) and isinstance(module, nn.Linear):
            parent, _, last = name.rpartition('.')
            setattr(backbone.get_submodule(parent), last, Adapter(module))
    return backbone


class Detector(BaseModel):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(2, 2)

    def forward(self, inputs: Tensor, data_samples: object = None, mode: str = 'tensor') -> object:
        return self.backbone(inputs)


@pytest.fixture(scope='module')
def trained() -> SViT:
    torch.manual_seed(1)
    return SViT(small_arch()).eval()


@pytest.fixture(scope='module')
def images() -> Tensor:
    return torch.randn(1, 3, 64, 96)


@pytest.fixture(scope='module')
def file(trained, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('weights') / 'detector.pth'
    weights = {f'backbone.{key}': value for key, value in trained.state_dict().items()}
    torch.save(dict(state_dict=weights, meta={}), path)
    return str(path)


def assert_same(model: nn.Module, trained: SViT, images: Tensor) -> None:
    for found, expected in zip(model.eval()(images), trained(images)):
        torch.testing.assert_close(found, expected)


def load_from(model: nn.Module, checkpoint: dict) -> None:
    """As a runner with ``load_from`` does it."""
    runner = SimpleNamespace(model=model, _load_from='file')
    StrictCheckpointHook(backbone_only=True).after_load_checkpoint(runner, checkpoint)
    load_state_dict(model, checkpoint['state_dict'])


def test_layers_in_adapters_load_pretrained_weights(trained, file, images):
    backbone = add_adapters(SViT(small_arch()))
    load_pretrained(backbone, file)
    assert_same(backbone, trained, images)


def test_layers_in_adapters_load_a_checkpoint(trained, file, images):
    model = Detector(add_adapters(SViT(small_arch())))
    load_from(model, torch.load(file, weights_only=True))
    assert_same(model.backbone, trained, images)


def test_what_is_there_is_still_loaded_strictly(file, tmp_path):
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint['state_dict']['backbone.stages.1.blocks.0.attn.attend.qkv.bias']
    torch.save(checkpoint, tmp_path / 'less.pth')
    with pytest.raises(ValueError, match=r'qkv\.base_layer\.bias'):
        load_pretrained(add_adapters(SViT(small_arch())), tmp_path / 'less.pth')


def test_trained_adapters_are_loaded_again(images):
    first = Detector(add_adapters(SViT(small_arch())))
    for name, parameter in first.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter)
    second = Detector(add_adapters(SViT(small_arch())))
    load_from(second, dict(state_dict=copy.deepcopy(first.state_dict()), meta={}))
    assert_same(second.backbone, first.backbone.eval(), images)


def lora_model(file: str | None) -> nn.Module:
    """MMPretrain's, which initialises the backbone before it replaces layers."""
    peft = pytest.importorskip('mmpretrain.models.peft')
    init_cfg = None if file is None else dict(type='Pretrained', checkpoint=file)
    module = dict(type='mmsvit.SViT', arch=small_arch(), init_cfg=init_cfg)
    return peft.LoRAModel(module, alpha=2, rank=2, targets=[dict(type='.*qkv')])


def test_mmpretrains_lora_of_a_pretrained_backbone_is_initialised_once(trained, file, images):
    model = Detector(lora_model(file))
    model.init_weights()  # As the runner does; the layers are replaced already.
    assert_same(model.backbone, trained, images)


def test_mmpretrains_lora_loads_whole_checkpoints_and_those_of_adapters(trained, file, images):
    model = Detector(lora_model(None))
    load_from(model, torch.load(file, weights_only=True))
    assert_same(model.backbone, trained, images)
    adapters = {key: value + 1 for key, value in model.state_dict().items() if 'lora' in key}
    assert adapters
    load_from(model, dict(state_dict=adapters, meta={}))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in adapters.items())


@pytest.mark.parametrize('change', ['adapters', 'quantised'])
def test_super_tokens_of_layers_without_a_plain_weight(change, trained, images):
    backbone = copy.deepcopy(trained)
    if change == 'adapters':
        add_adapters(backbone)
    else:
        torch.ao.quantization.quantize_dynamic(backbone, {nn.Linear}, inplace=True)
    with SuperTokenRecorder(backbone) as recorder:
        backbone(images)
    with SuperTokenRecorder(trained) as expected:
        trained(images)
    for found, plain in zip(recorder.maps()[0], expected.maps()[0]):
        torch.testing.assert_close(found.association, plain.association, atol=0.1, rtol=0.1)
