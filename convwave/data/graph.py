"""Evaluation graphs: three ways to evaluate one network, exactly.

The network is a tree over the last 2^L tokens of a position: level l joins pairs of level-l activations. A *graph*
lists, for every level, which rows of the level below each row reads (its *taps*, oldest first), and how many windows
contain it (its *count*):

- windowed: every position has its own tree of 2^L - 1 nodes, nothing shared: the cost of the post's network;
- dense: one row for every position of every word and level, taps at t - 2^l and t, clamped at the word's first
  position: the dilated causal convolution;
- distinct: one row for every *distinct* subcontext.

The clamp is exact. Position 0 of a word has read nothing but token 0, so its activation is the activation of an
all-padding subtree at every level; whatever precedes it in a window is that subtree again.

Levels need not be pairs: `factors=(4, 2)` joins four, then two (kernel sizes 4 and 2, dilations 1 and 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from convwave.data.packing import Packed

Kind = Literal["windowed", "dense", "distinct"]
Padding = Literal["replicate", "zeros"]


class Consumers(NamedTuple):
    """Which rows n of a level read row r of the level below as tap j: entries ``begin .. end`` of that tap.

    Attributes:
        ranges: (2, k, N') int64, begin and end.
        order: (k, N) int64, the row n of each entry; empty where entry n is row n.
        most: the most entries that a range can have, 0 if unknown.
    """

    ranges: Tensor
    order: Tensor
    most: int = 0


def find_consumers(taps: Tensor, rows_below: int, ascending: bool = False, most: int = 0) -> Consumers:
    """The taps inverted, which is what a gradient needs.

    Args:
        taps: (k, N) int64 rows of the level below; -1 reads nothing.
        rows_below: N'.
        ascending: every tap's rows ascend, as in dense and windowed graphs: no sorting.
        most: see `Consumers`.
    """
    values, order = taps.contiguous(), taps.new_empty(0)
    if not ascending:
        values, order = values.sort(dim=1, stable=True)
    bounds = torch.arange(rows_below + 1, device=taps.device).expand(taps.shape[0], -1).contiguous()
    edges = torch.searchsorted(values, bounds)
    return Consumers(torch.stack([edges[:, :-1], edges[:, 1:]]), order, most)


class Rows(NamedTuple):
    """The rows of one level: what each reads, and how often it counts.

    Attributes:
        taps: (k, N) int64 rows of the level below, oldest tap first; -1 stands for a row of zeros, at the bottom only.
        counts: (N,) how many windows contain each row, for the statistics; None means 1 each.
        total: their sum where it is known.
        consumers: the taps the other way round where they are known, for the backward pass.
    """

    taps: Tensor
    counts: Tensor | None = None
    total: float | None = None
    consumers: Consumers | None = None


@dataclass(frozen=True)
class Graph:
    """Which rows each level computes, and from what.

    Attributes:
        kind: how rows were chosen; the layers do not look at it.
        factors: taps of each level; level l has dilation ``prod(factors[:l])``.
        tokens: (N_0,) int64, the bottom rows.
        taps: per level l, (factors[l], N_{l+1}) int64, rows of level l, oldest tap first.
        weights: per level l, (N_{l+1},) float64, how many windows contain the row; 0 is allowed.
        totals: per level l, their sum.
        target_ids: (M,) int64, predicted tokens.
        target_counts: (M,) float64, how often each is predicted.
        target_rows: (M,) int64, top row of each target; None where target m belongs to row m.
        inverse: (N,) int64, top row of each packed position; None where it is the position itself.
        all_count: whether every row is known to count; where not, what uncounted rows hold is kept from mattering.
    """

    kind: Kind
    factors: tuple[int, ...]
    tokens: Tensor
    taps: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    totals: tuple[float, ...]
    target_ids: Tensor
    target_counts: Tensor
    target_rows: Tensor | None = None
    inverse: Tensor | None = None
    all_count: bool = False

    @property
    def levels(self) -> int:
        return len(self.factors)

    @property
    def context(self) -> int:
        """Tokens that a position sees, itself included."""
        return math.prod(self.factors)

    @property
    def left(self) -> tuple[Tensor, ...]:
        """Per level, the row of the oldest tap."""
        return tuple(taps[0] for taps in self.taps)

    @property
    def right(self) -> tuple[Tensor, ...]:
        """Per level, the row of the newest tap."""
        return tuple(taps[-1] for taps in self.taps)

    @property
    def num_rows(self) -> int:
        """Rows of the top level: rows of the logits."""
        return self.weights[-1].numel()

    @property
    def num_nodes(self) -> int:
        """Rows of all levels above the tokens: node evaluations."""
        return sum(w.numel() for w in self.weights)

    @cached_property
    def consumers(self) -> tuple[Consumers, ...]:
        """Per level, who reads each row of the level below; made on first use."""
        result = []
        rows_below = [self.tokens.numel(), *(w.numel() for w in self.weights[:-1])]
        for level, (taps, rows) in enumerate(zip(self.taps, rows_below, strict=True)):
            reach = (self.factors[level] - 1) * math.prod(self.factors[:level])
            most = {"windowed": 1, "dense": reach + 1, "distinct": 0}[self.kind]
            result.append(find_consumers(taps, rows, self.kind != "distinct", most))
        return tuple(result)

    def rows(self, counted: bool = True, consumers: bool = False) -> tuple[Rows, ...]:
        """The rows of every level, from the bottom up.

        Args:
            counted: with their counts; False counts each once.
            consumers: with who reads them, made on first use.
        """
        return tuple(
            Rows(
                taps,
                self.weights[level] if counted else None,
                self.totals[level] if counted else None,
                self.consumers[level] if consumers else None,
            )
            for level, taps in enumerate(self.taps)
        )

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, tuple):
                return tuple(move(v) for v in value)
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


def _flatten(graph: Graph) -> tuple[list[Any], tuple[Any, ...]]:
    tensors = (graph.tokens, graph.taps, graph.weights, graph.target_ids, graph.target_counts)
    return [*tensors, graph.target_rows, graph.inverse], (graph.kind, graph.factors, graph.totals, graph.all_count)


def _unflatten(children: Any, context: tuple[Any, ...]) -> Graph:
    tokens, taps, weights, target_ids, target_counts, target_rows, inverse = children
    kind, factors, totals, all_count = context
    targets = (target_ids, target_counts, target_rows)
    return Graph(kind, factors, tokens, taps, weights, totals, *targets, inverse, all_count)


def _flatten_with_keys(graph: Graph) -> tuple[list[Any], tuple[Any, ...]]:
    children, context = _flatten(graph)
    names = ("tokens", "taps", "weights", "target_ids", "target_counts", "target_rows", "inverse")
    return [(GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context


torch.serialization.add_safe_globals([Graph])  # an exported program keeps its example inputs
# so that torch.export takes a graph for what it is: tensors, and numbers that are fixed
register_pytree_node(
    Graph,
    _flatten,
    _unflatten,
    serialized_type_name="convwave.data.graph.Graph",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=list,
    from_dumpable_context=lambda given: (given[0], tuple(given[1]), tuple(given[2]), given[3]),
)


def dense_graph(
    packed: Packed, levels: int = 3, counts: Tensor | None = None, *, factors: Sequence[int] | None = None
) -> Graph:
    """One row per packed position and level: the dilated causal convolution. Row n is packed position n.

    Args:
        packed: N positions.
        levels: number of pairwise levels; the context is ``2 ** levels`` tokens.
        counts: (N,) how often each position's window counts, >= 0 and finite; None means once.
        factors: taps per level instead of ``levels`` times 2.

    Raises:
        ValueError: no position, or a bad `levels`, `factors` or `counts`.
    """
    factors, counts = _check(packed, levels, counts, factors)
    taps = tuple(_dense_taps(packed, factors))
    return _graph("dense", factors, packed.tokens, taps, counts, packed.targets)


def windowed_graph(
    packed: Packed, levels: int = 3, counts: Tensor | None = None, *, factors: Sequence[int] | None = None
) -> Graph:
    """One tree for every packed position, as the post evaluates it. Row n is packed position n.

    Arguments and errors as for `dense_graph`.
    """
    factors, counts = _check(packed, levels, counts, factors)
    context = math.prod(factors)
    back = torch.arange(context - 1, -1, -1, device=packed.tokens.device)
    index = torch.arange(len(packed), device=packed.tokens.device)
    window = torch.maximum(index[:, None] - back, _first(packed)[:, None])  # (N, context)
    return _window_trees(packed.tokens[window], packed.targets, factors, counts)


def graph_of_windows(windows: Tensor, targets: Tensor, factors: Sequence[int]) -> Graph:
    """One tree for each of some windows of token ids, whatever they begin with. Row m is window m.

    Args:
        windows: (M, context) int64, at least one.
        targets: (M,) int64.
        factors: taps per level; their product is the context.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] != math.prod(factors):
        raise ValueError(f"windows: expected shape (M, {math.prod(factors)}), got {tuple(windows.shape)}")
    counts = torch.ones(windows.shape[0], dtype=torch.float64, device=windows.device)
    return _window_trees(windows, targets, tuple(factors), counts)


