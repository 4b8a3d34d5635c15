"""Width 128, contexts from 8 tokens: windows against the convolution, with the ratio of their FLOP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.harness import Row
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import Network

QUESTION = "How does the gain of the convolution over windows grow with the context?"
PICTURES = (
    Picture("Training: speed-up over the windowed MLP", "speedup", "train", "times faster"),
    Picture("Evaluation: speed-up over the windowed MLP", "speedup", "eval", "times faster"),
    Picture("Training: rate", "positions_per_second", "train", RATE),
    Picture("Training: peak memory", "bytes_per_position", "train", "bytes per position"),
)


def steps(plan: Plan) -> Iterator[Step]:
    """The convolution over one long text; the windowed MLP over its last windows, as many as `nodes` allow."""
    positions, nodes, width = plan.pick((256, 2**12, 32), (4096, 2**18, 128), (4096, 2**21, 128))
    for levels in plan.pick((3, 5, 7), (10, 3, 6, 8, 4, 5, 7, 9, 11, 12)):
        for mode, training in MODES.items():
            model, windows = plan.network(width, width, levels), min(positions, nodes // 2**levels)
            task = partial(Network, plan.document(positions), model, training, plan.device, windows)
            providers = ("windowed MLP", "dense", "dense, triton")
            yield plan.step((mode, "context", 2**levels), task, providers, "windowed MLP", after=_with_flop)


def _with_flop(task: Network, point: Row, rows: list[Row]) -> list[Row]:
    levels = task.model.levels
    ratio = {"median": (2**levels - 1) / levels, "note": f"(2^{levels} - 1) / {levels}"}
    note = f"{task.positions} positions, {task.windows} windows, width {task.model.head.in_features}"
    return [
        *(Row(row | {"note": row["note"] or note}) for row in rows),
        point.row("FLOP ratio", "speedup", "x", **ratio),
    ]
