"""Single pieces under pytest-benchmark, each checked before it is timed: `make bench`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import convwave as cw
from benchmarks import harness
from benchmarks.harness import Competitor, Results, Unavailable, numeric_flags
from benchmarks.studies import MODES, Plan
from benchmarks.studies.ladder import RUNGS
from benchmarks.studies.sample import generation
from benchmarks.tasks import Network, Stack

DEVICE = os.environ.get("CONVWAVE_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
PLAN = Plan(DEVICE, words=cw.load_words().words)
Pieces = tuple[list[Competitor], Results]


def network(training: bool) -> Pieces:
    """The network on 512 names."""
    task = Network(PLAN.names(512), PLAN.network(), training, DEVICE)
    found = [task.reference(), task.convolution("windowed", "windowed graph")]
    for compile, end in ((False, ""), (True, ", compiled")):
        found.append(task.windowed(f"windowed MLP{end}", compile))
        found += [task.convolution(kind, kind + end, compile=compile) for kind in ("dense", "distinct")]
    found += [task.convolution(kind, f"{kind}, triton", backend="triton") for kind in ("dense", "distinct")]
    return found, task.expected()


def stack_task(training: bool) -> Stack:
    batch, length = (64, 1024) if PLAN.cuda else (16, 128)
    return Stack(batch, length, 128, 3, torch.float32, training, DEVICE)


def stack(training: bool) -> Pieces:
    """Three levels of width 128."""
    task = stack_task(training)
    found = [task.convwave(backend, backend) for backend in ("eager", "triton")]
    for compile, end in ((False, ""), (True, ", compiled")):
        found += [task.matmul(f"matmul{end}", compile), task.conv1d(f"conv1d{end}", compile)]
    return found, task.expected()


GROUPS: dict[str, tuple[Callable[[], Pieces], int]] = {  # with the number of pieces of each
    **{f"{mode}, network": (partial(network, training), 10) for mode, training in MODES.items()},
    **{f"{mode}, stack": (partial(stack, training), 6) for mode, training in MODES.items()},
    "kernels, forward": (lambda: RUNGS["forward"](stack_task(True)), 4),
    "kernels, eval": (lambda: RUNGS["eval"](stack_task(True)), 3),
    "kernels, backward": (lambda: RUNGS["backward"](stack_task(True)), 3),
    "reading": (lambda: generation(PLAN, 1024), 3),
}


@pytest.mark.parametrize(("group", "i"), [(group, i) for group, (_, count) in GROUPS.items() for i in range(count)])
def bench_piece(group: str, i: int, benchmark: Any) -> None:
    competitors, expected = GROUPS[group][0]()
    with numeric_flags():
        try:
            work = competitors[i].make()
        except Unavailable as reason:
            pytest.skip(str(reason))
        benchmark.name = f"{group}, {competitors[i].provider}"
        truth = competitors[i].expected or expected
        assert harness.relative_error(work.result(), truth) <= harness.baseline_bound(competitors[i], truth)

        def run() -> None:
            work.run()
            harness.synchronize(DEVICE)

        benchmark(run)
        if PLAN.cuda:
            benchmark.extra_info["kernel_seconds"] = harness.quantiles(harness.kernel_seconds(work.run))["median"]
