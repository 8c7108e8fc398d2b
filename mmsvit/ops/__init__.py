"""The three steps of super token sampling as functions of tensors.

``associate`` says how much each token belongs to each of the nine super tokens
around it, ``aggregate`` sums tokens into super tokens by that association, and
``distribute`` sends super tokens back to the tokens. All of them work on
channels-last tensors, ``(N, H, W, C)``.
"""

from .super_token import aggregate, associate, distribute, select_backend

__all__ = ['aggregate', 'associate', 'distribute', 'select_backend']
