"""Three levels on sequences of one length, beside torch.nn: `make bench`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.competitors import Stack
from benchmarks.conftest import Measure
from benchmarks.studies import MODES, Plan


@pytest.fixture(scope="module", params=MODES)
def task(request: pytest.FixtureRequest, plan: Plan) -> Stack:
    batch, length = (64, 1024) if plan.cuda else (16, 128)
    return Stack(batch, length, 128, 3, torch.float32, MODES[request.param], plan.device)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def bench_convwave(task: Stack, measure: Measure, backend: str) -> None:
    measure(task.convwave("convwave", backend), task.expected())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def bench_two_shifted_matmuls(task: Stack, measure: Measure, compile: bool) -> None:
    measure(task.matmul(compile=compile), task.expected())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def bench_conv1d_batchnorm_tanh(task: Stack, measure: Measure, compile: bool) -> None:
    measure(task.conv1d(compile=compile), task.expected())
