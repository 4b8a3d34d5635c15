"""Names at the post's size, every way to evaluate the network."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Competitor, Row, compare, numeric_flags
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import MAX_AUTOTUNE, Network


def steps(plan: Plan) -> Iterator[Step]:
    for count in (128,) if plan.quick else (512, 4096):
        for mode, training in MODES.items():
            yield Step((mode, "names", count), _measure, (plan, count, training))


def _measure(plan: Plan, count: int, training: bool, point: Row) -> list[Row]:
    task = Network(plan.names(count), plan.network(), training, plan.device)
    competitors = [
        task.windowed(),
        task.reference(),
        task.convolution("windowed", "windowed graph"),
        task.convolution("dense"),
        task.convolution("distinct"),
        task.padded_conv1d("Conv1d, padded names"),
        *triton(plan, task),
    ]
    if not plan.quick and count == 512:
        competitors += [
            task.windowed("windowed MLP, compiled", compile=True),
            task.convolution("dense", "dense, compiled", compile=True),
            task.padded_conv1d("Conv1d, padded names, compiled", compile=True),
        ]
        if plan.cuda:
            competitors.append(task.windowed("windowed MLP, max-autotune", MAX_AUTOTUNE))
    return rows(task, competitors, point, plan)


def triton(plan: Plan, task: Network, kinds: tuple[str, ...] = ("dense", "distinct")) -> list[Competitor]:
    """The fused kernels, on a GPU."""
    return [task.convolution(kind, f"{kind}, triton", backend="triton") for kind in kinds if plan.cuda]


def rows(task: Network, competitors: list[Competitor], point: Row, plan: Plan) -> list[Row]:
    with numeric_flags():
        return compare(competitors, task.expected(), point, plan, positions=task.positions, baseline="windowed MLP")


QUESTION = "Names at the post's size: which way of evaluating the network is fastest?"
PICTURES = (
    Picture("Training step", "positions_per_second", "train", RATE, "bars"),
    Picture("Evaluation", "positions_per_second", "eval", RATE, "bars"),
)
