"""Single pieces under pytest-benchmark, each checked before it is timed: `make bench`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import convwave as cw
from benchmarks import harness
from benchmarks.studies import MODES, Plan, ladder, names, sample, width
from benchmarks.tasks import Network, Stack

DEVICE = os.environ.get("CONVWAVE_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
PLAN = Plan(DEVICE, words=cw.load_words().words)
BATCH, LENGTH = PLAN.pick((), (16, 128), (64, 1024))


def pieces() -> Iterator[tuple[str, Any, str]]:
    """Group, what makes its task, provider."""
    for mode, training in MODES.items():
        for provider in names.PROVIDERS + names.COMPILED:
            yield f"{mode}, network", lambda t=training: Network(PLAN.names(512), PLAN.network(), t, DEVICE), provider
        for provider in (*width.PROVIDERS, *width.COMPILED):
            yield f"{mode}, stack", lambda t=training: Stack(BATCH, LENGTH, 128, 3, torch.float32, t, DEVICE), provider
    for name in ("forward", "eval", "backward"):
        for provider in ("PyTorch", *ladder.RUNGS[name][1]):
            yield (
                f"kernels, {name}",
                lambda n=name: ladder.Ladder(n, BATCH, LENGTH, 128, 3, torch.float32, True, DEVICE),
                provider,
            )
    for provider in sample.PROVIDERS:
        yield "reading", lambda: sample.Reading(PLAN, 1024), provider


@pytest.mark.parametrize(
    ("group", "task", "provider"), list(pieces()), ids=lambda value: value if isinstance(value, str) else ""
)
def bench_piece(group: str, task: Any, provider: str, benchmark: Any) -> None:
    made, expected = task(), task().expected()
    with harness.numeric_flags():
        try:
            work = made.make(provider)
        except harness.Unavailable as reason:
            pytest.skip(str(reason))
        benchmark.name = f"{group}, {provider}"
        truth = work.expected or expected
        assert harness.relative_error(work.result(), truth) <= harness.baseline_bound(work, truth)

        def run() -> None:
            work.run()
            harness.synchronize(DEVICE)

        benchmark(run)
        if PLAN.cuda:
            benchmark.extra_info["kernel_seconds"] = harness.kernel_seconds(work.run)
