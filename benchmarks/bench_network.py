"""Training step and evaluation of the network on 512 names, every way there is: `make bench`."""

from __future__ import annotations

import pytest

from benchmarks.competitors import Network
from benchmarks.conftest import Measure
from benchmarks.studies import MODES, Plan


@pytest.fixture(scope="module", params=MODES)
def task(request: pytest.FixtureRequest, plan: Plan) -> Network:
    return Network(plan.names(512), plan.network(), MODES[request.param], plan.device)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def bench_windowed_mlp(task: Network, measure: Measure, compile: bool) -> None:
    measure(task.windowed(compile=compile), task.expected())


def bench_the_posts_own_classes(task: Network, measure: Measure) -> None:
    measure(task.reference(), task.expected())


@pytest.mark.parametrize("kind", ["windowed", "dense", "distinct"])
def bench_graph(task: Network, measure: Measure, kind: str) -> None:
    measure(task.convolution(kind), task.expected())


@pytest.mark.parametrize("kind", ["dense", "distinct"])
def bench_graph_compiled(task: Network, measure: Measure, kind: str) -> None:
    measure(task.convolution(kind, compile=True), task.expected())


@pytest.mark.parametrize("kind", ["dense", "distinct"])
def bench_graph_triton(task: Network, measure: Measure, kind: str) -> None:
    measure(task.convolution(kind, backend="triton"), task.expected())
