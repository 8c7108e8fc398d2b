"""Run a config's model on single images: predictions and super tokens of the backbone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.runner import load_state_dict
from mmengine.structures import BaseDataElement
from PIL import Image
from torch import Tensor

from ..checkpoint.loading import load_pretrained
from ..checkpoint.published import model_state_dict
from ..checkpoint.reading import read_checkpoint
from ..models.mm_models import build_model, find_svit
from ..visualization.drawing import SMALLEST_PICTURE, fit, seen_image
from ..visualization.super_token_maps import SuperTokenMap, SuperTokenRecorder


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f'the device {str(device)!r} cannot be used: {reason}') from error


def _test_dataset(cfg: Config) -> ConfigDict:
    if cfg.get('test_dataloader') is None:
        raise ValueError('the config has no test_dataloader, whose pipeline prepares the images')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper, such as RepeatDataset
        dataset = dataset.dataset
    return dataset


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    """Classes and colours of the test dataset, without loading it."""
    dataset = _test_dataset(cfg)
    kind = dataset.type
    if not isinstance(kind, type):
        with DATASETS.switch_scope_and_registry(None) as registry:  # of the default scope
            kind = registry.get(kind)
    meta = {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    return {key.lower(): value for key, value in meta.items()}


def _enlarge(image: np.ndarray, sample: BaseDataElement) -> tuple[np.ndarray, BaseDataElement]:
    """Enlarge a small image and its predictions, to leave room for labels."""
    factor = round(SMALLEST_PICTURE / max(image.shape[:2]))
    if factor < 2:
        return image, sample
    sample = sample.clone()
    for name in ('pred_instances', 'pred_sem_seg', 'pred_panoptic_seg'):
        if name in sample:
            data = sample.get(name)
            fields = dict(data.items())
            for key, value in fields.items():
                if key == 'bboxes':
                    fields[key] = value * factor
                elif key in ('masks', 'sem_seg', 'data'):
                    fields[key] = value.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
            setattr(sample, name, type(data)(**fields))
    return fit(image, factor * max(image.shape[:2])), sample


class ImageModel:
    """A model of MMDetection, MMSegmentation or MMPretrain with SViT, for single images.

    Images go through the pipeline of the config's ``test_dataloader``, without annotations.

    Args:
        cfg: The config.
        device: The device of the model.

    Raises:
        ValueError: The config has no model with SViT or no test data, or the device cannot be
            used.
    """

    def __init__(self, cfg: Config, device: str | torch.device = 'cpu') -> None:
        _check_device(device)
        steps = [
            step for step in _test_dataset(cfg).pipeline if 'Annotations' not in str(step['type'])
        ]
        self.cfg = cfg
        self.model = build_model(cfg).to(device).eval()
        self.pipeline = Compose(steps)
        self.backbone = find_svit(self.model)
        self.dataset_meta = _dataset_meta(cfg)

    def load_backbone(self, checkpoint: str | Path) -> None:
        """Load weights of the backbone only, see :func:`mmsvit.checkpoint.load_pretrained`."""
        load_pretrained(self.backbone, checkpoint)

    def load(self, checkpoint: str | Path) -> None:
        """Load a checkpoint of the model strictly, with its ``dataset_meta``.

        Raises:
            FileNotFoundError: The file does not exist.
            RuntimeError, ValueError: It cannot be read, or its weights do not fit.
        """
        read = read_checkpoint(checkpoint)
        load_state_dict(self.model, model_state_dict(read), strict=True)
        meta = read.get('meta') or {}
        self.dataset_meta.update(meta.get('dataset_meta') or {})

    def prepare(self, path: str | Path) -> dict:
        """Read an image and run the pipeline on it."""
        return self.pipeline(dict(img_path=str(path), img_id=0))

    @torch.no_grad()
    def super_tokens(
        self, data: dict, stages: Sequence[int] | None = None, block: int = -1
    ) -> tuple[np.ndarray, list[SuperTokenMap]]:
        """Run the backbone.

        Args:
            data: From :meth:`prepare`.
            stages: See :class:`SuperTokenRecorder`.
            block: See :class:`SuperTokenRecorder`.

        Returns:
            The input of the backbone as an RGB image without padding, and the map of each stage.
        """
        preprocessor = self.model.data_preprocessor
        batch = preprocessor(pseudo_collate([data]), False)
        with SuperTokenRecorder(self.backbone, stages, block) as recorder:
            self.backbone(batch['inputs'])
        seen = seen_image(preprocessor, recorder.images[0], data['inputs'].shape[-2:])
        return seen, recorder.maps()[0]

    @torch.no_grad()
    def predict(self, data: dict) -> BaseDataElement:
        """The model's prediction for the data from :meth:`prepare`."""
        return self.model.test_step(pseudo_collate([data]))[0]

    def draw_prediction(
        self, image: np.ndarray, sample: BaseDataElement, threshold: float = 0.3
    ) -> np.ndarray:
        """Draw a prediction with the config's visualizer.

        Args:
            image: The image of the file, RGB, uint8.
            sample: From :meth:`predict`.
            threshold: Minimum score of objects to draw.

        Returns:
            The picture, in which small images are enlarged; the image itself for predictions of
            classifiers and panoptic predictions without segments.
        """
        if 'pred_score' in sample:
            return image
        if 'pred_panoptic_seg' in sample and not self.describe_prediction(sample):
            return image
        image, sample = _enlarge(image, sample.cpu())
        visualizer = VISUALIZERS.build(dict(type=self.cfg.visualizer.type, name='prediction'))
        visualizer.dataset_meta = {'palette': None, **self.dataset_meta}
        options = dict(pred_score_thr=threshold) if 'pred_instances' in sample else {}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'prediction.png')
            visualizer.add_datasample(
                'prediction', image, sample, draw_gt=False, out_file=str(file), **options
            )
            with Image.open(file) as drawn:
                return np.asarray(drawn.convert('RGB'))

    def describe_prediction(
        self, sample: BaseDataElement, threshold: float = 0.3, most: int = 20
    ) -> list[tuple[str, str]]:
        """Class names and percentages of a prediction, the highest first.

        Returns:
            Objects and scores of detectors, classes and shares of the image of segmentors,
            segments and shares of panoptic models, classes and scores of classifiers.
        """
        if 'pred_panoptic_seg' in sample:
            labels, scores = self._segments(sample.pred_panoptic_seg.sem_seg)
        elif 'pred_instances' in sample:
            scores, labels = sample.pred_instances.scores, sample.pred_instances.labels
            shown = scores >= threshold
            scores, labels = scores[shown], labels[shown]
        elif 'pred_sem_seg' in sample:
            labels, counts = sample.pred_sem_seg.data.unique(return_counts=True)
            scores = counts / counts.sum()
        else:
            scores = sample.pred_score
            labels = torch.arange(len(scores), device=scores.device)
        classes = self.dataset_meta.get('classes') or ()
        best = scores.argsort(descending=True)[:most].tolist()
        numbers = [int(labels[i]) for i in best]
        names = [classes[n] if n < len(classes) else f'class {n}' for n in numbers]
        return [(str(name), f'{scores[i]:.1%}') for name, i in zip(names, best)]

    def _segments(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Class and share of the image of each segment of a panoptic map."""
        from mmdet.evaluation import INSTANCE_OFFSET

        found, counts = ids.unique(return_counts=True)
        labels = found % INSTANCE_OFFSET
        # Labels from the number of classes on mean no segment.
        known = labels < len(self.dataset_meta.get('classes') or ())
        return labels[known], counts[known] / ids.numel()
