"""The mmsvit registries, children of MMEngine's root.

MMEngine imports this module by itself when it meets ``type='mmsvit.SViT'`` in
any config, so no config needs ``custom_imports``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmsvit',
    locations=[
        'mmsvit.models.svit',
        'mmsvit.models.projection_pooling',
        'mmsvit.models.float32_parts',
    ],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmsvit',
    locations=['mmsvit.engine.hooks'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmsvit',
    locations=['mmsvit.engine.layer_decay'],
)
