"""Loss, gradients and an SGD step by batch size, building the batch's graph included where it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Work
from benchmarks.studies import RATE, Picture, Plan, Step
from benchmarks.tasks import Network

QUESTION = "A whole training step, update included: which graph for which batch of names?"
PICTURES = (Picture("Training step", "positions_per_second", "step", RATE),)
PROVIDERS = (
    "windowed MLP",
    "dense",
    "distinct",
    "distinct, graph built each step",
    "dense, triton",
    "distinct, triton",
)


def steps(plan: Plan) -> Iterator[Step]:
    for count in plan.pick((32, 128), (512, 32, 2048, 128, 8192)):
        task = partial(Updated, plan.names(count), plan.network(), True, plan.device)
        yield plan.step(("step", "names", count), task, PROVIDERS, "windowed MLP")


class Updated(Network):
    """With an update of all parameters after the gradients; the rate is 0, so every call does the same."""

    def make(self, provider: str) -> Work:
        work = super().make(provider)
        optimizer = torch.optim.SGD(work.parameters, lr=0.0)
        return replace(work, run=lambda: (work.run(), optimizer.step()))
