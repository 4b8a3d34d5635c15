"""The three graphs: their rows, their weights, and that they are one function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convwave as cw
from convwave import reference
from convwave.data.graph import Consumers, dilated_consumers, dilated_taps
from tests.helpers import GRAPHS, RELATIVE, per_position, relative_error

some_ids = st.lists(st.lists(st.integers(1, 3), max_size=20), min_size=1, max_size=8)
some_factors = st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple)


def windows_of(graph: cw.Graph) -> torch.Tensor:
    """(rows of the top level, context) token ids that each top row reads, found by following the taps."""
    windows = graph.tokens[:, None]
    for taps in graph.taps:
        windows = torch.cat([windows[tap] for tap in taps], dim=1)
    return windows


@pytest.mark.parametrize("make", GRAPHS)
@given(ids=some_ids, factors=some_factors)
def test_every_graph_reads_the_posts_windows(make, ids: list[list[int]], factors: tuple[int, ...]) -> None:
    packed = cw.pack_ids(ids)
    graph = make(packed, factors=factors)
    expected = reference.build_windows(packed, graph.context)
    assert torch.equal(per_position(windows_of(graph), graph), expected.inputs)


@pytest.mark.parametrize("make", GRAPHS)
@given(ids=some_ids, factors=some_factors, data=st.data())
def test_weights_count_the_windows_that_contain_a_row(make, ids, factors, data) -> None:
    """Against the literal count: follow every window of the batch down and tick each node it visits."""
    packed = cw.pack_ids(ids)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(packed), max_size=len(packed))))
    graph = make(packed, factors=factors, counts=counts)
    top = torch.arange(len(packed)) if graph.inverse is None else graph.inverse
    visits = top.repeat_interleave(counts)
    for level in reversed(range(graph.levels)):
        assert torch.equal(
            graph.weights[level], torch.bincount(visits, minlength=graph.weights[level].numel()).double()
        )
        assert graph.totals[level] == visits.numel()
        visits = graph.taps[level][:, visits].flatten()


def readers(consumers: Consumers) -> list[list[list[int]]]:
    """For each tap and row below, who reads it."""
    begins, ends = consumers.ranges.tolist()
    lists = []
    for j, bounds in enumerate(zip(begins, ends, strict=True)):
        order = consumers.order[j].tolist() if consumers.order.numel() else range(10**9)
        lists.append([list(order[begin:end]) for begin, end in zip(*bounds, strict=True)])
    return lists


@pytest.mark.parametrize("make", GRAPHS)
@given(ids=some_ids, factors=some_factors)
def test_consumers_are_the_taps_the_other_way_round(make, ids: list[list[int]], factors: tuple[int, ...]) -> None:
    graph = make(cw.pack_ids(ids), factors=factors)
    rows_below = [graph.tokens.numel(), *(w.numel() for w in graph.weights)]
    for taps, below, consumers in zip(graph.taps, rows_below, graph.consumers, strict=False):
        found = readers(consumers)
        assert [len(found), len(found[0])] == [len(taps), below]
        for tap, of_tap in zip(taps.tolist(), found, strict=True):
            assert of_tap == [[n for n, row in enumerate(tap) if row == r] for r in range(below)]
            assert consumers.most == 0 or max(map(len, of_tap)) <= consumers.most


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    kernel_size=st.integers(1, 4),
    dilation=st.integers(1, 5),
    padding=st.sampled_from(["replicate", "zeros"]),
)
def test_consumers_of_a_dilated_convolution(lengths: list[int], kernel_size: int, dilation: int, padding) -> None:
    sizes = torch.tensor(lengths)
    end = sizes.cumsum(0).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    taps = dilated_taps(first, kernel_size, dilation, padding)
    consumers = dilated_consumers(first, end, kernel_size, dilation, padding)
    for tap, of_tap in zip(taps.tolist(), readers(consumers), strict=True):
        assert of_tap == [[n for n, row in enumerate(tap) if row == r] for r in range(len(first))]
        assert max(map(len, of_tap), default=0) <= consumers.most


@given(ids=some_ids, factors=some_factors)
def test_distinct_rows_are_distinct(ids: list[list[int]], factors: tuple[int, ...]) -> None:
    graph = cw.distinct_graph(cw.pack_ids(ids), factors=factors)
    rows = graph.tokens[:, None]
    for taps in graph.taps:
        rows = torch.cat([rows[tap] for tap in taps], dim=1)
        assert len(set(map(tuple, rows.tolist()))) == len(rows)


@given(ids=some_ids, data=st.data())
def test_selected_windows_are_the_drawn_ones(ids: list[list[int]], data) -> None:
    packed = cw.pack_ids(ids)
    drawn = torch.tensor(data.draw(st.lists(st.integers(0, len(packed) - 1), min_size=1, max_size=12)))
    for make in GRAPHS:
        part = cw.select_windows(make(packed), drawn, packed.targets[drawn])
        expected = reference.build_windows(packed, 8)
        assert torch.equal(per_position(windows_of(part), part), expected.inputs[drawn])
        assert part.totals[-1] == len(drawn)
        assert all(float(w.sum()) == total for w, total in zip(part.weights, part.totals, strict=True))
        assert all(bool((w > 0).all()) for w in part.weights), "no row that no window needs"


def test_node_counts_of_names_txt(names_txt: cw.Words) -> None:
    """595 / 20,243 / 50,457 distinct contexts of 182,625 positions in the training split."""
    splits = cw.split_words(names_txt.words)
    packed = cw.pack(splits.train, cw.Vocabulary.from_words(names_txt.words))
    graph = cw.distinct_graph(packed)
    assert [w.numel() for w in graph.weights] == [595, 20_243, 50_457]
    assert cw.dense_graph(packed).num_nodes == 3 * len(packed)
    assert cw.windowed_graph(packed).num_nodes == 7 * len(packed)


def test_left_and_right_of_the_dense_graph() -> None:
    graph = cw.dense_graph(cw.pack_ids([[1, 2, 3], [], [4]]))
    assert graph.left[0].tolist() == [0, 0, 1, 2, 4, 5, 5]
    assert graph.left[1].tolist() == [0, 0, 0, 1, 4, 5, 5]
    assert all(right.tolist() == list(range(7)) for right in graph.right)


def test_a_context_of_4096_tokens() -> None:
    packed = cw.pack_ids([[1 + i % 5 for i in range(5000)], [2]])
    torch.manual_seed(0)
    model = cw.ConvWave(6, 3, 4, levels=12).double().eval()
    dense, distinct = cw.dense_graph(packed, 12), cw.distinct_graph(packed, 12)
    assert dense.context == 4096
    expected = model(dense)
    assert relative_error(per_position(model(distinct), distinct), expected) < RELATIVE
    picked = torch.tensor([0, 1, 4095, 4096, 5000, 5002])
    windows = reference.build_windows(packed, 4096).inputs[picked]
    assert relative_error(cw.to_windowed(model)(windows), expected[picked]) < RELATIVE


@pytest.mark.parametrize("make", GRAPHS)
def test_bad_arguments_are_named(make) -> None:
    packed = cw.pack_ids([[1, 2]])
    with pytest.raises(ValueError, match="levels: expected at least 1, got 0"):
        make(packed, 0)
    with pytest.raises(ValueError, match="factors"):
        make(packed, factors=(2, 1))
    with pytest.raises(ValueError, match=r"counts: expected shape \(3,\)"):
        make(packed, counts=torch.ones(2))
    with pytest.raises(ValueError, match="counts: expected finite numbers >= 0"):
        make(packed, counts=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="at least one position"):
        make(cw.pack_ids([]))


@settings(max_examples=20)
@given(ids=some_ids)
def test_large_alphabets_do_not_overflow_the_keys(ids: list[list[int]]) -> None:
    big = 3_000_000_000
    packed = cw.pack_ids([[big - i for i in word] for word in ids])
    graph = cw.distinct_graph(packed, factors=(4, 2))
    assert torch.equal(per_position(windows_of(graph), graph), reference.build_windows(packed, 8).inputs)
