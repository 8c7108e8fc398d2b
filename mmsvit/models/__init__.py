"""The backbone, its attention, and models of the mm* libraries around it.

``projection_pooling`` needs mmcv, and is therefore not imported here.
"""

from .super_token_attention import SuperTokenAttention
from .svit import SViT
from .svit_arch import ARCHS

__all__ = ['ARCHS', 'SViT', 'SuperTokenAttention']
