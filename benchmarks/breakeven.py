"""Which graph to evaluate on, predicted from three things: the context, the lengths of the words, the width.

The model of cost has three constants, measured in the same run on networks other than those it is tried on:

    seconds = overhead * (levels + 1) + element * elements + product * flop

Elements and FLOP follow from the number of rows of every level. A windowed graph has N * 2^(L-l-1) of them, a dense
one N. How many distinct contexts a text has cannot be read off its lengths; the estimate draws n_s contexts with s free
letters out of `a^s` equally likely ones, where `a`, the number of letters that would be as uncertain, is exp(entropy)
of the text's letters. Real text repeats itself more than that, so distinct graphs come out better than predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

import convwave as cw

STRATEGIES = ("windowed", "dense", "distinct")


class Work(NamedTuple):
    """What a training step has to do, in the terms of the constants."""

    steps: float
    elements: float
    flop: float


class Constants(NamedTuple):
    """Seconds per level, per element, per FLOP."""

    overhead: float
    element: float
    product: float

    def seconds(self, work: Work) -> float:
        return self.overhead * work.steps + self.element * work.elements + self.product * work.flop


def effective_letters(packed: cw.Packed) -> float:
    """exp(entropy) of what is predicted, in letters."""
    shares = torch.bincount(packed.targets).double() / len(packed)
    shares = shares[shares > 0]
    return math.exp(float(-(shares * shares.log()).sum()))


def rows_of(strategy: str, levels: int, lengths: Mapping[int, int], letters: float) -> list[float]:
    """Rows of the tokens and of every level above, from how many words have how many positions.

    Args:
        strategy: "windowed", "dense" or "distinct".
        levels: L.
        lengths: how many words have so many positions (letters + 1).
        letters: effective number of equally likely letters.
    """
    positions = sum(length * count for length, count in lengths.items())
    if strategy == "windowed":
        return [positions * 2.0 ** (levels - level) for level in range(levels + 1)]
    if strategy == "dense":
        return [float(positions)] * (levels + 1)
    if strategy != "distinct":
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return [_distinct(2**level, lengths, letters) for level in range(levels + 1)]


def _distinct(context: int, lengths: Mapping[int, int], letters: float) -> float:
    """Expected number of distinct contexts: position t has read min(t, context) free letters."""
    draws: dict[int, float] = {}
    for length, count in lengths.items():
        for t in range(min(length, context)):
            draws[t] = draws.get(t, 0.0) + count
        if length > context:
            draws[context] = draws.get(context, 0.0) + count * (length - context)
    total = 0.0
    for free, n in draws.items():
        log_contexts = free * math.log(max(letters, 1.0))
        if log_contexts > math.log(n) + 12:  # so many that no two draws agree
            total += n
        else:
            contexts = math.exp(log_contexts)
            total += contexts * -math.expm1(-n / contexts)
    return total


def work_of(rows: Sequence[float], n_embd: int, width: int, vocabulary: int) -> Work:
    """What a training step of pairwise levels on so many rows has to do."""
    channels = [n_embd, *[width] * (len(rows) - 1)]
    elements = rows[0] * n_embd + rows[-1] * vocabulary
    flop = 6.0 * rows[-1] * width * vocabulary
    for level in range(len(rows) - 1):
        below, above, C, H = rows[level], rows[level + 1], channels[level], channels[level + 1]
        elements += above * (2 * C + H)
        shared = below * 2 < above and 2 * C >= H  # as functional.gather_conv: multiply first, gather after
        flop += 12.0 * (below if shared else above) * C * H
    return Work(len(rows), elements, flop)


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Constants:
    """Constants >= 0 with the smallest squared relative errors."""
    chosen = list(range(3))
    matrix = torch.tensor(works, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    ones = torch.ones(len(works), 1, dtype=torch.float64)
    while True:
        found = torch.linalg.lstsq(matrix[:, chosen], ones, driver="gelsd").solution[:, 0].tolist()
        negative = [i for i, value in zip(chosen, found, strict=True) if value < 0]
        if not negative:
            values = dict(zip(chosen, found, strict=True))
            return Constants(*(values.get(i, 0.0) for i in range(3)))
        chosen = [i for i in chosen if i not in negative]


def predict(
    constants: Constants,
    levels: int,
    lengths: Mapping[int, int],
    letters: float,
    n_embd: int,
    width: int,
    vocabulary: int,
) -> dict[str, float]:
    """Seconds of a training step under every strategy."""
    return {
        strategy: constants.seconds(work_of(rows_of(strategy, levels, lengths, letters), n_embd, width, vocabulary))
        for strategy in STRATEGIES
    }
