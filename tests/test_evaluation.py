"""Exact evaluation: over the distinct graph of all splits at once, or of whole names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import convwave as cw
from convwave import reference
from convwave.ops import library
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


@pytest.mark.parametrize("factors", [(2,), (2, 2, 2), (2,) * 6, (4, 2), (3, 3), (2, 5, 5)])
def test_whole_names_are_the_network_over_windows(factors: tuple[int, ...], packed: cw.Packed) -> None:
    """In float64, which no kernel computes."""
    model = disturb(cw.ConvWave(27, 5, 9, factors=factors).double(), 0).eval()
    logp = F.log_softmax(model(cw.windowed_graph(packed, factors=factors)), 1).detach()
    network = model.embedding.weight, [block.level() for block in model.layers], model.head.weight, model.head.bias
    losses = -logp[torch.arange(len(packed)), packed.targets]
    torch.testing.assert_close(library.score_names(*network, packed, losses=False), logp, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(library.score_names(*network, packed), losses, rtol=1e-10, atol=1e-10)


def watched(model: cw.ConvWave) -> cw.ConvWave:
    model.head.register_forward_hook(lambda *_: None)
    return model


def half_eager(model: cw.ConvWave) -> cw.ConvWave:
    model.head = torch.nn.Sequential(torch.nn.Dropout(), model.head)  # type: ignore[assignment]
    return model


@pytest.mark.skipif("triton" not in library.available_backends(), reason="needs triton")
@pytest.mark.parametrize(
    ("model", "launches"),
    [
        (lambda: cw.ConvWave(27, 5, 20, backend="triton"), 1),
        (lambda: cw.ConvWave(27, 5, 20, backend="eager"), 0),
        (lambda: cw.ConvWave(27, 5, [20, 20, 129], backend="triton"), 0),
        (lambda: cw.ConvWave(27, 5, 20, backend="triton").double(), 0),
        (lambda: watched(cw.ConvWave(27, 5, 20, backend="triton")), 0),
        (lambda: half_eager(cw.ConvWave(27, 5, 20, backend="triton")), 0),
    ],
)
def test_one_launch_evaluates_whole_names_where_it_can(
    model: Callable[[], cw.ConvWave],
    launches: int,
    words: cw.Words,
    vocab: cw.Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CUDA device, or as on one: the CPU's own path says what to expect, and is put aside."""
    from convwave.kernels import score

    calls = []

    def counted(*args: Any, _own: Any = score.score_names, **options: Any) -> torch.Tensor:
        calls.append(args)
        return _own(*args, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(score, "score_names", counted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    splits = cw.split_words([*words.words[:50], *words.words[:5]])
    own = cw.EvaluationSet(splits, vocab, (2, 2, 2), "cpu")
    monkeypatch.setattr("convwave.infer.score.Inference", lambda _: None)
    prepared = cw.EvaluationSet(splits, vocab, (2, 2, 2), device)
    net = disturb(model(), 0).train()
    plain = cw.ConvWave(27, 5, net.widths).double()
    plain.load_state_dict({name.replace("head.1", "head"): value for name, value in net.state_dict().items()})
    expected, expected_nll = own.losses(plain), own.nll(plain)
    net.to(device)
    torch.testing.assert_close(prepared.nll(net).double().cpu(), expected_nll, rtol=1e-4, atol=1e-4)
    assert len(calls) == launches
    assert net.training
    for name, split in prepared.losses(net).items():
        assert split.positions == expected[name].positions
        assert split.loss == pytest.approx(expected[name].loss, abs=1e-4)
    with pytest.raises(ValueError, match="expected factors"):
        prepared.losses(cw.ConvWave(27, 5, 20, levels=2, backend=net.backend).to(device))
