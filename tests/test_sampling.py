"""Frequencies of what is drawn against exact probabilities, by chi-square with a bound that is derived here."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import convwave as cw
from convwave.infer.generate import sample_ids
from tests.test_generation import network

DRAWS = 20_000
UNLIKELY = 1e-9  # a right sampler fails a test once in 10 ** 9 seeds


def chance(observed: Tensor, probability: Tensor) -> float:
    """An upper bound of the chance that draws of these probabilities differ from them by as much as these counts.

    Pearson's statistic of m classes has, of many draws, the chi-square distribution of m - 1 degrees of freedom. With
    an even number 2 a of them it exceeds x with probability ``exp(-x / 2) sum_(i < a) (x / 2) ** i / i!`` (the waiting
    time of a Poisson process); an odd number exceeds x less often than the next even one.
    """
    possible = probability > 0
    if bool((observed[~possible] > 0).any()):
        return 0.0
    expected = probability[possible] * observed.sum()
    assert bool((expected > 5).all()), "too few draws of some class for the approximation"
    half = float(((observed[possible] - expected).square() / expected).sum()) / 2
    pairs = math.ceil((int(possible.sum()) - 1) / 2)
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(max(pairs, 1)))


def test_the_bound_itself() -> None:
    """Right draws pass, and draws 5 % off do not."""
    probability = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    smallest = 1.0
    for _ in range(200):
        drawn = torch.multinomial(probability, DRAWS, replacement=True, generator=generator)
        smallest = min(smallest, chance(torch.bincount(drawn, minlength=5).double(), probability))
    assert 1e-6 < smallest < 0.2
    assert chance(torch.tensor([9_500.0, 4_250, 4_150, 2_100, 0]).double(), probability) < UNLIKELY
    assert chance(torch.tensor([10_000.0, 4_000, 4_000, 1_999, 1]).double(), probability) == 0
    assert chance(torch.tensor([60.0, 40.0]).double(), torch.tensor([0.5, 0.5]).double()) > 0.05


def exact(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Probabilities of the next token, computed without the library."""
    kept = logits.double().clone()
    if top_k is not None:
        kept[logits < logits.sort(descending=True).values[top_k - 1]] = -math.inf
    weight = (kept / temperature - (kept / temperature).max()).exp()
    return weight / weight.sum()


@pytest.mark.parametrize("top_k", [None, 2, 3, 4, 50])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_letters_follow_temperature_and_top_k_together(temperature: float, top_k: int | None) -> None:
    model = network(head=1.0)
    generator = torch.Generator().manual_seed(0)
    ids = sample_ids(model, DRAWS, generator=generator, temperature=temperature, top_k=top_k, max_length=2)
    k = None if top_k is None or top_k > 5 else top_k
    logits = model(cw.dense_graph(cw.pack_ids([[]])))[0].detach()
    assert chance(torch.bincount(ids[:, 0], minlength=5).double(), exact(logits, temperature, k)) > UNLIKELY
    letter = Counter(ids[:, 0][ids[:, 0] > 0].tolist()).most_common(1)[0][0]
    second = ids[ids[:, 0] == letter][:, 1]
    logits = model(cw.dense_graph(cw.pack_ids([[letter]])))[1].detach()
    assert len(second) > 3000
    assert chance(torch.bincount(second, minlength=5).double(), exact(logits, temperature, k)) > UNLIKELY


@pytest.mark.parametrize(("batch", "temperature", "top_k"), [(None, 1.0, None), (500, 1.0, None), (500, 1.5, 3)])
def test_whole_names_follow_the_network(batch: int | None, temperature: float, top_k: int | None) -> None:
    """Names of up to two letters, from one batch or many."""
    model = network(head=1.0)
    count = DRAWS if batch is None else 10_000
    options = {"temperature": temperature, "top_k": top_k, "max_length": 2, "batch": batch}
    names = Counter(cw.sample(model, count, seed=3, **options))
    probability = {}
    first = exact(model(cw.dense_graph(cw.pack_ids([[]])))[0].detach(), temperature, top_k)
    for a in range(5):
        if a == 0:
            probability[""] = float(first[0])
            continue
        second = exact(model(cw.dense_graph(cw.pack_ids([[a]])))[1].detach(), temperature, top_k)
        for b in range(5):
            probability[".abcd"[a] + (".abcd"[b] if b else "")] = float(first[a] * second[b])
    likely = [name for name, p in probability.items() if p * count > 10]
    rest = max(0.0, 1 - sum(probability[name] for name in likely))
    observed = [names[name] for name in likely]
    if rest * count > 10:
        likely.append("the others")
        observed.append(count - sum(observed))
    expected = torch.tensor([probability.get(name, rest) for name in likely], dtype=torch.float64)
    assert chance(torch.tensor(observed, dtype=torch.float64), expected / expected.sum()) > UNLIKELY
    assert set(names) <= {name for name, p in probability.items() if p > 0}


def test_batches_do_not_repeat_one_another() -> None:
    """The draws go on from batch to batch: three batches of 40 long names hold no name twice."""
    model = network(head=0.3)
    with torch.no_grad():
        model.head.bias[0] = -1e9
    names = cw.sample(model, 120, seed=0, batch=40, max_length=24)
    assert len(set(names)) == 120
    again = cw.sample(model, 120, seed=0, batch=40, max_length=24)
    assert names == again
    assert cw.sample(model, 90, seed=0, batch=40, max_length=24)[:80] == names[:80]


def test_a_batch_continues_the_generator_of_the_last() -> None:
    model = network(head=1.0)
    generator = torch.Generator().manual_seed(11)
    expected = []
    for count in (30, 30, 15):
        ids = sample_ids(model, count, generator=generator, max_length=9)
        expected += ["".join(".abcd"[i] for i in row if i) for row in ids.tolist()]
    assert cw.sample(model, 75, seed=11, batch=30, max_length=9) == expected


@pytest.mark.parametrize("prefix", ["a", "dab"])
def test_letters_behind_a_prefix_follow_the_network(prefix: str) -> None:
    model = network(head=1.0)
    names = cw.sample(model, DRAWS, seed=2, prefix=prefix, max_length=len(prefix) + 1, temperature=0.8)
    assert all(name.startswith(prefix) for name in names)
    following = Counter(name[len(prefix) :] for name in names)
    observed = torch.tensor([following[letter] for letter in ("", "a", "b", "c", "d")], dtype=torch.float64)
    ids = [".abcd".index(letter) for letter in prefix]
    logits = model(cw.dense_graph(cw.pack_ids([ids])))[len(prefix)].detach()
    assert chance(observed, exact(logits, 0.8, None)) > UNLIKELY
