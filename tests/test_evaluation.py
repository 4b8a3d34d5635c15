"""Exact evaluation over the distinct graph of all splits at once."""

from __future__ import annotations

import torch

import convwave as cw
from convwave import reference
from tests.helpers import randomize


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
