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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

from convwave.data.packing import Packed

Kind = Literal["windowed", "dense", "distinct"]
Padding = Literal["replicate", "zeros"]

_BLOCK = 2**20  # positions numbered at a time


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
    return _window_trees(windows, targets, tuple(factors), None)


def distinct_graph(
    packed: Packed, levels: int = 3, counts: Tensor | None = None, *, factors: Sequence[int] | None = None
) -> Graph:
    """One row per distinct subcontext; `inverse` maps packed positions to rows of the top level.

    Arguments and errors as for `dense_graph`.
    """
    return distinct_graph_and_targets(packed, levels, counts, factors=factors)[0]


def distinct_graph_and_targets(
    packed: Packed, levels: int = 3, counts: Tensor | None = None, *, factors: Sequence[int] | None = None
) -> tuple[Graph, Tensor]:
    """`distinct_graph`, and (N,) integers: which of its targets (context and prediction) each packed position has."""
    factors, counts = _check(packed, levels, counts, factors)
    N, narrow = len(packed), torch.int32 if len(packed) < 2**31 else torch.int64
    first = _first(packed, narrow)
    tokens, ids = distinct_keys(packed.tokens.__getitem__, N, int(packed.tokens.max()) + 1)
    rows, taps = tokens.numel(), []
    for level, factor in enumerate(factors):
        dilation = math.prod(factors[:level])
        columns = [partial(_read, ids, first, back) for back in range((factor - 1) * dilation, -1, -dilation)]
        rows, ids = _distinct_columns(columns, N, rows)
        example = torch.empty(rows, dtype=torch.int64, device=ids.device)  # any position of each
        for part in _parts(N):
            example[ids[part]] = torch.arange(part.start, part.stop, device=ids.device)
        taps.append(torch.stack([column(example).long() for column in columns]))
        del columns  # which hold the numbers of the level below
    vocabulary = int(packed.targets.max()) + 1
    keys, target = distinct_keys(partial(_joined, ids.__getitem__, packed.targets.__getitem__, vocabulary), N)
    top, of_targets = _summed(counts, ids, rows), _summed(counts, target, keys.numel())
    graph = _graph(
        "distinct", factors, tokens, tuple(taps), top, keys % vocabulary, of_targets, keys // vocabulary, ids.long()
    )
    return graph, target


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


def _window_trees(windows: Tensor, targets: Tensor, factors: tuple[int, ...], counts: Tensor | None) -> Graph:
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
    counts: Tensor | None,
    target_ids: Tensor,
    target_counts: Tensor | None = None,
    target_rows: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Graph:
    if counts is None:
        counts = torch.ones(target_ids.shape, dtype=torch.float64, device=target_ids.device)
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
) -> tuple[tuple[int, ...], Tensor | None]:
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
        return tuple(factors), None
    if counts.shape != (n,):
        raise ValueError(f"counts: expected shape ({n},), one per packed position, got {tuple(counts.shape)}")
    counts = counts.to(packed.tokens.device, torch.float64)
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError("counts: expected finite numbers >= 0")
    return tuple(factors), counts


def _first(packed: Packed, dtype: torch.dtype = torch.int64) -> Tensor:
    """(N,) the row of the first position of each position's word."""
    cu = packed.cu_seqlens
    return torch.repeat_interleave(cu[:-1].to(dtype), cu.diff(), output_size=len(packed))


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


Keys = Callable[[slice], Tensor]  # the int64 keys >= 0 of some positions


def distinct_keys(keys: Keys, count: int, span: int = 2**62) -> tuple[Tensor, Tensor]:
    """Number the distinct keys of N positions in ascending order, a block of positions at a time.

    Args:
        keys: of some positions.
        count: N.
        span: above all keys, where that is known.

    Returns:
        The distinct keys in ascending order, and (N,) the number of each position's key, int32 in several blocks.
    """
    blocks = []
    for part in _parts(count):
        unique, ids = _unique(keys(part), span)
        blocks.append((unique, ids if count <= _BLOCK else ids.int()))
    if len(blocks) == 1:
        return blocks[0]
    unique = torch.unique(torch.cat([block for block, _ in blocks]))
    assert unique.numel() < 2**31
    ids = torch.empty(count, dtype=torch.int32, device=unique.device)
    for part in _parts(count):
        block, local = blocks.pop(0)
        torch.index_select(torch.searchsorted(unique, block, out_int32=True), 0, local, out=ids[part])
    return unique, ids


def _parts(count: int) -> Iterator[slice]:
    """Positions in blocks."""
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _unique(keys: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """The distinct keys in ascending order, and the number of each; by a table where few are possible."""
    if span > 4 * keys.numel():
        return torch.unique(keys, return_inverse=True)
    present = torch.zeros(span, dtype=torch.bool, device=keys.device)
    present[keys] = True
    return present.nonzero().view(-1), present.cumsum(0).sub_(1).index_select(0, keys)


def _read(below: Tensor, first: Tensor, back: int, rows: slice | Tensor) -> Tensor:
    """The rows of the level below that some positions read through the tap `back` positions behind them."""
    index = torch.arange(rows.start, rows.stop, device=below.device) if isinstance(rows, slice) else rows
    return below.index_select(0, torch.maximum(index - back, first[rows]))


def _joined(left: Keys, right: Keys, bound: int, part: slice) -> Tensor:
    """Two keys in one, the right one below `bound`."""
    return left(part).long() * bound + right(part)


def _distinct_columns(columns: Sequence[Keys], count: int, bound: int) -> tuple[int, Tensor]:
    """How many distinct columns a (k, N) matrix of ids below `bound` has, and (N,) the number of each."""
    keys, span = columns[0], bound
    for column in columns[1:]:
        if span * bound >= 2**62:
            unique, ids = distinct_keys(keys, count, span)
            keys, span = ids.__getitem__, unique.numel()
        keys, span = partial(_joined, keys, column, bound), span * bound
    unique, ids = distinct_keys(keys, count, span)
    return unique.numel(), ids


def _summed(counts: Tensor | None, ids: Tensor, num: int) -> Tensor:
    """(num,) float64 sums of the counts (N,), or of 1 each, by number (N,)."""
    if counts is None:
        return torch.bincount(ids, minlength=num).double()
    return counts.new_zeros(num).index_add_(0, ids, counts)
