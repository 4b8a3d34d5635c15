"""Single pieces under pytest-benchmark, each checked before it is timed: `make bench`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from operator import methodcaller
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
PLAN = Plan(DEVICE, words=cw.load_words().words)
Pick = Callable[[Any], Competitor]


def stack(training: bool) -> Stack:
    batch, length = (64, 1024) if PLAN.cuda else (16, 128)
    return Stack(batch, length, 128, 3, torch.float32, training, DEVICE)


def of_task(make: Callable[[bool], Any], pick: Pick, training: bool) -> tuple[Competitor, Results]:
    task = make(training)
    return pick(task), task.expected()


def of_several(make: Callable[[], tuple[list[Competitor], Results]], i: int) -> tuple[Competitor, Results]:
    competitors, expected = make()
    return competitors[i], expected


def pieces() -> dict[str, Callable[[], tuple[Competitor, Results]]]:
    """The network on 512 names, three levels of width 128, the kernels' rungs, reading 1,024 sequences."""
    networks: dict[str, Pick] = {
        "the post's classes": Network.reference,
        "windowed graph": methodcaller("convolution", "windowed"),
    }
    stacks: dict[str, Pick] = {name: methodcaller("convwave", name, name) for name in ("eager", "triton")}
    for compile, end in ((False, ""), (True, ", compiled")):
        networks[f"windowed MLP{end}"] = methodcaller("windowed", compile=compile)
        stacks |= {f"{name}{end}": methodcaller(name, compile=compile) for name in ("matmul", "conv1d")}
        networks |= {f"{k}{end}": methodcaller("convolution", k, compile=compile) for k in ("dense", "distinct")}
    networks |= {f"{k}, triton": methodcaller("convolution", k, backend="triton") for k in ("dense", "distinct")}

    def network(training: bool) -> Network:
        return Network(PLAN.names(512), PLAN.network(), training, DEVICE)

    found: dict[str, Callable[[], tuple[Competitor, Results]]] = {
        f"{mode}, {name}": partial(of_task, make, pick, training)
        for make, picks in ((network, networks), (stack, stacks))
        for mode, training in MODES.items()
        for name, pick in picks.items()
    }
    for name, count in {"forward": 4, "eval": 3, "backward": 3}.items():
        rungs = partial(lambda name: RUNGS[name](stack(True)), name)
        found |= {f"kernels, {name}, {i}": partial(of_several, rungs, i) for i in range(count)}
    readers = partial(generation, PLAN, 1024)
    names = ("windowed MLP", "no cache", "cached")
    return found | {f"reading, {name}": partial(of_several, readers, i) for i, name in enumerate(names)}


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
