"""Training: hooks and layer-wise learning rate decay."""

from ..compat.mmengine_private import check_mmengine

check_mmengine()
