"""Width 128, contexts from 8 tokens: windows against the convolution, with the ratio of their FLOP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness import Row
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.studies.names import rows, triton
from benchmarks.tasks import Network


def steps(plan: Plan) -> Iterator[Step]:
    for levels in (3, 5, 7) if plan.quick else (10, 3, 6, 8, 4, 5, 7, 9, 11, 12):
        for mode, training in MODES.items():
            yield Step((mode, "context", 2**levels), _measure, (plan, levels, training))


def _measure(plan: Plan, levels: int, training: bool, point: Row) -> list[Row]:
    """The convolution over one long text; the windowed MLP over its last windows, as many as `nodes` allow."""
    positions, nodes, width = (256, 2**12, 32) if plan.quick else (4096, 2**21 if plan.cuda else 2**18, 128)
    windows = min(positions, nodes // 2**levels)
    task = Network(plan.document(positions), plan.network(width, width, levels), training, plan.device, windows)
    found = rows(task, [task.windowed(), task.convolution("dense"), *triton(plan, task, ("dense",))], point, plan)
    note = f"{positions} positions, {windows} windows, width {width}"
    ratio = {"median": (2**levels - 1) / levels, "note": f"(2^{levels} - 1) / {levels}"}
    return [*(replace(row, note=row.note or note) for row in found), point.row("FLOP ratio", "speedup", "x", **ratio)]


QUESTION = "How does the gain of the convolution over windows grow with the context?"
PICTURES = (
    Picture("Training: speed-up over the windowed MLP", "speedup", "train", "times faster"),
    Picture("Evaluation: speed-up over the windowed MLP", "speedup", "eval", "times faster"),
    Picture("Training: rate", "positions_per_second", "train", RATE),
    Picture("Training: peak memory", "bytes_per_position", "train", "bytes per position"),
)
