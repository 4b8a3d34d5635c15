"""Tier "cuda-graph": the same steps as the reference, and nothing in a step that a CUDA graph could not hold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import convwave as cw
from convwave.train import loop as training
from convwave.train.autograd import ConvolutionRun
from convwave.train.config import Config, UsageError
from convwave.train.cuda_graph import GraphedRun
from convwave.train.optim import orthogonalize, orthogonalize_together
from convwave.train.recipes import RECIPES
from convwave.train.tiers import available_tiers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def packed(words: cw.Words) -> cw.Packed:
    return cw.pack(words.words[:300], cw.Vocabulary.from_words(words.words))


def config(**options: object) -> Config:
    chosen = Config.make(recipe="full", tier="reference", steps=12, **options)  # type: ignore[arg-type]
    return replace(chosen, device=DEVICE, tier="cuda-graph")


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("shape", [(20, 68), (68, 20), (7, 7)])
def test_side_by_side_is_one_by_one(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape, dtype=torch.float64), torch.randn(68, 136, dtype=torch.float64)]
    for got, matrix in zip(orthogonalize_together(matrices, steps), matrices, strict=True):
        torch.testing.assert_close(got, orthogonalize(matrix, steps), rtol=1e-12, atol=1e-12)


def test_it_takes_the_steps_of_the_reference(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    """To rounding, which grows from step to step."""
    here = config()
    plain, graphed = ConvolutionRun(here, packed, vocab), GraphedRun(here, packed, vocab)
    expected, losses = plain.steps(0, 12), [*graphed.steps(0, 5), graphed.step(5), *graphed.steps(6, 12)]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 0.2
    for ours, theirs in zip(graphed.finish().parameters(), plain.finish().parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_it_resumes_in_the_same_bits(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    whole, first, second = (GraphedRun(config(), packed, vocab) for _ in range(3))
    expected = whole.steps(0, 12)
    losses = first.steps(0, 7)
    second.restore({name: value.clone() for name, value in first.state().items()})
    assert losses + second.steps(7, 12) == expected
    assert all(torch.equal(a, b) for a, b in zip(second.net.parameters(), whole.net.parameters(), strict=True))


@pytest.mark.parametrize("done", [0, 4])
def test_a_rehearsal_leaves_no_trace(packed: cw.Packed, vocab: cw.Vocabulary, done: int) -> None:
    """Neither before the first step, when the optimisers have no state yet, nor after some."""
    rehearsed, plain = (GraphedRun(config(), packed, vocab) for _ in range(2))
    assert rehearsed.steps(0, done) == plain.steps(0, done)
    rehearsed._rehearse()
    assert rehearsed.steps(done, 12) == plain.steps(done, 12)
    for ours, theirs in zip(rehearsed.net.state_dict().values(), plain.net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_adam_is_capturable_while_it_is_captured(
    packed: cw.Packed, vocab: cw.Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch warns of a step that is capturable and not captured, and refuses a captured one that is not."""
    run = GraphedRun(config(), packed, vocab)
    seen: list[list[bool]] = []
    capturable = partial(map, itemgetter("capturable"))
    monkeypatch.setattr(run, "_step", lambda: seen.append([*capturable(run.optimizers[1].param_groups)]))
    for name in ("CUDAGraph", "Stream", "current_stream", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for _ in range(2):  # again after a restart
        run._capture()
    assert seen == 2 * [[False], [False], [True]]


class _Watch(TorchDispatchMode):
    """Refuses what needs an answer from the device, or makes shapes out of values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "repeat_interleave", "bincount", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        assert not any(name.startswith(refused) for refused in self.REFUSED), name
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_host_nothing(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    run = GraphedRun(config(), packed, vocab)
    run._step()  # makes the consumers of the graph and the states of the optimisers
    with _Watch():
        run._step()


def test_the_loop_does_not_wait_for_every_step(words: cw.Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """With progress and savings too; on the way the losses are those of single steps."""
    few = words._replace(words=words.words[:300])
    asked: list[int] = []
    steps = GraphedRun.steps

    def noted(self: GraphedRun, first: int, stop: int) -> list[float]:
        asked.append(stop - first)
        return steps(self, first, stop)

    monkeypatch.setattr(GraphedRun, "steps", noted)
    monkeypatch.setattr(training, "_SECONDS", 1e9)
    monkeypatch.setattr(training, "_POINTS", 1)
    seen: list[int] = []

    class Watch(training.Reporter):
        def step(self, done: int, loss: float, positions: int) -> None:
            seen.append(done)

    result = training.train(config(), few, reporter=Watch())
    assert asked == [1, 2, 4, 5]
    assert seen == list(range(1, 13))
    run = GraphedRun(config(), cw.Corpus(few).train, cw.Corpus(few).vocabulary)
    assert result.losses == [run.step(i) for i in range(12)]


def test_who_takes_it() -> None:
    assert available_tiers("convwave", "full", "cuda") == ["cuda-graph", "reference"]
    assert available_tiers("convwave", "full", "cpu")[-2:] == ["cpu", "reference"]
    assert available_tiers("convwave", "fast", "cuda") == ["reference"]
    assert RECIPES["full"].batch_of == "text"
    with pytest.raises(UsageError, match="reads the whole text in every step, got 64"):
        Config.make(recipe="full", batch=64)


@pytest.mark.gpu
def test_through_the_front_door(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    """On CUDA by default, deterministic, as good as the reference."""
    chosen = Config.make(recipe="full", device="cuda")
    assert chosen.tier == "cuda-graph"
    first, second = (training.fit(chosen, packed, vocab) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    reference = training.fit(replace(chosen, tier="reference"), packed, vocab)
    graph = cw.distinct_graph(packed).to("cuda")
    with torch.no_grad():
        losses = [float(cw.loss(net(graph), graph)) for net in (first, reference)]
    assert losses[0] == pytest.approx(losses[1], abs=0.03)  # two histories of rounding
