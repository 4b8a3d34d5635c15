"""Keys that overflow, numbers that are not finite, the split: what small, tame examples never reach."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from torch.utils._pytree import tree_flatten

import convwave as cw
from convwave import reference
from convwave.data import graph as graphs
from convwave.data.batches import ContextSampler, Plan, StepReader
from convwave.data.graph import multiplicities
from tests.helpers import GRAPHS, per_position
from tests.test_frozen import windows_of


@pytest.mark.parametrize(("symbols", "factors"), [(512, (8,)), (520, (8, 2)), (2048, (6,)), (70_000, (4,))])
def test_contexts_whose_keys_pass_64_bits_stay_apart(symbols: int, factors: tuple[int, ...]) -> None:
    """Keys in base `symbols` would wrap: 512 ** 8 = 2 ** 72, and windows that differ in their oldest token collide."""
    tokens = list(range(1, symbols))
    same = [7] * (factors[0] - 1)
    ids = [tokens, *([oldest, *same] for oldest in (1, 2, 3, 5, 9, 257, symbols - 1)), [4, *same], [4, *same]]
    packed = cw.pack_ids(ids)
    graph = cw.distinct_graph(packed, factors=factors)
    assert torch.equal(per_position(windows_of(graph), graph), reference.build_windows(packed, graph.context).inputs)
    rows = windows_of(graph)
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert float(graph.weights[-1].sum()) == len(packed)


@pytest.mark.parametrize("block", [2**20, 128])
def test_numbering_columns_beyond_64_bits(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_distinct_columns` itself, with ids as far apart as its bound allows: it must renumber on the way."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    number = graphs.distinct_keys
    monkeypatch.setattr(graphs, "distinct_keys", lambda *args: calls.append(1) or number(*args))
    monkeypatch.setattr(graphs, "_BLOCK", block)
    for bound, k in ((2**31, 5), (2**40, 4), (3, 60)):
        values = torch.randint(0, bound, (k, 300), generator=generator)
        columns = values[:, torch.randint(0, 300, (900,), generator=generator)]
        calls.clear()
        count, ids = graphs._distinct_columns([row.__getitem__ for row in columns], 900, bound)
        assert len(calls) > 1, "the branch was reached"
        expected, inverse = torch.unique(columns, dim=1, return_inverse=True)
        assert count == expected.shape[1]
        pairs = set(zip(ids.tolist(), inverse.tolist(), strict=True))
        assert len(pairs) == count, "one number for each column, and one column for each number"


@pytest.mark.parametrize("factors", [(2, 2, 2), (4, 2), (3,), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("counted", [False, True])
def test_a_graph_made_in_blocks_is_the_same_graph(factors, counted: bool, packed: cw.Packed, monkeypatch) -> None:
    """Every tensor, whatever the blocks; a table and a sort number keys alike."""
    counts = torch.rand(len(packed), dtype=torch.float64).mul_(4).floor_() if counted else None
    whole = cw.distinct_graph(packed, counts=counts, factors=factors)
    for block in (1, 37, len(packed) - 1):
        monkeypatch.setattr(graphs, "_BLOCK", block)
        leaves, expected = (tree_flatten(g) for g in (cw.distinct_graph(packed, counts=counts, factors=factors), whole))
        assert leaves[1] == expected[1]
        assert all(torch.equal(a, b) for a, b in zip(leaves[0], expected[0], strict=True))
        monkeypatch.undo()


def test_a_table_numbers_keys_as_a_sort_does() -> None:
    keys = torch.randint(0, 40, (400,), generator=torch.Generator().manual_seed(0)) ** 2
    table, tree = graphs._unique(keys, 1600), graphs._unique(keys, 2**62)
    assert torch.equal(table[0], tree[0])
    assert torch.equal(table[1], tree[1])


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e-300])
def test_counts_that_are_no_counts_are_refused(make, bad: float) -> None:
    packed = cw.pack_ids([[1, 2], [3]])
    counts = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    make(packed, counts=counts)
    counts[3] = bad
    with pytest.raises(ValueError, match="counts: expected finite numbers >= 0"):
        make(packed, counts=counts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["embedding.weight", "blocks.1.conv.weight", "blocks.2.norm.running_var", "head.bias"])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float, tmp_path) -> None:
    model = cw.ConvWave(5, 3, [4, 6, 5], vocabulary=cw.Vocabulary(".abcd"))
    model.save(tmp_path / "good.safetensors")
    cw.load(tmp_path / "good.safetensors")
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = bad
    model.save(tmp_path / "bad.safetensors")
    with pytest.raises(cw.CheckpointError, match=name.replace(".", r"\.")):
        cw.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        *((2, (1, 0, 1)), (3, (2, 0, 1)), (4, (3, 0, 1)), (5, (4, 0, 1)), (6, (4, 1, 1)), (7, (5, 1, 1))),
        *((9, (7, 1, 1)), (10, (8, 1, 1)), (11, (8, 1, 2)), (14, (11, 1, 2)), (15, (12, 1, 2)), (19, (15, 2, 2))),
        *((33, (26, 3, 4)), (1_005, (804, 100, 101)), (32_033, (25_626, 3_203, 3_204))),
    ],
)
def test_the_split_rounds_down(words: int, sizes: tuple[int, int, int]) -> None:
    """80 and 90 % of the words, both cut, as in the post."""
    splits = cw.split_words([str(i) for i in range(words)])
    assert tuple(map(len, splits)) == sizes
    assert sorted(map(int, (word for split in splits for word in split))) == list(range(words))


DIGESTS = ["086e6a51953c", "97c1e29b69cb", "296a46d2eca9"]
POSITIONS = [57766, 7218, 7193]
NODES = [582, 16774, 25440]  # distinct contexts of each level


def test_the_bundled_list_is_split_as_names_txt_is() -> None:
    words = cw.data.bundled_words().words
    shuffled = list(words)
    random.seed(42)
    random.shuffle(shuffled)
    splits = cw.split_words(words)
    assert [*splits.train, *splits.val, *splits.test] == shuffled
    assert tuple(map(len, splits)) == (7_825, 978, 979)
    digests = [hashlib.sha256(" ".join(split).encode()).hexdigest()[:12] for split in splits]
    assert digests == DIGESTS
    vocabulary = cw.Vocabulary.from_words(words)
    assert [len(cw.pack(split, vocabulary)) for split in splits] == POSITIONS


def test_node_counts_of_the_bundled_list() -> None:
    words = cw.data.bundled_words().words
    packed = cw.pack(cw.split_words(words).train, cw.Vocabulary.from_words(words))
    assert [w.numel() for w in cw.distinct_graph(packed).weights] == NODES
    assert cw.dense_graph(packed).num_nodes == 3 * len(packed)
    assert cw.windowed_graph(packed).num_nodes == 7 * len(packed)


def test_multiplicities_of_a_graph_of_three_levels() -> None:
    """Written out: row 0 of level 1 is read three times, by rows that count 4, 10 and 4."""
    taps = [torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 1], [0, 1]])]
    weights = multiplicities(taps, torch.tensor([2.0, 5.0]), [2, 2, 2])
    assert [w.tolist() for w in weights] == [[18.0, 10.0], [4.0, 10.0], [2.0, 5.0]]


def test_a_sampler_of_one_size_has_one_stage() -> None:
    sampler = ContextSampler(torch.arange(1, 201), 20, 20, 50, 0.5, seed=0)
    sizes = [len(sampler(i)[0]) for i in range(50)]
    assert abs(sum(sizes) / 50 - 20) < 5 * 0.5 * 200**0.5 / 50
    with pytest.raises(ValueError, match="expected 1 <= first <= last, got 0 and 3"):
        ContextSampler(torch.ones(9), 0, 3, 5, 0.0, 0)
    with pytest.raises(ValueError, match="expected 1 <= first <= last, got 4 and 3"):
        ContextSampler(torch.ones(9), 4, 3, 5, 0.0, 0)


def test_windows_are_drawn_with_replacement_from_all_positions() -> None:
    """1,000 draws of 5 positions: each is drawn 200 times, give or take five standard deviations of 13."""
    packed = cw.pack_ids([[1, 2], [3]])
    reader = StepReader(Plan("windows", 1000, 1, 0), packed, 4, (2, 2), torch.Generator().manual_seed(0))
    graph = reader.graph(0)
    assert graph.totals[-1] == 1000
    assert len(graph.target_ids) == 1000
    drawn = torch.stack([windows_of(graph)[graph.inverse][:, -1], graph.target_ids], 1)
    pairs, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert pairs.tolist() == [[0, 1], [0, 3], [1, 2], [2, 0], [3, 0]]
    assert all(abs(int(n) - 200) < 5 * 12.7 for n in counts)
