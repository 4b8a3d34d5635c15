"""Which graph to evaluate on, predicted from three things: the context, the lengths of the words, the width.

The model of cost has three constants, measured in the same run on networks other than those it is tried on:

    seconds = overhead * (levels + 1) + element * elements + product * flop

Elements and FLOP follow from the number of rows of every level. A windowed graph has N * 2^(L-l-1) of them, a dense
one N. How many distinct contexts a text has cannot be read off its lengths; the estimate draws n_s contexts with s free
letters out of `a^s` equally likely ones, where `a`, the number of letters that would be as uncertain, is exp(entropy)
of the text's letters. Real text repeats itself more than that, so distinct graphs come out better than predicted.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch

import convwave as cw
from benchmarks.harness import Row, compare, numeric_flags
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Network

STRATEGIES = ("windowed", "dense", "distinct")
UNITS = {"overhead": "s per level", "element": "s per element", "product": "s per FLOP"}  # of the constants
Terms = tuple[float, float, float]  # levels + 1, elements, FLOP of a training step; or what each of them costs


def predicted(constants: Terms, demand: Terms) -> float:
    """Seconds of a step."""
    return sum(cost * count for cost, count in zip(constants, demand, strict=True))


def rows_of(strategy: str, levels: int, packed: cw.Packed) -> list[float]:
    """Rows of the tokens and of every level above."""
    if strategy == "windowed":
        return [len(packed) * 2.0 ** (levels - level) for level in range(levels + 1)]
    if strategy == "dense":
        return [float(len(packed))] * (levels + 1)
    shares = torch.bincount(packed.targets).double() / len(packed)
    letters = math.exp(float(torch.special.entr(shares).sum()))
    lengths = Counter(packed.cu_seqlens.diff().tolist())
    return [_distinct(2**level, lengths, letters) for level in range(levels + 1)]


def _distinct(context: int, lengths: Mapping[int, int], letters: float) -> float:
    """Expected number of distinct contexts: position t has read min(t, context) free letters."""
    draws: Counter[int] = Counter()
    for length, count in lengths.items():
        draws.update(dict.fromkeys(range(min(length, context)), count))
        draws[context] += count * max(length - context, 0)
    total = 0.0
    for free, n in draws.items():
        contexts = max(letters, 1.0) ** min(free, 100)  # from there on no two draws agree
        total += contexts * -math.expm1(-n / contexts)
    return total


def demand(rows: Sequence[float], n_embd: int, width: int, vocabulary: int) -> Terms:
    """What a training step of pairwise levels on these rows has to do."""
    channels = [n_embd, *[width] * (len(rows) - 1)]
    elements = rows[0] * n_embd + rows[-1] * vocabulary
    flop = 6.0 * rows[-1] * width * vocabulary
    for below, above, C, H in zip(rows, rows[1:], channels, channels[1:], strict=False):
        elements += above * (2 * C + H)
        shared = below * 2 < above and 2 * C >= H  # multiply first, gather after
        flop += 12.0 * (below if shared else above) * C * H
    return len(rows), elements, flop


def fit(demands: Sequence[Terms], seconds: Sequence[float]) -> Terms:
    """Constants >= 0 with the smallest squared relative errors."""
    matrix = torch.tensor(demands, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    ones = torch.ones(len(demands), dtype=torch.float64)
    used, found = torch.arange(3), torch.full((3,), -1.0)
    while found.min() < 0:
        found = torch.linalg.lstsq(matrix[:, used], ones, driver="gelsd").solution
        used = used[found >= 0]
    values = dict(zip(used.tolist(), found.tolist(), strict=True))
    return values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)


def text(plan: Plan, kind: str, size: int) -> cw.Packed:
    """Names, one long document of this many positions, or words of few syllables, which repeat themselves."""
    if kind != "syllables":
        return plan.names(size) if kind == "names" else plan.document(size)
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(2, 12, (size,), generator=generator).tolist()
    return cw.pack_ids([torch.randint(1, 4, (n,), generator=generator).tolist() for n in lengths])


def steps(plan: Plan) -> Iterator[Step]:
    """The constants, then how often the prediction is right and what it costs where it is wrong."""
    constants: list[Terms] = []
    yield Step(("calibration", "scenario", None), functools.partial(_calibrate, plan, constants))
    texts = [("names", 32), ("names", 2048), ("document", 256), ("document", 8192), ("syllables", 64)]
    grid = list(product([*texts, ("syllables", 2048)], (1, 3, 5), (16, 128)))
    grid = grid[::9] if plan.quick else grid
    for i in torch.randperm(len(grid), generator=torch.Generator().manual_seed(0)).tolist():
        (kind, size), levels, width = grid[i]  # drawn, so that a run cut short has seen some of each kind
        name = f"{kind}, {size:,}, context {2**levels}, width {width}"
        packed = functools.partial(text, plan, kind, size)
        yield Step(("train", "scenario", name), _measure, (plan, constants, packed, levels, width))


def _calibrate(plan: Plan, constants: list[Terms], point: Row) -> list[Row]:
    """Dense steps of other sizes than the scenarios', from tiny (overhead) to wide (products); none when cut short."""
    shapes = [(64, 16, 2), (64, 16, 4), (4000, 16, 4), (1000, 64, 2), (4000, 64, 3), (1000, 256, 2)]
    rows, demands, seconds = [], [], []
    for positions, width, levels in shapes[:4] if plan.quick else shapes:
        task = Network(plan.document(positions), plan.network(n_hidden=width, levels=levels), True, plan.device)
        here = replace(point, x=f"{positions:,} positions, context {2**levels}, width {width}")
        found = _compare(plan, task, here, ("dense",))
        rows += found
        if found[0].median is None:
            return rows
        seconds.append(found[0].median)
        demands.append(demand(rows_of("dense", levels, task.packed), 10, width, len(plan.vocabulary)))
    constants.append(fit(demands, seconds))
    for (name, unit), value in zip(UNITS.items(), constants[0], strict=True):
        rows.append(point.row("prediction", name, unit, median=value, n=len(demands)))
    return rows


