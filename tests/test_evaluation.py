"""Exact evaluation over the distinct graph of all splits at once."""

from __future__ import annotations

import copy

import pytest
import torch

import convwave as cw
from convwave import reference
from convwave.train import setup
from convwave.train.setup import recompute_statistics
from tests.helpers import GRAPHS, RELATIVE, disturb, randomize, relative_error


def test_losses_are_those_of_the_windowed_network_split_by_split(words: cw.Words, vocab: cw.Vocabulary) -> None:
    splits = cw.split_words(words.words[:2000])
    mlp = randomize(reference.HierarchicalMLP(len(vocab)).to(torch.float64), 0).eval()
    model = cw.from_windowed(mlp).train()  # it must evaluate in evaluation mode all the same
    losses = cw.EvaluationSet(splits, vocab, (2, 2, 2)).losses(model)
    assert model.training
    novel = [word for word in splits.val if word not in set(splits.train)]
    for name, chosen in {**splits._asdict(), "novel_val": novel}.items():
        windows = reference.build_windows(cw.pack(chosen, vocab), 8)
        assert losses[name].positions == len(windows.targets)
        assert losses[name].loss is not None
        assert abs(losses[name].loss - reference.split_loss(mlp, windows)) < 1e-10


def test_novel_names_of_the_post(names_txt: cw.Words) -> None:
    """13.2 % of the validation names also stand in the training split."""
    splits = cw.split_words(names_txt.words)
    train = set(splits.train)
    seen = sum(word in train for word in splits.val)
    assert round(100 * seen / len(splits.val), 1) == 13.2
    prepared = cw.EvaluationSet(splits, cw.Vocabulary.from_words(names_txt.words), (2, 2, 2))
    positions = {name: split.positions for name, split in prepared.losses(cw.ConvWave()).items()}
    assert positions == {"train": 182_625, "val": 22_655, "novel_val": 19_877, "test": 22_866}


def test_empty_splits_have_no_loss() -> None:
    words = ["ab", "ba"]
    vocab = cw.Vocabulary.from_words(words)
    losses = cw.EvaluationSet(cw.split_words(words), vocab, (2,)).losses(cw.ConvWave(3, levels=1))
    assert losses["val"] == (None, 0)
    assert losses["train"].positions == 3


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("make", GRAPHS)
def test_statistics_by_blocks_are_those_of_one_pass(
    make, unbiased: bool, packed: cw.Packed, vocab, monkeypatch
) -> None:
    """Counts of 0 in a whole block, widths and modes different on every level, float64."""
    counts = torch.arange(len(packed), dtype=torch.float64) % 3
    counts[:150] = 0
    graph = make(packed, counts=counts)
    model = cw.ConvWave(len(vocab), n_hidden=[5, 9, 3], unbiased=[unbiased, True, unbiased], momentum=[0.1, 0.2, 0.3])
    model = disturb(model.to(torch.float64), 0)
    model.layers[1].eval()
    blocks = copy.deepcopy(model)
    recompute_statistics(model, graph)
    monkeypatch.setattr(setup, "_BLOCK", 100)
    recompute_statistics(blocks, graph)
    for (name, one), other in zip(model.state_dict().items(), blocks.state_dict().values(), strict=True):
        assert relative_error(other, one) < RELATIVE, name
    assert [m.training for m in blocks.modules()] == [m.training for m in model.modules()]
    assert [block.norm.momentum for block in blocks.layers] == [0.1, 0.2, 0.3]
