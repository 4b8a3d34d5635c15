"""Which graph to evaluate on, by one rule, known beforehand: the graph with the fewest rows.

The rows are counted on the graphs: of every level they are N * 2^(L-l-1) in a windowed graph, N in a dense one, and in
a distinct one as many as the text has different contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

import convwave as cw
from benchmarks.harness import Row
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import BUILD, Network

QUESTION = "Which graph wins: always the one with the fewest rows?"
PICTURES = (Picture("Time lost by the predicted choice", "regret", "train", "time lost / time of the fastest", "bars"),)
TEXTS = (("names", 32), ("names", 2048), ("document", 256), ("document", 8192), ("syllables", 64), ("syllables", 2048))


def text(plan: Plan, kind: str, size: int) -> cw.Packed:
    """Names, one long document of this many positions, or words of few syllables, which repeat themselves."""
    if kind != "syllables":
        return plan.names(size) if kind == "names" else plan.document(size)
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(2, 12, (size,), generator=generator).tolist()
    return cw.pack_ids([torch.randint(1, 4, (n,), generator=generator).tolist() for n in lengths])


def steps(plan: Plan) -> Iterator[Step]:
    grid = list(product(TEXTS, (1, 3, 5), (16, 128)))
    grid = plan.pick(grid[::9], grid)
    short = replace(plan, seconds=min(plan.seconds, 2.0))
    for i in torch.randperm(len(grid), generator=torch.Generator().manual_seed(0)).tolist():
        (kind, size), levels, width = grid[i]  # drawn, so that a run cut short has seen some of each kind
        task = partial(Network, text(plan, kind, size), plan.network(n_hidden=width, levels=levels), True, plan.device)
        name = f"{kind}, {size:,}, context {2**levels}, width {width}"
        yield short.step(("train", "scenario", name), task, BUILD, "", after=_predicted)


def _predicted(task: Network, point: Row, rows: list[Row]) -> list[Row]:
    """Whether the prediction is right, and what it costs where it is wrong."""
    measured = {row["provider"]: row["median"] for row in rows if row["metric"] == "seconds" and row["median"]}
    if len(measured) < len(BUILD):
        return [*rows, point.absent("prediction", "not every graph was measured", "right")]
    nodes = {kind: build(task.packed, task.model.levels).num_nodes for kind, build in BUILD.items()}
    chosen, best = (min(BUILD, key=values.__getitem__) for values in (nodes, measured))
    note, lost = f"predicted {chosen}, fastest {best}", measured[chosen] / measured[best] - 1
    right = point.row("prediction", "right", "", median=float(chosen == best), note=note)
    return [*rows, right, point.row("prediction", "regret", "of the fastest", median=lost, note=note)]
