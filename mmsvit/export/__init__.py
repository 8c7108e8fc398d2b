"""Export to ONNX, TorchScript and torch.export, checked against the model."""

from .exportable import PARTS, Exportable, build_exportable
from .writer import CHECK_SHAPES, FORMATS, Check, ExportError, export

__all__ = [
    'CHECK_SHAPES',
    'FORMATS',
    'PARTS',
    'Check',
    'ExportError',
    'Exportable',
    'build_exportable',
    'export',
]
