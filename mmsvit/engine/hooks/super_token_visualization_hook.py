"""Draw super tokens during training, with the config's visualizer."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner

from ...models.mm_models import find_svit, unwrap
from ...registry import HOOKS
from ...visualization.drawing import AttentionPoint, seen_image, super_token_sheet
from ...visualization.super_token_maps import SuperTokenRecorder


@HOOKS.register_module()
class SuperTokenVisualizationHook(Hook):
    """Draw super tokens of training images at intervals, and of the first images of validations.

    In a config: ``custom_hooks = [dict(type='mmsvit.SuperTokenVisualizationHook')]``. The list
    replaces an inherited ``custom_hooks``: repeat those. All ``vis_backends`` get the pictures.

    Args:
        interval: Training steps between pictures; 0 for none.
        val_images: How many images of each validation or test, from the first on.
        stages: Which stages, counted from 0; by default those with super tokens.
        block: Which block of each stage, counted from 0, or from -1 backwards.
        point: Where attention is drawn from, as fractions of width and height.
    """

    priority = 'LOW'

    def __init__(
        self,
        interval: int = 500,
        val_images: int = 2,
        stages: Sequence[int] | None = None,
        block: int = -1,
        point: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        if interval < 0 or val_images < 0:
            raise ValueError(
                f'interval and val_images must be 0 or more, found {interval} and {val_images}'
            )
        self.interval, self.val_images = interval, val_images
        self.stages, self.block = stages, block
        self.point = AttentionPoint(*point)
        self._drawn = 0
        self._recorder: SuperTokenRecorder | None = None

    def _record(self, runner: Runner, max_images: int) -> SuperTokenRecorder:
        svit = find_svit(unwrap(runner.model))
        return SuperTokenRecorder(svit, self.stages, self.block, max_images)

    def before_run(self, runner: Runner) -> None:
        """Refuse a model that cannot be drawn.

        Raises:
            ValueError: The model is compiled, has no SViT, or one without such a stage or block,
                without super tokens, or with other than 3 input channels.
        """
        if runner.cfg.get('compile'):
            # A compiled step ignores forward hooks that are added later, such as a recorder's.
            raise ValueError(
                "SuperTokenVisualizationHook cannot look into a compiled step: leave out the config's "
                '`compile` or this hook (tools/visualize_super_tokens.py draws from checkpoints)'
            )
        backbone = self._record(runner, 1).backbone
        if backbone.in_channels != 3:
            raise ValueError(
                f'only images of 3 channels can be drawn, found in_channels={backbone.in_channels}'
            )

    def _start(self, runner: Runner, max_images: int) -> None:
        if runner.rank == 0:
            self._recorder = self._record(runner, max_images).__enter__()

    def _draw(self, runner: Runner, data_batch: dict | None, name: str, step: int) -> int:
        """Stop recording, draw the images and return their number."""
        recorder, self._recorder = self._recorder, None
        if recorder is None or data_batch is None:
            return 0
        recorder.__exit__()
        inputs, all_maps = data_batch['inputs'], recorder.maps()
        # A dict of several branches in semi-supervised training.
        images = recorder.images if isinstance(inputs, dict) else inputs
        preprocessor = unwrap(runner.model).data_preprocessor
        for i, maps in enumerate(all_maps):
            image = seen_image(preprocessor, recorder.images[i], images[i].shape[-2:])
            number = '' if name == 'train' else f'_{self._drawn + i}'
            sheet = super_token_sheet(image, maps, self.point, f'{name}, step {step}')
            runner.visualizer.add_image(f'super_tokens_{name}{number}', sheet, step)
        return len(all_maps)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Start recording in a step that is to be drawn; on rank 0 only."""
        if self.every_n_train_iters(runner, self.interval):
            self._start(runner, 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: object = None
    ) -> None:
        """Draw the first image of the step's batch."""
        self._draw(runner, data_batch, 'train', runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Reset the count."""
        self._drawn = 0

    before_test_epoch = before_val_epoch

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Start recording unless enough images are drawn; on rank 0 only.

        Not with test-time augmentation, which runs each image several times.
        """
        if not isinstance(unwrap(runner.model), BaseTTAModel) and self._drawn < self.val_images:
            self._start(runner, self.val_images - self._drawn)

    before_test_iter = before_val_iter

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: object = None
    ) -> None:
        """Draw the images of the batch."""
        self._drawn += self._draw(runner, data_batch, 'val', runner.iter)

    after_test_iter = after_val_iter

    def after_run(self, runner: Runner) -> None:
        """Stop recording, also if a step failed."""
        if self._recorder is not None:
            self._recorder.__exit__()
