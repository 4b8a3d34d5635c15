"""The kernels beside PyTorch, forward, backward and in evaluation mode, where there is a CUDA device: `make bench`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.competitors import Stack
from benchmarks.conftest import Measure
from benchmarks.ladder import RUNGS
from benchmarks.studies import Plan

RUNG_COUNTS = {"forward": 4, "eval": 3, "backward": 3}


@pytest.mark.parametrize(("name", "rung"), [(name, i) for name, count in RUNG_COUNTS.items() for i in range(count)])
def bench_kernels(plan: Plan, measure: Measure, name: str, rung: int) -> None:
    batch, length = (64, 1024) if plan.cuda else (16, 128)
    competitors, expected = RUNGS[name](Stack(batch, length, 128, 3, torch.float32, True, plan.device))
    measure(competitors[rung], expected)
