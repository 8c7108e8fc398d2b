"""Layer-wise learning rate decay for any model around an SViT."""

from __future__ import annotations

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..models.svit import SViT
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that fall from the heads down to the stem.

    The learning rate of a backbone parameter at depth ``d`` of ``n``
    (:meth:`mmsvit.SViT.get_layer_depth`) is multiplied by ``layer_decay_rate ** (n - 1 - d)``;
    neck and heads keep theirs. ``backbone_lr_mult`` (1 by default) multiplies all rates of the
    backbone. (``'backbone'`` in ``custom_keys`` would also do that, but override
    ``norm_decay_mult`` and ``bias_decay_mult``.) In a config::

        optim_wrapper = dict(
            constructor='mmsvit.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0),
        )

    All other keys of ``paramwise_cfg`` are those of MMEngine's default constructor.

    Raises:
        ValueError: ``layer_decay_rate`` is missing or not in (0, 1], or the model does not
            have exactly one SViT.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = (self.paramwise_cfg or {}).get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate must be a number in (0, 1], found {rate!r}'
            )

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add all parameters of ``module`` to ``params``, each as a group."""
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:  # A recursive call for a part; the decay is for the model.
            return
        found = [(name, part) for name, part in module.named_modules() if isinstance(part, SViT)]
        if len(found) != 1:
            raise ValueError(
                f'layer-wise decay needs a model with one mmsvit.SViT, found {len(found)} '
                f'in {type(module).__name__}'
            )
        prefix, backbone = found[0]
        prefix = f'{prefix}.' if prefix else ''
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group['params']
            name = names[parameter]
            depth, num_layers = backbone.get_layer_depth(name, prefix)
            scale = self.paramwise_cfg['layer_decay_rate'] ** (num_layers - 1 - depth)
            if name.startswith(prefix):
                scale *= self.paramwise_cfg.get('backbone_lr_mult', 1)
            group['lr'] = group.get('lr', self.base_lr) * scale
