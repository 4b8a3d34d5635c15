"""What the speedrun compares itself with is what it says: the post's network over windows, and counts."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import convwave as cw
from benchmarks import baselines, figures
from benchmarks.baselines import BASELINES, KneserNey
from convwave import reference


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_learns(name: str, words: cw.Words, vocab: cw.Vocabulary) -> None:
    few = BASELINES[name]._replace(steps=40, batch=128)
    before = baselines.train(words.words[:400], vocab, few._replace(steps=1), 0)
    after = baselines.train(words.words[:400], vocab, few, 0)
    assert baselines.loss(after, words.words[:400], vocab) < baselines.loss(before, words.words[:400], vocab) - 0.3
    again = baselines.train(words.words[:400], vocab, few, 0)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), again.parameters(), strict=True))


def test_the_network_is_the_posts(vocab: cw.Vocabulary, words: cw.Words) -> None:
    """Number for number, with the same weights."""
    net = baselines.network(len(vocab)).double().eval()
    mlp = reference.HierarchicalMLP(len(vocab), 10, 68).to(torch.float64).eval()
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in mlp.parameters())
    own = [layer for layer in net if isinstance(layer, nn.Embedding | nn.Linear | nn.BatchNorm1d)]
    with torch.no_grad():
        for p, q in zip([p for layer in own for p in layer.parameters()], mlp.parameters(), strict=True):
            p.copy_(q.T if p.ndim == 2 and p.shape != q.shape else q)
        windows = reference.build_windows(cw.pack(words.words[:50], vocab), 8)
        torch.testing.assert_close(net(windows.inputs), mlp(windows.inputs), rtol=1e-6, atol=1e-6)


class Plain:
    """Interpolated Kneser-Ney again, from dictionaries of strings."""

    def __init__(self, words: Sequence[str], letters: str, order: int, discounts: Sequence[float]) -> None:
        self.letters, self.order, self.discounts = letters, order, discounts
        raw = [defaultdict(lambda: defaultdict(int)) for _ in range(order + 1)]
        for word in words:
            text = "^" + word + "."
            for i in range(1, len(text)):
                for k in range(min(order, i) + 1):
                    raw[k][text[i - k : i]][text[i]] += 1
        self.counts = raw[:]
        for k in range(order):
            table = defaultdict(lambda: defaultdict(int))
            for context, following in raw[k + 1].items():
                for letter in following:
                    table[context[1:]][letter] += 1
            table |= {context: following for context, following in raw[k].items() if context.startswith("^")}
            self.counts[k] = table

    def probability(self, before: str, letter: str) -> float:
        p = 1 / len(self.letters)
        for k in range(min(self.order, len(before)) + 1):
            following = self.counts[k].get(before[len(before) - k :])
            if following is None:
                return p
            total, d = sum(following.values()), self.discounts[k]
            p = max(following.get(letter, 0) - d, 0) / total + d * len(following) / total * p
        return p


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_counts_are_interpolated_kneser_ney(order: int) -> None:
    draw = random.Random(order)
    words = ["".join(draw.choice("aaabbc") for _ in range(draw.randrange(8))) for _ in range(60)]
    vocabulary = cw.Vocabulary(".abcd")
    discounts = [draw.random() for _ in range(order + 1)]
    counted, plain = (
        make(words[:40], given, order, discounts) for make, given in ((KneserNey, vocabulary), (Plain, ".abcd"))
    )
    expected = [
        -math.log(plain.probability(f"^{word}"[: i + 1], letter))
        for word in words[40:]
        for i, letter in enumerate(word + ".")
    ]
    assert counted.loss(words[40:]) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    for before in ("^", "^ab", "^cabab"):
        assert sum(plain.probability(before, letter) for letter in ".abcd") == pytest.approx(1, rel=1e-12)


def test_names_without_a_cache_are_names(vocab: cw.Vocabulary) -> None:
    torch.manual_seed(0)
    mlp = reference.HierarchicalMLP(len(vocab)).eval()
    letters = figures.sample_windows(mlp, 300, 8, batch=128)
    names = torch.cat([name for name, _ in letters])
    assert int(names.min()) >= 0
    assert int(names.max()) < 300
    assert all(bool((drawn > 0).all()) for _, drawn in letters)
    # before training every token is about as likely: 1 in 27 letters ends a name
    assert len(names) / 300 == pytest.approx(26, rel=0.3)