def distinct_graph(
    packed: Packed, levels: int = 3, counts: Tensor | None = None, *, factors: Sequence[int] | None = None
) -> Graph:
    """One row per distinct subcontext; `inverse` maps packed positions to rows of the top level.

    Arguments and errors as for `dense_graph`.
    """
    factors, counts = _check(packed, levels, counts, factors)
    tokens, ids = torch.unique(packed.tokens, return_inverse=True)
    rows, taps = tokens.numel(), []
    for dense in _dense_taps(packed, factors):
        below = ids[dense]  # (factor, N), distinct rows of the level below
        ids, num, first = _distinct(below, rows)
        taps.append(below[:, first])
        rows = num
    top = torch.zeros(rows, dtype=torch.float64, device=ids.device).index_add_(0, ids, counts)
    vocabulary = int(packed.targets.max()) + 1
    keys, target = torch.unique(ids * vocabulary + packed.targets, return_inverse=True)
    target_counts = torch.zeros(keys.numel(), dtype=torch.float64, device=ids.device).index_add_(0, target, counts)
    return _graph(
        "distinct", factors, tokens, tuple(taps), top, keys % vocabulary, target_counts, keys // vocabulary, ids
    )


def select_windows(graph: Graph, positions: Tensor, targets: Tensor) -> Graph:
    """The part of a graph that the windows of some packed positions need, each drawn position counted once.

    This is how a batch of random windows is fed to the convolution: a position drawn twice counts twice.

    Args:
        graph: any graph of the packed words.
        positions: (M,) int64 packed positions, at least one, repeats allowed.
        targets: (M,) int64 what each of them predicts.

    Returns:
        A graph of kind "distinct", on the device of `graph`; its `inverse` maps the M draws to its top rows.
    """
    if positions.numel() == 0 or targets.shape != positions.shape:
        raise ValueError(f"positions, targets: expected equal shapes (M,), got {positions.shape}, {targets.shape}")
    positions, targets = positions.to(graph.tokens.device), targets.to(graph.tokens.device)
    # index_select, not [..]: several times faster on a CPU, and this runs in every training step
    rows = positions if graph.inverse is None else graph.inverse.index_select(0, positions)
    kept, inverse = torch.unique(rows, return_inverse=True)
    counts = torch.bincount(inverse, minlength=kept.numel()).double()
    taps, tokens = _below(graph, kept)
    ones = torch.ones(targets.shape, dtype=torch.float64, device=targets.device)
    return _graph("distinct", graph.factors, tokens, taps, counts, targets, ones, inverse, inverse)


