"""The operations of an SViT block as functions of tensors.

``sample`` computes super tokens from tokens, and how much each token belongs to
each of the nine super tokens around it; ``distribute`` sends super tokens back
to the tokens by that association. ``conv_ffn`` and ``add_depthwise_conv`` are the rest of a
block. All work on channels-last tensors, ``(N, H, W, C)``, and on the backend that
``choose_backend`` chooses.
"""

from .backend import choose_backend
from .layers import add_depthwise_conv, channels_first, conv_ffn, gelu_affine, layer_norm
from .super_token import distribute, sample

__all__ = [
    'add_depthwise_conv',
    'channels_first',
    'choose_backend',
    'conv_ffn',
    'distribute',
    'gelu_affine',
    'layer_norm',
    'sample',
]
