"""Compile the Triton kernels for GPUs that need not be there; print what each thread and SM holds.

    python tools/compile_kernels.py --capability 90 --channels 256 1280

Nothing is run and nothing measured: registers, spills and the width of memory accesses are what
the assembler says, occupancy is arithmetic on them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Shared memory of an SM in KB, and its warps. An SM has 65,536 registers and at most 32 programs.
SMS = {80: (164, 64), 86: (100, 48), 89: (100, 48), 90: (228, 64), 100: (228, 64), 120: (100, 48)}
# Super token size and channels of stages that sample, of SViT-S and SViT-B.
SAMPLED = [(8, 64), (4, 128), (8, 96), (4, 192), (2, 320), (2, 384)]


def compiled_kernels(
    capability: int, channels: list[int], dtypes: list[torch.dtype], kernels: list[str]
) -> Iterator[tuple[str, Any]]:
    """A label and the kernel, for each that the backend ``triton`` launches."""
    os.environ.pop('TRITON_INTERPRET', None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from mmsvit.ops import triton_backend, triton_conv_ffn

    # Triton asks a driver for the GPU, and compiles for what it is told.
    absent = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget('cuda', capability, 32),
    )
    driver.set_active(absent)
    run, found = JITFunction.run, {}

    def compile_only(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kinds = [k for k in ('GELU', 'SUM', 'ASSOCIATE', 'STORE', 'DIVIDE') if options.get(k)]
        name = ' '.join([self.fn.__name__.strip('_'), *(kind.lower() for kind in kinds)])
        found.setdefault(kernel.hash, (f'{name} | {case}', kernel))

    JITFunction.run = compile_only
    try:
        for dtype in dtypes:
            name = str(dtype).removeprefix('torch.')
            for c in channels if 'ffn' in kernels else []:
                case = f'{c}, {name}'
                x, kernel, bias = (
                    torch.empty(2, 20, 28, c, dtype=dtype), torch.empty(c, 1, 3, 3), torch.empty(c)
                )  # fmt: skip
                for b1 in (bias, None):
                    triton_conv_ffn._convolve(x, b1, kernel, bias)
                    triton_conv_ffn._convolve_backward(x, x, b1, kernel, True)
            for cell, c in SAMPLED if 'sampling' in kernels else []:
                case = f'{c} in cells of {cell}x{cell}, {name}'
                x = torch.empty(2, 40, 56, c, dtype=dtype)
                supers, association, mass = triton_backend.sample(x, (cell, cell), 1)
                triton_backend.distribute(association, supers, None, (cell, cell), (40, 56))
                triton_backend.distribute(association, supers, mass, (cell, cell), (40, 56))
                triton_backend.aggregate(association, x, None, (cell, cell))
    finally:
        JITFunction.run = run
    yield from found.values()


def describe(kernel: Any, capability: int) -> dict[str, Any]:
    """Registers and bytes spilled a thread, shared memory, widest access, occupancy of an SM."""
    import triton

    program = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(kernel.asm['cubin'])
        file.flush()
        usage, code = (
            subprocess.run([program, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ('-res-usage', '-sass')
        )
    registers, stack = (
        int(re.search(rf'{key}:(\d+)', usage.stdout)[1])  # type: ignore[index]
        for key in ('REG', 'STACK')
    )
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    of_warp = -(-registers * 32 // 256) * 256  # Registers are given out by 256.
    memory, most_warps = SMS[capability]
    programs = min(
        65536 // (of_warp * warps), memory * 1024 // (shared + 1024), most_warps // warps, 32
    )
    widths = [
        int(width or 32)
        for width in re.findall(r'LDG(?:STS)?\.E\S*?(?:\.(64|128)\S*)? ', code.stdout)
    ]
    return dict(
        registers=registers,
        spilled=stack,
        shared=shared,
        bits=max(widths, default=0),
        occupancy=programs * warps / most_warps,
    )


def parse_args() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--capability', type=int, choices=SMS, default=90)
    parser.add_argument('--channels', type=int, nargs='+', default=[256])
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16', 'float32'])
    parser.add_argument(
        '--kernels', nargs='+', choices=['ffn', 'sampling'], default=['ffn', 'sampling']
    )
    return parser.parse_args()


def main() -> None:
    """Print a table."""
    args = parse_args()
    print('| kernel | channels, dtype | registers | spilled | shared memory | access | occupancy |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    dtypes = [getattr(torch, name) for name in args.dtypes]
    for label, kernel in compiled_kernels(args.capability, args.channels, dtypes, args.kernels):
        found = describe(kernel, args.capability)
        print(
            f'| {label} | {found["registers"]} | {found["spilled"]} B | {found["shared"]} B '
            f'| {found["bits"]} bit | {found["occupancy"]:.0%} |',
            flush=True,
        )


if __name__ == '__main__':
    main()
