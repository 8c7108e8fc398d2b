"""The two steps of super token sampling as functions of tensors.

``sample`` makes super tokens of tokens and says how much each token belongs to
each of the nine super tokens around it; ``distribute`` sends super tokens back
to the tokens by that association. Both work on channels-last tensors,
``(N, H, W, C)``, and on whichever backend ``choose_backend`` finds.
"""

from .backend import choose_backend
from .super_token import distribute, sample

__all__ = ['choose_backend', 'distribute', 'sample']
