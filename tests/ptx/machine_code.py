"""What ptxas makes of wgmma: run by `python -m tests.ptx`, where triton brings nvdisasm; see `sass.py`."""

from __future__ import annotations

import pytest
import torch
from convwave.kernels import configs
from convwave.kernels.forward import conv_forward

from benchmarks.resources import compile_launch, recording, stack_launches  # the whole way to a cubin

from . import sass
from .cases import AFFECTED, on_sm_90, training
from .launch import TARGETS

pytestmark = pytest.mark.skipif(sass.tool() is None, reason="this triton brings no nvdisasm")


@on_sm_90
def test_the_machine_code_has_the_hazard_only_where_it_is_pipelined() -> None:
    """A's registers are written in the loop while HGMMA reads them."""
    problem, multiplied = training("bf16", 64)
    level, rows = problem.levels[1], problem.rows[1]
    below = (problem.levels[0], torch.rand(5, 64))
    found = {}
    with recording("sm_90") as launches:
        for stages in (1, 2):
            launch = configs.Launch(64, 32, 64, stages=stages)
            conv_forward(problem.x.contiguous(), level, rows, below=below, precision=multiplied, launch=launch)
    for stages, recorded in zip((1, 2), launches, strict=True):
        text = sass.disassemble(compile_launch(recorded, TARGETS["sm_90"]).asm["cubin"])
        assert "HGMMA" in text
        found[stages] = sass.overwrites(text)
    assert found[1] == []
    assert bool(found[2]) == AFFECTED, found[2][:3]


@on_sm_90
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "tf32x3"])
@pytest.mark.parametrize("width", [68, 128])
def test_no_kernel_that_is_launched_has_the_hazard(width: int, precision: str) -> None:
    """As shipped: every kernel of a stack that multiplies in HGMMA."""
    seen = set()
    for launch in stack_launches(width, width, precision, "sm_90"):
        key = (launch.kernel, *(getattr(value, "dtype", value) for value in launch.arguments.values()))
        if key in seen or not launch.kernel.fn.__name__.startswith("conv"):
            continue
        seen.add(key)
        text = sass.disassemble(compile_launch(launch, TARGETS["sm_90"]).asm["cubin"])
        assert sass.overwrites(text) == [], launch.kernel.fn.__name__
    assert seen
