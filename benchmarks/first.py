"""What a GPU is asked first: a level forward and backward against float64, and whether its bits are always the same.

    python -m benchmarks.first                    on the CUDA device
    python -m benchmarks.first --emulate sm_90    a small version on the interpreter of tests/ptx, to try this script

For every width, precision and number of rows, which are gathered in random order: the error of z, whether one stage of
a pipeline gives the bits of as many as the launcher takes, and how many of thousands of launches give other bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import torch
from convwave.kernels import configs
from convwave.kernels.backward import conv_backward
from convwave.kernels.forward import conv_forward
from torch import Tensor

from convwave.data.graph import Rows, find_consumers
from convwave.ops import naive
from convwave.ops.level import Level

# what operands, and bfloat16 and float16 results, are rounded to; three TF32 products leave out the smallest
UNIT = {"ieee": 2.0**-24, "tf32x3": 2.0**-22, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(width: int, rows: int, name: str, device: str, repeats: int) -> bool:
    """One configuration, with a line on standard output. Whether all is right."""
    dtype = DTYPES.get(name, torch.float32)
    precision = name if dtype == torch.float32 else "ieee"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    taps = torch.randint(0, rows, (2, rows), generator=generator).to(device)
    read = Rows(taps, consumers=find_consumers(taps, rows))
    below, level = (
        Level(
            normal(width, width, 2) * (2 * width) ** -0.5, 1 + normal(width), normal(width), None, None, training=True
        )
        for _ in range(2)
    )
    x, g, below_stats = normal(rows, width), normal(rows, width), normal(5, width, dtype=torch.float32)
    sums = normal(4, width, dtype=torch.float32) / rows
    launches = (
        configs.forward_launch(width, width, dtype, precision, x.device),
        configs.backward_launch(width, width, 2, dtype, precision, x.device),
    )

    def run(stages: int) -> list[Tensor]:
        forward, backward = (replace(launch, stages=min(stages, launch.stages)) for launch in launches)
        given = {"below": (below, below_stats), "precision": precision}
        z, stats = conv_forward(x, level, read, launch=forward, **given)  # type: ignore[arg-type]
        back = conv_backward(g, z, level, stats, sums, x, read, launch=backward, **given)  # type: ignore[arg-type]
        assert back.dx is not None
        assert back.sums is not None
        return [z, stats, back.dx, back.sums, back.dweight]

    first, one = run(2), run(1)
    mean, _, scale, _, _ = below_stats.double()
    truth = naive.conv(
        torch.tanh((x.double() - mean) * scale + below.beta.double()).to(dtype).double(), level.weight.double(), taps
    )
    error = float((first[0].double() - truth).norm() / truth.norm())
    different = torch.zeros((), dtype=torch.int64, device=device)
    begun = time.perf_counter()
    for _ in range(repeats):
        different += torch.stack([(a != b).any() for a, b in zip(run(2), first, strict=True)]).any()
    same = all(torch.equal(a, b) for a, b in zip(one, first, strict=True))
    right = same and not int(different) and error <= 4 * (UNIT[name] + 2.0**-24 * (2 * width) ** 0.5)
    line = (
        f"{width:4} channels {name:6} {rows:7} rows: error {error:.1e}, the same bits in one stage: {same}, "
        f"other bits in {int(different)} of {repeats} ({time.perf_counter() - begun:.1f} s)"
    )
    print(line if right else f"{line}  WRONG", flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first", description=__doc__.split("\n")[0])
    parser.add_argument("--emulate", choices=("sm_80", "sm_90"), help="on the interpreter, without a GPU")
    args = parser.parse_args()
    emulating, device = nullcontext(), "cuda"
    widths, rows, repeats = (68, 128, 512), (150, 30_000), 1500
    if args.emulate:
        from tests.ptx.launch import on_emulator

        emulating, device = on_emulator(args.emulate), "cpu"  # type: ignore[assignment]
        widths, rows, repeats = (24,), (150,), 1  # type: ignore[assignment]
    with emulating:
        right = [check(c, n, name, device, repeats) for c, n, name in product(widths, rows, UNIT)]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