def select_contexts(graph: Graph, rows: Tensor, scale: Tensor) -> Graph:
    """The part of a distinct graph that some of its top rows need, each with all its windows and targets.

    Args:
        graph: a distinct graph.
        rows: (N,) int64 distinct top rows, at least one.
        scale: (N,) factor of the counts of each.

    Returns:
        A graph of kind "distinct" without `inverse`, on the device of `graph`; its top rows are `rows` in their order.
    """
    if graph.target_rows is None or rows.numel() == 0:
        raise ValueError(f"graph, rows: expected a distinct graph and a row, got {graph.kind} and {rows.numel()} rows")
    rows, scale = rows.to(graph.tokens.device), scale.to(graph.tokens.device, torch.float64)
    position = torch.full((graph.num_rows,), -1, device=rows.device)
    position[rows] = torch.arange(rows.numel(), device=rows.device)
    target_rows = position.index_select(0, graph.target_rows)
    chosen = (target_rows >= 0).nonzero().view(-1)
    target_rows = target_rows[chosen]
    counts = graph.weights[-1][rows] * scale
    target_counts = graph.target_counts[chosen] * scale[target_rows]
    taps, tokens = _below(graph, rows)
    return _graph("distinct", graph.factors, tokens, taps, counts, graph.target_ids[chosen], target_counts, target_rows)


