"""What a step reads: windows, names or contexts drawn from a training text, and parts cut out of its distinct graph.

A text repeats its contexts: of the 50,457 distinct 8-grams in the training split of names.txt, 270 hold 44 % of its
182,625 windows, 69 % occur once. A batch of whole names computes the frequent ones in every step, but counts only the
few windows that it contains. `ContextSampler` draws contexts instead of names. A drawn context comes with all its
windows and targets, weighted so that a batch's sums equal the text's in expectation.

Shapes: N rows of a level, k taps, V tokens, V' = V rounded up to whole vectors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from convwave.data.graph import Graph, distinct_graph, select_contexts, select_windows
from convwave.data.packing import Packed

_LANES = 16  # float32 in a vector register; a product with 32 columns takes 0.6 of the time of one with 27

Ranges = tuple[tuple[int, int], ...]  # of each tap


class ContextSampler:
    """Draws distinct contexts, frequent ones more often, in batches that grow.

    A context that occurs c times is in a batch with probability ``p = min(1, a c ** power)``, and is then weighted by
    ``1 / p``. Draws are spaced evenly: a context has a random phase u, and a step draws it when u plus the sum of all p
    so far passes an integer. So no context waits longer than about 1 / p steps, and the batch of a step depends only
    on its number.

    Args:
        counts: (R,) how often each context occurs, > 0.
        first, last: contexts in a batch on average, at the first and at the last step.
        steps: how many there will be.
        power: 0 draws all contexts equally often, 1 as often as they occur. The gradient of a context, averaged over
            its windows, is noise of about ``c ** -0.5``, which 0.5 balances.
        seed: of the phases.
        stages: number of sizes that batches grow through, in equal ratios.
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
        self._positions = [torch.rand(counts.numel(), generator=generator, dtype=torch.float64, device="cpu")]
        for stage in range(stages - 1):
            length = self._begin[stage + 1] - self._begin[stage]
            self._positions.append(torch.add(self._positions[stage], self._probabilities[stage], alpha=length))

    def phases(self, step: int) -> tuple[Tensor, Tensor, int]:
        """What a step draws by: (R,) float64 phases and probabilities, and how often those have been added so far."""
        stage = bisect_right(self._begin, step) - 1
        return self._positions[stage], self._probabilities[stage], step - self._begin[stage] + 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The contexts of a step, (N,) int64 ascending, and (N,) float64 its weight, 1 / p."""
        phase, probability, times = self.phases(step)
        position = torch.add(phase, probability, alpha=times)
        rows = (position.frac_() < probability).nonzero().view(-1)
        return rows, probability.index_select(0, rows).reciprocal_()


def _capped(shares: Tensor, total: float) -> Tensor:
    """``min(1, a shares)`` with the `a` that makes the sum `total`, or all ones where the sum cannot be reached."""
    if total >= shares.numel():
        return torch.ones_like(shares)
    order, index = shares.sort(descending=True)
    rest = order.flip(0).cumsum(0).flip(0)  # of this share and all smaller ones
    ahead = torch.arange(shares.numel(), dtype=shares.dtype, device="cpu")
    factor = (total - ahead) / rest  # if the `ahead` largest are capped
    first = int((factor * order < 1).nonzero()[0])
    return torch.ones_like(shares).scatter_(0, index[first:], factor[first] * order[first:])


class Batch(NamedTuple):
    """What a step reads of a graph.

    Attributes:
        taps: per level, (k, N) int64, what each tap reads: rows of the tap's range of the level below.
        ranges: per level and tap, the first row below that the tap reads, and one past the last; at level 0 of tokens.
        weights: per level, (N,) how many windows contain the row.
        totals: per level, the sum of the weights.
        targets: (N, V') how often each top row is followed by each token; 0 in the columns from V on.
    """

    taps: tuple[Tensor, ...]
    ranges: tuple[Ranges, ...]
    weights: tuple[Tensor, ...]
    totals: tuple[float, ...]
    targets: Tensor


def padded(vocab_size: int) -> int:
    """V': the columns of logits and targets."""
    return -(-vocab_size // _LANES) * _LANES


def graph_batch(graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Any graph as a batch, with weights of the parameters' dtype."""
    taps = (graph.tokens[graph.taps[0]], *graph.taps[1:])
    below = (vocab_size, *(w.numel() for w in graph.weights[:-1]))
    ranges = tuple(((0, rows),) * factor for rows, factor in zip(below, graph.factors, strict=True))
    weights = tuple(w.to(dtype) for w in graph.weights)
    return Batch(taps, ranges, weights, graph.totals, _target_counts(graph, vocab_size, dtype))


def _target_counts(graph: Graph, vocab_size: int, dtype: torch.dtype) -> Tensor:
    columns = padded(vocab_size)
    rows = torch.arange(graph.num_rows, device=graph.tokens.device) if graph.target_rows is None else graph.target_rows
    counts = torch.zeros(graph.num_rows * columns, dtype=torch.float64, device=graph.tokens.device)
    return counts.index_add_(0, rows * columns + graph.target_ids, graph.target_counts).to(dtype).view(-1, columns)


class Parts:
    """Cuts parts out of the distinct graph of a whole text.

    Rows that a part needs are marked rather than found by `torch.unique`, whose sorting takes three times as long. They
    are ordered so that each tap reads one contiguous range: the oldest tap needs few (410 of the 1,804 4-grams of a
    batch, 4,861 of the 22,135 of names.txt), because it mostly reads beginnings of names.

    Args:
        graph: a distinct graph.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(self, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        self.graph, self.vocab_size, self.dtype = graph, vocab_size, dtype
        sizes = [weights.numel() for weights in graph.weights]
        self._mark = [torch.zeros(n, dtype=torch.uint8, device="cpu") for n in sizes]
        self._local = [torch.zeros(n, dtype=torch.int64, device="cpu") for n in sizes]
        self._count = torch.arange(max(sizes), device="cpu")
        self._taps = [graph.tokens[graph.taps[0]], *graph.taps[1:]]

    def part(self, kept: Tensor, weights: Tensor, total: float, targets: Tensor) -> Batch:
        """The batch of some distinct top rows (N,) with weights (N,) that sum to `total`, and targets (N, V')."""
        factors = self.graph.factors
        taps: list[Tensor] = []
        ranges: list[Ranges] = []
        all_weights, totals = [weights], [total]
        for level in range(self.graph.levels - 1, 0, -1):
            read = self._taps[level].index_select(1, kept)
            kept, of_taps = self._ordered(level - 1, read)
            local = self.number(level - 1, kept, read.view(-1))
            share = all_weights[0].repeat(factors[level])
            all_weights.insert(0, torch.bincount(local, share, kept.numel()).to(self.dtype))
            totals.insert(0, totals[0] * factors[level])
            local = local.view_as(read)
            for tap, (begin, _) in zip(local, of_taps, strict=True):
                tap.sub_(begin)
            taps.insert(0, local)
            ranges.insert(0, of_taps)
        taps.insert(0, self._taps[0].index_select(1, kept))
        ranges.insert(0, ((0, self.vocab_size),) * factors[0])
        return Batch(tuple(taps), tuple(ranges), tuple(all_weights), tuple(totals), targets)

    def number(self, level: int, kept: Tensor, rows: Tensor) -> Tensor:
        """The index of each of `rows` among the distinct rows `kept` of a level."""
        local = self._local[level]
        local[kept] = self._count[: kept.numel()]
        return local.index_select(0, rows)

    def distinct(self, level: int, rows: Tensor) -> Tensor:
        """The distinct rows among some rows of a level."""
        mark = self._mark[level]
        mark[rows] = 1
        kept = mark.nonzero().view(-1)
        mark[kept] = 0
        return kept

    def _ordered(self, level: int, taps: Tensor) -> tuple[Tensor, Ranges]:
        """The distinct rows of a level that taps (k, N) read, and the range of each tap.

        Order: rows read only by inner taps, only by the oldest tap, by oldest and newest, only by the newest. An inner
        tap's range is all rows.
        """
        mark = self._mark[level]
        between = taps[1:-1].flatten()
        if between.numel():
            mark[between] = 4
        mark[taps[0]] = mark[taps[0]] | 1
        mark[taps[-1]] = mark[taps[-1]] | 2
        ends = mark & 3 if between.numel() else mark
        parts = [(ends == code).nonzero().view(-1) for code in (1, 3, 2)]
        if between.numel():
            parts.insert(0, (mark == 4).nonzero().view(-1))
        kept = torch.cat(parts)
        mark[kept] = 0
        newest, both, oldest = (part.numel() for part in (parts[-1], parts[-2], parts[-3]))
        n = kept.numel()
        middle = ((0, n),) * (taps.shape[0] - 2)
        return kept, ((n - newest - both - oldest, n - newest), *middle, (n - newest - both, n))


class NameBatches(Parts):
    """Batches of whole names.

    Args:
        packed: all names.
        graph: their distinct graph.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(self, packed: Packed, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        if graph.inverse is None:
            raise ValueError(f"graph: expected a distinct graph, got a {graph.kind} one")
        super().__init__(graph, vocab_size, dtype)
        self._packed, self._rows = packed, graph.inverse

    def __call__(self, words: Tensor) -> Batch:
        """The batch of the words with these indices (int64); a repeated index counts again."""
        positions, _ = self._packed.positions(words)
        top, columns = self.graph.levels - 1, padded(self.vocab_size)
        rows = self._rows.index_select(0, positions)
        kept = self.distinct(top, rows)
        rows = self.number(top, kept, rows)
        weights = torch.bincount(rows, minlength=kept.numel()).to(self.dtype)
        places = rows * columns + self._packed.targets.index_select(0, positions)
        targets = torch.bincount(places, minlength=kept.numel() * columns).to(self.dtype)
        return self.part(kept, weights, float(positions.numel()), targets.view(-1, columns))


class ContextBatches(Parts):
    """Batches of contexts.

    Args:
        sampler: draws top rows of the graph.
        graph: the distinct graph of all names.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(
        self, sampler: ContextSampler, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(graph, vocab_size, dtype)
        self._sampler, self._weights = sampler, graph.weights[-1].to(dtype)
        rows = torch.arange(graph.num_rows, device="cpu") if graph.target_rows is None else graph.target_rows
        rows, order = rows.sort(stable=True)
        self._ids, self._counts = graph.target_ids[order], graph.target_counts[order].to(dtype)
        self._starts = torch.searchsorted(rows, torch.arange(graph.num_rows + 1, device="cpu"))  # of each row's targets

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        kept, scale = self._sampler(step)
        scale, columns = scale.to(self.dtype), padded(self.vocab_size)
        weights = self._weights.index_select(0, kept).mul_(scale)
        starts = self._starts.index_select(0, kept)
        number = self._starts.index_select(0, kept + 1).sub_(starts)
        row = torch.repeat_interleave(number)
        entry = (starts - number.cumsum(0).sub_(number)).index_select(0, row)
        entry.add_(torch.arange(row.numel(), device="cpu"))
        places = (row * columns).add_(self._ids.index_select(0, entry))
        counts = self._counts.index_select(0, entry).mul_(scale.index_select(0, row))
        targets = torch.zeros(kept.numel() * columns, dtype=self.dtype, device="cpu").index_put_((places,), counts)
        return self.part(kept, weights, float(weights.sum()), targets.view(-1, columns))


class Plan(NamedTuple):
    """What the steps of a training read.

    Attributes:
        batch_of: "windows" draws single positions with replacement, "names" takes whole names epoch by epoch,
            "contexts" draws distinct contexts, "text" takes all there is in every step.
        batch: windows, names or contexts a step; contexts in the first step.
        steps: how many there will be.
        seed: of the order of the names, and of the phases of contexts.
        growth: of batches of contexts, from the first step to the last.
        context_power: how much more often frequent contexts are drawn.
        token_noise: share of the letters read of names that are replaced by random ones of the text.
    """

    batch_of: Literal["windows", "names", "contexts", "text"]
    batch: int
    steps: int
    seed: int
    growth: float = 1.0
    context_power: float = 0.0
    token_noise: float = 0.0


class StepReader:
    """What step i of a training reads, as a graph for autograd or as a `Batch` for the closed form.

    Windows and noise are drawn from `generator`, one step after the other; all else depends on the step's number alone.

    Args:
        plan: what the steps read.
        packed: the training text.
        vocab_size: V.
        factors: of the network.
        generator: on the CPU.
        device: where graphs go; batches stay on the CPU.
    """

    def __init__(
        self,
        plan: Plan,
        packed: Packed,
        vocab_size: int,
        factors: tuple[int, ...],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan, self.packed, self.vocab_size, self.factors = plan, packed, vocab_size, factors
        self.generator, self.device = generator, device
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    @cached_property
    def everything(self) -> Graph:
        """The whole text over its distinct subcontexts; trainings on the same words share it."""
        key = (self.factors, str(self.device))
        if key not in self.packed.derived:
            self.packed.derived[key] = self._distinct(self.packed)
        return self.packed.derived[key]

    def graph(self, i: int) -> Graph:
        """The graph of step i."""
        plan, packed = self.plan, self.packed
        if plan.batch_of == "windows":
            return self._windows(torch.randint(0, len(packed), (plan.batch,), generator=self.generator, device="cpu"))
        if plan.batch_of == "contexts":
            return select_contexts(self.everything, *self.sampler(i))
        if plan.batch_of == "names" and plan.token_noise:
            return self._distinct(self._noisy(packed.select(self.names(i, min(plan.batch, packed.num_words)))))
        if self.reads_all:
            return self.everything
        # of the graph of all names, the part that these need: half the time of a graph of their own
        return self._windows(packed.positions(self.names(i, plan.batch))[0])

    def batch(self, i: int) -> Batch:
        """The batch of step i."""
        return self._batches(i)

    def count(self, rows: int, total: float) -> int:
        """Positions that a step predicts, of top rows that count `total` in all; of contexts each row counts once."""
        return rows if self.plan.batch_of == "contexts" else round(total)

    @property
    def reads_all(self) -> bool:
        return self.plan.batch_of == "text" or self.plan.batch >= self.packed.num_words

    @cached_property
    def sampler(self) -> ContextSampler:
        plan, counts = self.plan, self.everything.weights[-1].cpu()
        return ContextSampler(
            counts, plan.batch, round(plan.growth * plan.batch), plan.steps, plan.context_power, plan.seed
        )

    @cached_property
    def _batches(self) -> Callable[[int], Batch]:
        plan = self.plan
        if plan.batch_of == "contexts":
            return ContextBatches(self.sampler, self.everything, self.vocab_size)
        if plan.batch_of == "windows" or plan.token_noise:
            return lambda i: graph_batch(self.graph(i), self.vocab_size)
        if self.reads_all:
            full = graph_batch(self.everything, self.vocab_size)
            return lambda i: full
        batches = NameBatches(self.packed, self.everything, self.vocab_size)
        return lambda i: batches(self.names(i, plan.batch))

    def _distinct(self, packed: Packed) -> Graph:
        return distinct_graph(packed, factors=self.factors).to(self.device)

    def _windows(self, positions: Tensor) -> Graph:
        return select_windows(self.everything, positions, self.packed.targets.index_select(0, positions))

    def names(self, i: int, batch: int) -> Tensor:
        """Indices of the names of step i."""
        epoch, part = divmod(i, self.packed.num_words // batch)
        if epoch != self._epoch:  # the order depends on seed and epoch alone, so resuming needs no more than the step
            generator = torch.Generator().manual_seed((self.plan.seed * 1_000_003 + epoch) % 2**64)
            self._epoch, self._order = epoch, torch.randperm(self.packed.num_words, generator=generator, device="cpu")
        return self._order[part * batch : (part + 1) * batch]

    def _noisy(self, names: Packed) -> Packed:
        """Names of which some letters read are replaced; what is to be predicted stays."""
        n = len(names)
        replace = torch.rand(n, generator=self.generator, device="cpu") < self.plan.token_noise
        replace &= names.tokens != 0  # the opening 0 is what fills the context
        random = self.packed.tokens[torch.randint(0, len(self.packed), (n,), generator=self.generator, device="cpu")]
        return Packed(torch.where(replace, random, names.tokens), names.targets, names.cu_seqlens)
