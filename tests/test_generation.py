"""Cached generation equals full evaluation; sampling draws what it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convwave as cw
from convwave import reference
from convwave.infer.generate import GenerationCache, sample_ids
from tests.helpers import RELATIVE, randomize, relative_error

VOCAB = cw.Vocabulary(".abcd")


def network(factors: tuple[int, ...] = (2, 2, 2), seed: int = 0, head: float = 3.0) -> cw.ConvWave:
    generator = torch.Generator().manual_seed(seed)
    mlp = reference.HierarchicalMLP(5, 3, 9, factors=factors, generator=generator).to(torch.float64)
    model = cw.from_windowed(randomize(mlp, seed)).eval()
    with torch.no_grad():
        model.head.weight.mul_(head)
    model.vocabulary = VOCAB
    return model


@settings(max_examples=40)
@given(
    factors=st.sampled_from([(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2), (8,), (4, 2), (2, 3), (3, 2, 2)]),
    length=st.integers(1, 40),
    data=st.data(),
)
def test_any_cut_into_calls_gives_the_full_evaluation(factors, length: int, data) -> None:
    model = network(factors)
    ids = data.draw(st.lists(st.lists(st.integers(1, 4), min_size=length, max_size=length), min_size=1, max_size=4))
    packed = cw.pack_ids(ids)
    expected = model(cw.dense_graph(packed, factors=factors)).view(len(ids), length + 1, 5)
    tokens = packed.tokens.view(len(ids), length + 1)
    cache = GenerationCache(model, len(ids))
    parts, start = [], 0
    while start <= length:
        size = data.draw(st.integers(1, length + 1 - start))
        parts.append(cache.extend(tokens[:, start : start + size]))
        start += size
    assert relative_error(torch.cat(parts, 1), expected) < RELATIVE


def test_a_cache_is_a_copy_and_may_read_nothing() -> None:
    model = network()
    cache, same = GenerationCache(model, 2), GenerationCache(model, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tokens = torch.tensor([[0, 1], [0, 2]])
    assert cache.extend(tokens[:, :0]).shape == (2, 0, 5)
    assert torch.equal(cache.extend(tokens), same.extend(tokens))
    assert float(cache.extend(tokens).abs().max()) > 0


def test_sequences_can_leave_the_batch() -> None:
    model = network()
    tokens = torch.tensor([[0, 1, 2, 3, 1], [0, 4, 4, 1, 2], [0, 2, 2, 2, 2]])
    whole, cut = GenerationCache(model, 3), GenerationCache(model, 3)
    whole.extend(tokens[:, :3])
    cut.extend(tokens[:, :3])
    cut.keep(torch.tensor([True, False, True]))
    assert cut.batch == 2
    assert relative_error(cut.extend(tokens[[0, 2], 3:]), whole.extend(tokens[:, 3:])[[0, 2]]) < RELATIVE


def test_first_letters_follow_the_networks_probabilities() -> None:
    """20,000 draws against the exact distribution: within five standard deviations for every letter."""
    model = network()
    probability = model(cw.dense_graph(cw.pack_ids([[]]))).softmax(1)[0]
    ids = sample_ids(model, 20_000, generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(ids[:, 0], minlength=5) / 20_000
    deviation = (probability * (1 - probability) / 20_000).sqrt()
    assert bool(((frequency - probability).abs() < 5 * deviation).all())


def test_second_letters_follow_too() -> None:
    model = network()
    ids = sample_ids(model, 20_000, generator=torch.Generator().manual_seed(1))
    letter = int(ids[:, 0][ids[:, 0] > 0].mode().values)
    first = ids[ids[:, 0] == letter]
    probability = model(cw.dense_graph(cw.pack_ids([[letter]]))).softmax(1)[1]
    frequency = torch.bincount(first[:, 1], minlength=5) / len(first)
    assert len(first) > 500
    deviation = (probability * (1 - probability) / len(first)).sqrt()
    assert bool(((frequency - probability).abs() < 5 * deviation).all())


def test_seed_prefix_temperature_and_top_k() -> None:
    model = network()
    names = cw.sample(model, 50, seed=1)
    assert names == cw.sample(model, 50, seed=1)
    assert names != cw.sample(model, 50, seed=2)
    assert all(set(name) <= set("abcd") for name in names)
    assert all(name.startswith("bad") for name in cw.sample(model, 50, prefix="bad"))
    greedy = cw.sample(model, 5, temperature=0, max_length=12)
    assert len(set(greedy)) == 1
    assert greedy == cw.sample(model, 5, top_k=1, max_length=12)
    assert greedy == cw.sample(model, 5, temperature=1e-40, max_length=12)
    assert greedy == cw.sample(model, 5, temperature=1e-300, max_length=12)
    assert len(cw.sample(model, 20, batch=3)) == 20
    cold, hot = (len(set(cw.sample(model, 300, temperature=t, max_length=6))) for t in (0.2, 3.0))
    assert cold < hot
    assert cw.sample(model, 0) == []


def test_top_k_draws_only_the_likeliest() -> None:
    model = network()
    logits = model(cw.dense_graph(cw.pack_ids([[]])))[0]
    drawn = sample_ids(model, 500, generator=torch.Generator().manual_seed(0), top_k=2)[:, 0]
    assert set(drawn.tolist()) == set(logits.topk(2).indices.tolist())


def test_names_are_cut_at_the_maximal_length() -> None:
    model = network()
    with torch.no_grad():
        model.head.bias[0] = -1e9  # never ends
    assert all(len(name) == 7 for name in cw.sample(model, 10, max_length=7))
    assert cw.sample(model, 3, prefix="abc", max_length=3) == ["abc"] * 3
    with torch.no_grad():
        model.head.bias[0] = 1e9  # ends at once
    assert cw.sample(model, 3) == ["", "", ""]
    assert cw.sample(model, 3, prefix="ab") == ["ab"] * 3


def test_bad_arguments_are_named() -> None:
    model = network()
    for arguments, reason in [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"max_length": 0}, "max_length: expected at least 1, got 0"),
        ({"prefix": "abc", "max_length": 2}, "max_length: expected at least 3, got 2"),
        ({"prefix": "z"}, "character 'z'"),
        ({"prefix": "a."}, "reserved"),
        ({"prefix": "\udcff"}, r"character '\\udcff' is not among"),
        ({"count": -1}, "count: expected at least 0, got -1"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"seed": 2**64}, r"seed: expected 0 to 2\*\*64 - 1, got 18446744073709551616"),
        ({"seed": -1}, "seed: expected 0"),
        ({"vocabulary": cw.Vocabulary(".a")}, "vocabulary: expected 5 symbols as the model has, got 2"),
        ({"vocabulary": cw.Vocabulary(".abcdxyz"), "prefix": "z"}, "vocabulary: expected 5 symbols"),
    ]:
        with pytest.raises(ValueError, match=reason):
            cw.sample(model.train(), **{"count": 0, **arguments})
        assert model.training
    with pytest.raises(ValueError, match="evaluation mode"):
        GenerationCache(network().train(), 1)
    model.vocabulary = None
    with pytest.raises(ValueError, match="vocabulary"):
        cw.sample(model, 1)


def test_the_largest_seed_draws() -> None:
    assert cw.sample(network(), 5, seed=2**64 - 1) != cw.sample(network(), 5, seed=2**64 - 2)


def test_unique_and_excluded_names() -> None:
    model = network()
    every = cw.sample(model, 400, max_length=3)
    unique = cw.sample(model, 60, max_length=3, unique=True)
    assert len(unique) == len(set(unique)) == 60
    assert unique == cw.sample(model, 60, max_length=3, unique=True)
    excluded = set(every[:200])
    others = cw.sample(model, 40, max_length=3, exclude=excluded)
    assert len(others) == 40
    assert excluded.isdisjoint(others)
    assert len(set(others)) < 40, "names may repeat unless unique is asked for"
    assert cw.sample(model, 400, max_length=3) == every


def test_sampling_gives_up_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convwave.infer.generate.FRUITLESS", 200)
    model = network()
    assert len(cw.sample(model, 3, temperature=0, max_length=4, unique=True)) == 1
    only = cw.sample(model, 1, temperature=0, max_length=4)
    assert cw.sample(model, 3, temperature=0, max_length=4, exclude=only) == []
    assert len(cw.sample(model, 100, max_length=1, unique=True)) <= 5


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_draw_nothing(value: float, temperature: float) -> None:
    model = network()
    with torch.no_grad():
        model.head.bias[1] = value
    with pytest.raises(ValueError, match="its logits are not finite"):
        cw.sample(model, 2, temperature=temperature)
    with torch.no_grad():
        model.head.bias[1] = -float("inf")  # a letter that may not be
    assert not any("a" in name for name in cw.sample(model, 50, temperature=temperature, max_length=9))


def test_a_context_that_no_memory_holds_is_refused() -> None:
    model = cw.ConvWave(5, 1, 1, levels=30, vocabulary=VOCAB)
    with pytest.raises(ValueError, match="context of 1,073,741,824 tokens"):
        cw.sample(model, 1)
