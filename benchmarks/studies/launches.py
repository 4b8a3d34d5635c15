"""Kernels of one step by the profiler; on a CPU, operators."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.harness import Row, Unavailable, kernel_launches, operators
from benchmarks.studies import MODES, Picture, Plan, Step
from benchmarks.tasks import Network

QUESTION = "How many kernels does one step start?"
PICTURES = (
    Picture("Training step", "launches", "train", "kernels (CPU: operators)", "bars"),
    Picture("Evaluation", "launches", "eval", "kernels (CPU: operators)", "bars"),
)


def steps(plan: Plan) -> Iterator[Step]:
    for mode, training in MODES.items():
        yield Step((mode, None, None), partial(_measure, plan, training))


def _measure(plan: Plan, training: bool, point: Row) -> list[Row]:
    task = Network(plan.names(128), plan.network(), training, plan.device)
    rows = []
    for provider in ("windowed MLP", "dense", "distinct", *("dense, compiled", "dense, triton") * plan.cuda):
        try:
            run = task.make(provider).run
            count, unit = (len(kernel_launches(run, 1)), "kernels") if plan.cuda else (operators(run), "operators")
            rows.append(point.row(provider, "launches", unit, median=float(count)))
        except Unavailable as reason:
            rows.append(point.absent(provider, reason, "launches"))
    return rows
