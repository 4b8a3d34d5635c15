"""Names at the post's size, every way to evaluate the network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import Network

QUESTION = "Names at the post's size: which way of evaluating the network is fastest?"
PICTURES = (
    Picture("Training step", "positions_per_second", "train", RATE, "bars"),
    Picture("Evaluation", "positions_per_second", "eval", RATE, "bars"),
)
PROVIDERS = (
    "windowed MLP",
    "the post's own classes",
    "windowed graph",
    "dense",
    "distinct",
    "padded Conv1d",
    "dense, triton",
    "distinct, triton",
)
COMPILED = ("windowed MLP, compiled", "dense, compiled", "padded Conv1d, compiled", "windowed MLP, max-autotune")


def steps(plan: Plan) -> Iterator[Step]:
    for count in plan.pick((128,), (512, 4096)):
        for mode, training in MODES.items():
            task = partial(Network, plan.names(count), plan.network(), training, plan.device)
            yield plan.step((mode, "names", count), task, PROVIDERS + COMPILED * (count == 512), "windowed MLP")