def _below(graph: Graph, kept: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Taps and tokens of the part of a graph that some of its top rows need."""
    taps: list[Tensor] = []
    for level in reversed(graph.taps):
        kept, local = torch.unique(level.index_select(1, kept), return_inverse=True)
        taps.insert(0, local)
    return tuple(taps), graph.tokens[kept]


def multiplicities(taps: Sequence[Tensor], counts: Tensor, rows_below: Sequence[int]) -> tuple[Tensor, ...]:
    """How many windows contain each row of every level, from the counts of the top rows downward.

    Args:
        taps: per level, (k, N_{l+1}) rows of level l.
        counts: (N_L,) float64 counts of the top rows.
        rows_below: per level, N_l.

    Returns:
        Per level l, (N_{l+1},) float64.
    """
    weights = [counts]
    for level in range(len(taps) - 1, 0, -1):
        below = counts.new_zeros(rows_below[level])
        for tap in taps[level]:
            below.index_add_(0, tap, weights[0])
        weights.insert(0, below)
    return tuple(weights)


def _window_trees(windows: Tensor, targets: Tensor, factors: tuple[int, ...], counts: Tensor) -> Graph:
    taps, rows = [], windows.numel()
    for factor in factors:
        taps.append(torch.arange(rows, device=windows.device).view(-1, factor).T)
        rows //= factor
    return _graph("windowed", factors, windows.flatten(), tuple(taps), counts, targets)


def _graph(
    kind: Kind,
    factors: tuple[int, ...],
    tokens: Tensor,
    taps: tuple[Tensor, ...],
    counts: Tensor,
    target_ids: Tensor,
    target_counts: Tensor | None = None,
    target_rows: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Graph:
    rows_below = [tokens.numel(), *(t.shape[1] for t in taps[:-1])]
    weights = multiplicities(taps, counts, rows_below)
    # each of the levels above joins `factor` rows into one, so the totals follow from the top one
    totals = [float(counts.sum())]
    for factor in reversed(factors[1:]):
        totals.insert(0, totals[0] * factor)
    targets = (target_ids, counts if target_counts is None else target_counts, target_rows)
    all_count = bool((counts > 0).all())
    return Graph(kind, factors, tokens, taps, weights, tuple(totals), *targets, inverse, all_count)


def _check(
    packed: Packed, levels: int, counts: Tensor | None, factors: Sequence[int] | None
) -> tuple[tuple[int, ...], Tensor]:
    if factors is None:
        if levels < 1:
            raise ValueError(f"levels: expected at least 1, got {levels}")
        factors = (2,) * levels
    if not factors or any(f < 2 for f in factors):
        raise ValueError(f"factors: expected one number >= 2 per level, got {tuple(factors)}")
    n = len(packed)
    if n == 0:
        raise ValueError("packed: expected at least one position, got none")
    if counts is None:
        return tuple(factors), torch.ones(n, dtype=torch.float64, device=packed.tokens.device)
    if counts.shape != (n,):
        raise ValueError(f"counts: expected shape ({n},), one per packed position, got {tuple(counts.shape)}")
    counts = counts.to(packed.tokens.device, torch.float64)
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError("counts: expected finite numbers >= 0")
    return tuple(factors), counts


def _first(packed: Packed) -> Tensor:
    """(N,) the row of the first position of each position's word."""
    cu = packed.cu_seqlens
    return torch.repeat_interleave(cu[:-1], cu.diff(), output_size=len(packed))


def dilated_taps(first: Tensor, kernel_size: int, dilation: int, padding: Padding = "replicate") -> Tensor:
    """Taps of a causal convolution over sequences packed end to end.

    Args:
        first: (N,) int64 the row at which each row's sequence begins.
        padding: what precedes a sequence: its first row repeated ("replicate", which equals filling windows with
            token 0), or "zeros", which are marked -1.

    Returns:
        (kernel_size, N), oldest tap first.
    """
    index = torch.arange(first.shape[0], device=first.device)
    taps = []
    for back in range((kernel_size - 1) * dilation, -1, -dilation):
        row = index - back
        taps.append(torch.maximum(row, first) if padding == "replicate" else torch.where(row < first, -1, row))
    return torch.stack(taps)


def dilated_consumers(
    first: Tensor, end: Tensor, kernel_size: int, dilation: int, padding: Padding = "replicate"
) -> Consumers:
    """The consumers of `dilated_taps`, found without a search.

    Args:
        first, end: (N,) int64 the row at which each row's sequence begins, and one past its last.
        padding: see `dilated_taps`.
    """
    index = torch.arange(first.shape[0], device=first.device)
    ranges = []
    for back in range((kernel_size - 1) * dilation, -1, -dilation):
        stop = torch.minimum(index + back + 1, end)
        begin = torch.minimum(index + back, stop)
        if padding == "replicate":  # the first row stands for everything before it
            begin = torch.where(index == first, first, begin)
        ranges.append(torch.stack([begin, stop]))
    most = (kernel_size - 1) * dilation + 1 if padding == "replicate" else 1
    return Consumers(torch.stack(ranges, 1), first.new_empty(0), most)


def _dense_taps(packed: Packed, factors: Sequence[int]) -> list[Tensor]:
    first = _first(packed)
    return [dilated_taps(first, factor, math.prod(factors[:level])) for level, factor in enumerate(factors)]


def _distinct(columns: Tensor, bound: int) -> tuple[Tensor, int, Tensor]:
    """Number the distinct columns of a (k, N) matrix of ids below `bound`.

    Returns:
        (N,) the number of each column, the number of distinct columns, and the first column with each number.
    """
    key, span = columns[0], bound
    for row in columns[1:]:
        if span * bound >= 2**62:
            _, key = torch.unique(key, return_inverse=True)
            span = int(key.max()) + 1
        key, span = key * bound + row, span * bound
    unique, ids = torch.unique(key, return_inverse=True)
    index = torch.arange(ids.numel(), device=ids.device)
    first = torch.full_like(unique, ids.numel()).scatter_reduce_(0, ids, index, "amin")
    return ids, unique.numel(), first
