"""The kernels beside PyTorch, forward, backward and in evaluation mode, where there is a CUDA device: `make bench`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.competitors import Stack
from benchmarks.conftest import Measure
from benchmarks.ladder import RUNGS
from benchmarks.studies import Plan


@pytest.mark.parametrize("name", ["forward", "eval", "backward"])
@pytest.mark.parametrize("rung", range(4))
def bench_kernels(plan: Plan, measure: Measure, name: str, rung: int) -> None:
    batch, length = (64, 1024) if plan.cuda else (16, 128)
    competitors, expected = RUNGS[name](Stack(batch, length, 128, 3, torch.float32, True, plan.device))
    if rung >= len(competitors):
        pytest.skip("no such rung")
    measure(competitors[rung], expected)
