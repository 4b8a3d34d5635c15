"""For `make bench`: a fixture that checks a competitor before pytest-benchmark times it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import convwave as cw
from benchmarks.harness import (
    Competitor,
    Unavailable,
    capture,
    kernel_seconds,
    numeric_flags,
    quantiles,
    relative_error,
    sample,
    synchronize,
    yardstick_bound,
)
from benchmarks.studies import Plan

Measure = Callable[[Competitor, Mapping[str, Tensor]], None]


@pytest.fixture(scope="session")
def plan() -> Plan:
    """Names and networks, on CUDA where there is one, or on the device that $CONVWAVE_DEVICE names."""
    device = os.environ.get("CONVWAVE_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    return Plan(cw.load_words().words, device)


@pytest.fixture
def measure(benchmark: Any, plan: Plan) -> Measure:
    """Check a competitor's result against float64, then time it; on CUDA with graph replay and kernel time beside."""

    def check_and_time(competitor: Competitor, expected: Mapping[str, Tensor]) -> None:
        with numeric_flags():
            try:
                work = competitor.make()
            except Unavailable as reason:
                pytest.skip(str(reason))
            truth = expected if competitor.expected is None else competitor.expected
            assert relative_error(work.result(), truth) <= yardstick_bound(competitor, truth)

            def run() -> None:
                work.run()
                synchronize(plan.device)

            benchmark(run)
            if plan.cuda:
                benchmark.extra_info["kernel_seconds"] = quantiles(kernel_seconds(work.run))["median"]
                try:
                    replay = capture(work.run)
                except Unavailable as reason:
                    benchmark.extra_info["graph_seconds"] = str(reason)
                else:
                    samples = [sample(replay, 10, plan.device) for _ in range(15)]
                    benchmark.extra_info["graph_seconds"] = quantiles(samples)["median"]

    return check_and_time