def _measure(
    plan: Plan, constants: list[Terms], make: functools.partial[cw.Packed], levels: int, width: int, point: Row
) -> list[Row]:
    if not constants:
        return [point.absent("prediction", "the constants were not measured", "right")]
    packed = make()
    task = Network(packed, plan.network(n_hidden=width, levels=levels), True, plan.device)
    rows = _compare(plan, task, point, STRATEGIES)
    measured = {row.provider: row.median for row in rows if row.metric == "seconds" and row.median}
    demands = {name: demand(rows_of(name, levels, packed), 10, width, len(plan.vocabulary)) for name in STRATEGIES}
    guess = {name: predicted(constants[0], terms) for name, terms in demands.items()}
    rows += [point.row(name, "predicted_seconds", "s", median=value) for name, value in guess.items()]
    if len(measured) < len(STRATEGIES):
        return [*rows, point.absent("prediction", "not every strategy was measured", "right")]
    chosen, best = (min(STRATEGIES, key=seconds.__getitem__) for seconds in (guess, measured))
    note = f"predicted {chosen}, fastest {best}"
    regret = measured[chosen] / measured[best] - 1
    rows.append(point.row("prediction", "right", "", median=float(chosen == best), note=note))
    return [*rows, point.row("prediction", "regret", "of the fastest", median=regret, note=note)]


def _compare(plan: Plan, task: Network, point: Row, strategies: Sequence[str]) -> list[Row]:
    short = replace(plan, seconds=min(plan.seconds, 2.0))
    competitors = [task.convolution(kind) for kind in strategies]
    with numeric_flags():
        return compare(competitors, task.expected(), point, short, positions=task.positions, memory=False)


QUESTION = "Can context, word lengths and width tell beforehand which graph wins?"
PICTURES = (Picture("Time lost by the predicted choice", "regret", "train", "of the fastest", "bars"),)
