"""Single pieces under pytest-benchmark, each checked before it is timed: `make bench`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import convwave as cw
from benchmarks.harness import (
    Competitor,
    Results,
    Unavailable,
    baseline_bound,
    kernel_seconds,
    numeric_flags,
    quantiles,
    relative_error,
    synchronize,
)
from benchmarks.studies import MODES, Plan
from benchmarks.studies.ladder import RUNGS
from benchmarks.studies.sample import generation
from benchmarks.tasks import Network, Stack

DEVICE = os.environ.get("CONVWAVE_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
PLAN = Plan(cw.load_words().words, DEVICE)
Piece = Callable[[], tuple[Competitor, Results]]


def pieces() -> dict[str, Piece]:
    """The network on 512 names, three levels of width 128, the kernels' rungs, reading 1,024 sequences."""

    def network(training: bool, pick: Callable[[Network], Competitor]) -> Piece:
        task = Network(PLAN.names(512), PLAN.network(), training, DEVICE)
        return lambda: (pick(task), task.expected())

    def stack(training: bool, levels: int = 3) -> Stack:
        batch, length = (64, 1024) if PLAN.cuda else (16, 128)
        return Stack(batch, length, 128, levels, torch.float32, training, DEVICE)

    def layers(training: bool, pick: Callable[[Stack], Competitor]) -> Piece:
        return lambda: (pick(task := stack(training)), task.expected())

    def rung(name: str, i: int) -> Piece:
        return lambda: (lambda found: (found[0][i], found[1]))(RUNGS[name](stack(True)))

    def reader(i: int) -> Piece:
        return lambda: (lambda found: (found[0][i], found[1]))(generation(PLAN, 1024))

    found: dict[str, Piece] = {}
    for mode, training in MODES.items():
        named = {"reference": Network.reference}
        for compile in (False, True):
            end = ", compiled" * compile
            named[f"windowed MLP{end}"] = lambda t, c=compile: t.windowed(compile=c)
            for kind in ("dense", "distinct", *(("windowed",) * (not compile))):
                named[f"{kind}{end}"] = lambda t, k=kind, c=compile: t.convolution(k, compile=c)
        for kind in ("dense", "distinct"):
            named[f"{kind}, triton"] = lambda t, k=kind: t.convolution(k, backend="triton")
        found |= {f"network, {mode}, {name}": network(training, pick) for name, pick in named.items()}
        stacks: dict[str, Callable[[Stack], Competitor]] = {
            "eager": lambda t: t.convwave("eager"),
            "triton": lambda t: t.convwave("triton", "triton"),
        }
        for compile in (False, True):
            end = ", compiled" * compile
            stacks[f"shifted matmuls{end}"] = lambda t, c=compile: t.matmul(compile=c)
            stacks[f"Conv1d{end}"] = lambda t, c=compile: t.conv1d(compile=c)
        found |= {f"stack, {mode}, {name}": layers(training, pick) for name, pick in stacks.items()}
    for name, count in {"forward": 4, "eval": 3, "backward": 3}.items():
        found |= {f"kernels, {name}, {i}": rung(name, i) for i in range(count)}
    return found | {f"reading, {name}": reader(i) for i, name in enumerate(("windowed MLP", "no cache", "cached"))}


PIECES = pieces()


@pytest.mark.parametrize("name", PIECES)
def bench_piece(name: str, benchmark: Any) -> None:
    competitor, expected = PIECES[name]()
    with numeric_flags():
        try:
            work = competitor.make()
        except Unavailable as reason:
            pytest.skip(str(reason))
        truth = expected if competitor.expected is None else competitor.expected
        assert relative_error(work.result(), truth) <= baseline_bound(competitor, truth)

        def run() -> None:
            work.run()
            synchronize(DEVICE)

        benchmark(run)
        if PLAN.cuda:
            benchmark.extra_info["kernel_seconds"] = quantiles(kernel_seconds(work.run))["median"]
