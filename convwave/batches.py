"""Batches of contexts: a training text seen through few rows, with little noise.

A text repeats its contexts: of the 50,457 distinct 8-grams in the training split of names.txt, 270 hold 44 % of its
182,625 windows, 69 % occur once. A batch of whole names computes the frequent ones in every step and yet counts only
the few windows that it happens to hold. `ContextSampler` draws contexts instead of names: one that is drawn comes with
all its windows and targets, weighted so that sums over a batch are, on average, sums over the text.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor


class ContextSampler:
    """Draws distinct contexts, frequent ones more often, in batches that grow.

    A context that occurs c times is in a batch with probability ``p = min(1, a c ** power)``, and is then weighted by
    ``1 / p``. Draws are spaced evenly: a context has a random phase u, and a step draws it when u plus the sum of all p
    so far passes an integer. So none waits longer than about 1 / p steps, and a step's batch depends on nothing but its
    number.

    Args:
        counts: (R,) how often each context occurs, > 0.
        first, last: contexts in a batch on average, at the first and at the last step.
        steps: how many there will be.
        power: 0 draws all contexts equally often, 1 as often as they occur. The gradient of a context, averaged over
            its windows, is noise of about ``c ** -0.5``, which 0.5 balances.
        seed: of the phases.
        stages: in how many leaps, of equal ratio, the batches grow.
    """

    def __init__(
        self, counts: Tensor, first: int, last: int, steps: int, power: float, seed: int, stages: int = 5
    ) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"first, last: expected 1 <= first <= last, got {first} and {last}")
        if first == last:
            stages = 1
        shares = counts.double() ** power
        rows = [first * (last / first) ** (stage / max(stages - 1, 1)) for stage in range(stages)]
        self._begin = [stage * steps // stages for stage in range(stages)]
        self._probabilities = [_capped(shares, expected) for expected in rows]
        generator = torch.Generator().manual_seed(seed)
        self._positions = [torch.rand(counts.numel(), generator=generator, dtype=torch.float64)]
        for stage in range(stages - 1):
            length = self._begin[stage + 1] - self._begin[stage]
            self._positions.append(torch.add(self._positions[stage], self._probabilities[stage], alpha=length))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The contexts of a step, (N,) int64 ascending, and (N,) float64 how many like it each stands for, 1 / p."""
        stage = bisect_right(self._begin, step) - 1
        probability = self._probabilities[stage]
        position = torch.add(self._positions[stage], probability, alpha=step - self._begin[stage] + 1)
        rows = (position.frac_() < probability).nonzero().view(-1)
        return rows, probability.index_select(0, rows).reciprocal_()


def _capped(shares: Tensor, total: float) -> Tensor:
    """``min(1, a shares)`` with the `a` that makes the sum `total`, or all ones where that is too much to ask for."""
    if total >= shares.numel():
        return torch.ones_like(shares)
    order, index = shares.sort(descending=True)
    rest = order.flip(0).cumsum(0).flip(0)  # of this share and all smaller ones
    ahead = torch.arange(shares.numel(), dtype=shares.dtype)
    factor = (total - ahead) / rest  # if the `ahead` largest are capped
    first = int((factor * order < 1).nonzero()[0])
    return torch.ones_like(shares).scatter_(0, index[first:], factor[first] * order[first:])
