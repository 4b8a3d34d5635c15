"""Kernels of one step by the profiler; on a CPU, operators."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row, Unavailable, kernel_launches, operators
from benchmarks.studies import MODES, Picture, Plan, Step
from benchmarks.studies.names import triton
from benchmarks.tasks import Network


def steps(plan: Plan) -> Iterator[Step]:
    for mode, training in MODES.items():
        yield Step((mode, None, None), _measure, (plan, training))


def _measure(plan: Plan, training: bool, point: Row) -> list[Row]:
    task = Network(plan.names(128), plan.network(), training, plan.device)
    competitors = [task.windowed(), task.convolution("dense"), task.convolution("distinct")]
    if plan.cuda:
        competitors += [task.convolution("dense", "dense, compiled", compile=True), *triton(plan, task, ("dense",))]
    rows = []
    for competitor in competitors:
        try:
            run = competitor.make().run
            count, unit = (len(kernel_launches(run, 1)), "kernels") if plan.cuda else (operators(run), "operators")
            rows.append(point.row(competitor.provider, "launches", unit, median=float(count)))
        except Unavailable as reason:
            rows.append(point.absent(competitor.provider, reason, "launches"))
    return rows


QUESTION = "How many kernels does one step start?"
PICTURES = (
    Picture("Training step", "launches", "train", "kernels (CPU: operators)", "bars"),
    Picture("Evaluation", "launches", "eval", "kernels (CPU: operators)", "bars"),
)
