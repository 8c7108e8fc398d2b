"""Write a model to a file that runs without mm*, and verify the file.

The file is read again and compared with the model at several image sizes; if any output differs,
it is removed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

Run = Callable[[Tensor], dict[str, Tensor]]

CHECK_SHAPES = ((1, 64, 96), (2, 97, 131), (1, 224, 224), (3, 33, 257))
"""Batch size, height and width: sizes divisible into super token cells, and others."""

MIN_SIZE = 33
"""For smaller images, the last stage has size 1, which torch.export treats as a constant."""

DIFFERENT_LABELS = 1e-3
"""Maximum share of integers that may differ, as labels do where two logits are nearly equal."""


class ExportError(RuntimeError):
    """A file could not be written, or its outputs are wrong."""


@dataclass(frozen=True)
class Check:
    """Comparison of one output of a file with that of the model.

    Attributes:
        shape: Batch size, height and width of the images.
        output: Name of the output.
        error: The largest difference over the largest absolute value; for integers, the share
            that differs; infinite if shapes or dtypes differ or values are not finite.
        limit: Maximum of ``error``.
    """

    shape: tuple[int, int, int]
    output: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def export(
    model: nn.Module,
    path: str | Path,
    file_format: str = 'onnx',
    shape: tuple[int, int] = (97, 131),
    check_shapes: Sequence[tuple[int, int, int]] = CHECK_SHAPES,
    tolerance: float = 1e-4,
    normalised: bool = False,
) -> list[Check]:
    """Write a model for images of any number and size, read the file again and compare.

    Args:
        model: In evaluation mode; from float images ``(N, 3, H, W)`` to a dict of tensors, as
            :class:`mmsvit.export.exportable.Exportable`.
        path: The file to write; it must not exist, and is removed if an output is wrong.
        file_format: One of :data:`FORMATS`.
        shape: Height and width of the images for tracing.
        check_shapes: Batch sizes, heights and widths to compare at.
        tolerance: Maximum :attr:`Check.error` of floating point outputs.
        normalised: Whether the model takes images of mean 0 and standard deviation 1 instead of
            pixels from 0 to 255.

    Returns:
        All comparisons.

    Raises:
        ExportError: The model cannot be exported, or outputs of the file are wrong.
        FileExistsError: ``path`` exists.
        ImportError: A package that the format needs is missing.
        ValueError: The format is unknown, or a shape is too small.
    """
    if file_format not in FORMATS:
        raise ValueError(f'format {file_format!r} is unknown; use one of {list(FORMATS)}')
    shapes = list(check_shapes)
    if min(*shape, *(size for each in shapes for size in each[1:])) < MIN_SIZE:
        raise ValueError(
            f'images must have {MIN_SIZE}x{MIN_SIZE} pixels or more, found {shape} to export and '
            f'{shapes} to check'
        )
    write, read = FORMATS[file_format]
    path = Path(path)
    if path.exists():
        raise FileExistsError(f'{path} exists already; name another file')
    path.parent.mkdir(parents=True, exist_ok=True)
    unverified = path.with_name(f'.{path.name}.unverified')
    try:
        try:
            with torch.no_grad(), _quiet():
                # Two images: torch.export treats 1 as a constant.
                write(model, random_images((2, *shape), normalised), unverified)
                run = read(unverified)
        except ImportError:
            raise
        except Exception as error:  # Exporters can raise anything.
            raise ExportError(
                f'{file_format} export failed ({type(error).__name__}): {_first_lines(error)}'
            ) from error
        checks = list(compare(model, run, shapes, tolerance, normalised))
        failed = [check for check in checks if not check.passed]
        if failed:
            worst = max(failed, key=lambda check: check.error / check.limit)
            raise ExportError(
                f'the {file_format} file is wrong in {len(failed)} of {len(checks)} comparisons '
                f'and was removed; the error of {worst.output} at {worst.shape} is '
                f'{worst.error:.2g}, at most {worst.limit:.2g} is allowed'
            )
        unverified.replace(path)
    finally:
        unverified.unlink(missing_ok=True)
    return checks


@torch.no_grad()
def compare(
    model: nn.Module,
    run: Run,
    shapes: Sequence[tuple[int, int, int]],
    tolerance: float,
    normalised: bool = False,
) -> Iterator[Check]:
    """Compare the outputs of a file and of the model on random images."""
    for shape in shapes:
        images = random_images(shape, normalised)
        expected = model(images)
        try:
            found = run(images)
        except Exception as error:  # The type depends on the runtime.
            raise ExportError(
                f'the file fails at {shape} ({type(error).__name__}): {_first_lines(error)}'
            ) from error
        if list(found) != list(expected):
            raise ExportError(f'the file returns {list(found)}, expected {list(expected)}')
        for name, tensor in expected.items():
            limit = tolerance if tensor.is_floating_point() else DIFFERENT_LABELS
            yield Check(shape, name, difference(found[name], tensor), limit)


def difference(found: Tensor, expected: Tensor) -> float:
    """See :attr:`Check.error`."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float('inf')
    if not expected.is_floating_point():
        return (found != expected).float().mean().item()
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    return error.nan_to_num(float('inf')).item()


def random_images(shape: tuple[int, int, int], normalised: bool = False) -> Tensor:
    """Pixels from 0 to 255, or normal noise, ``(N, 3, H, W)``, deterministic for a shape."""
    n, height, width = shape
    generator = torch.Generator().manual_seed(0)
    if normalised:
        return torch.randn(n, 3, height, width, generator=generator)
    return 255 * torch.rand(n, 3, height, width, generator=generator)


def _dynamic_shapes() -> tuple[dict[int, Dim]]:
    height, width = (Dim(name, min=MIN_SIZE) for name in ('height', 'width'))
    return ({0: Dim('batch', min=1), 2: height, 3: width},)


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401  (fails before the slow export)
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'ONNX export needs a package that is not installed ({error.name}): '
            'pip install onnx onnxscript onnxruntime'
        ) from error
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(),
        input_names=['images'],
        output_names=list(model(images)),
        verbose=False,
    )
    if program is None:
        raise ExportError('torch.onnx.export returned no program')
    program.model.doc_string = getattr(model, 'input_description', '')
    program.save(path, external_data=False)
    onnx.checker.check_model(path)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {'images': images.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run


def _write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    # Not strict: the outputs are a dict.
    torch.jit.trace(model, images, strict=False, check_trace=False).save(path)


def _write_torch_export(model: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic_shapes())
    with path.open('wb') as file:  # With a path, the suffix would have to be .pt2.
        torch.export.save(program, file)


def _read_torch_export(path: Path) -> Run:
    with path.open('rb') as file:
        return torch.export.load(file).module()


FORMATS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Run]]] = {
    'onnx': (_write_onnx, _read_onnx),
    'torchscript': (_write_torchscript, torch.jit.load),
    'torch-export': (_write_torch_export, _read_torch_export),
}
"""Writer and reader of each format."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about internals of the exporters and about checks of the input's shape."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _first_lines(error: Exception) -> str:
    return '\n'.join(str(error).strip().splitlines()[:12])
