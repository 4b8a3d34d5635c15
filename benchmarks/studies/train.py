"""Loss, gradients and an SGD step by batch size, building the batch's graph included where it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.harness import Competitor, Row, Work
from benchmarks.studies import RATE, Picture, Plan, Step
from benchmarks.studies.names import rows, triton
from benchmarks.tasks import Network


def steps(plan: Plan) -> Iterator[Step]:
    for count in (32, 128) if plan.quick else (512, 32, 2048, 128, 8192):
        yield Step(("step", "names", count), _measure, (plan, count))


def _measure(plan: Plan, count: int, point: Row) -> list[Row]:
    task = Network(plan.names(count), plan.network(), True, plan.device)
    competitors = [
        task.windowed(),
        task.convolution("dense"),
        task.convolution("distinct"),
        task.convolution("distinct", "distinct, graph built each step", rebuilt=True),
        *triton(plan, task),
    ]
    return rows(task, [_with_sgd(competitor) for competitor in competitors], point, plan)


def _with_sgd(competitor: Competitor) -> Competitor:
    """The same with an update of all parameters after the gradients; the rate is 0, so every call does the same."""

    def make() -> Work:
        work = competitor.make()
        optimizer = torch.optim.SGD(work.parameters, lr=0.0)

        def step() -> None:
            work.run()
            optimizer.step()

        return work._replace(run=step)

    return replace(competitor, make=make)


QUESTION = "A whole training step, update included: which graph for which batch of names?"
PICTURES = (Picture("Training step", "positions_per_second", "step", RATE),)
