"""The compiled loops of tier "fused" against float64, its batches and states against those of tier "cpu"."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convwave as cw
from convwave.data.batches import Batch, Plan, StepReader, graph_batch
from convwave.infer.score import EvaluationSet
from convwave.train import tiers
from convwave.train.closed_form import ClosedForm, ClosedFormRun
from convwave.train.config import Config, UsageError
from convwave.train.loop import Reporter, train
from convwave.train.optim import make_optimizers, orthogonalize
from convwave.train.recipes import FAST, RECIPES
from convwave.train.setup import recompute_statistics
from convwave.train.tiers import TIERS, available_tiers, begin, choose_tier
from tests.helpers import GRAPHS

for module in TIERS["fused"].packages:
    pytest.importorskip(module, reason=f"needs {module}: pip install 'convwave[fast]'")

import numba  # noqa: E402
import numpy as np  # noqa: E402

from convwave.ops import compiled, loops  # noqa: E402
from convwave.train.fused import FusedRun, Parameters, Parts  # noqa: E402

UNIT = 2.0**-24  # of float32: half of what 1 and the next number differ by
F32 = np.float32


@pytest.fixture(scope="module")
def few(words: cw.Words) -> cw.Words:
    return words._replace(words=words.words[:400])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def relative(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number expected."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300))


# ---------------------------------------------------------------------------------------------------------------------
# Functions of one number


def mapped(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    @numba.njit
    def fill(x: np.ndarray, out: np.ndarray) -> None:
        for i in range(x.size):
            out[i] = function(x[i])

    def call(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        fill(x, out)
        return out

    return call


def all_floats(low: float, high: float, step: int = 1) -> Any:
    """Every `step`-th float32 from low to high, a piece at a time."""
    first, last = np.array([low, high], F32).view(np.int32)
    for start in range(first, last, step << 22):
        yield np.arange(start, min(start + (step << 22), last + 1), step, dtype=np.int32).view(F32)


def test_tanh_on_every_float32() -> None:
    """Below 2^-12 it is x: tanh(x) = x (1 - x^2 / 3 + ..) is as near to x as rounding."""
    tanh = mapped(loops.tanh)
    worst = 0.0
    for x in all_floats(2.0**-12, 9.1):
        t = tanh(x).astype(np.float64)
        worst = max(worst, float(np.abs(t / np.tanh(x.astype(np.float64)) - 1).max()))
        assert t.max() <= 1
    assert worst < 6 * UNIT
    small = np.concatenate(list(all_floats(0, 2.0**-12, 1009)))
    assert np.all(np.abs(tanh(small) - small.astype(np.float64)) <= 2 * UNIT * small)
    tiny = np.array([0.0, 1e-45, 1e-40, 1e-30, 1e-10], F32)
    assert np.array_equal(tanh(tiny), tiny)
    x = np.concatenate([small, normal(10_000) * 4])
    assert np.array_equal(tanh(-x).view(np.int32), (-tanh(x)).view(np.int32)), "odd, the sign of 0 too"
    ends = tanh(np.array([9.01, 9.1, 1e30, np.inf, -9.01, -np.inf, np.nan], F32))
    assert ends[:4].tolist() == [1.0] * 4
    assert ends[4:6].tolist() == [-1.0] * 2
    assert np.isnan(ends[6])


def test_exp_of_negative_numbers() -> None:
    exp = mapped(loops.exp_of_negative)
    worst = 0.0
    for x in all_floats(2.0**-30, 87, 7):
        worst = max(worst, float(np.abs(exp(-x) / np.exp(-x.astype(np.float64)) - 1).max()))
    assert worst < 4 * UNIT
    assert exp(np.array([0.0, -0.0], F32)).tolist() == [1.0, 1.0]
    low = exp(np.array([-87.0, -88.0, -1e30, -np.inf], F32))
    assert np.all(low == low[0])
    assert low[0] > np.finfo(F32).tiny
    assert np.isnan(exp(np.array([np.nan], F32))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Loops


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 7, 3), (68, 10, 27), (300, 68, 68)])
def test_products(m: int, k: int, n: int) -> None:
    a, b, before = normal(m, k), normal(k, n, seed=1), normal(m, n, seed=2)
    bound = (k + 2) * UNIT * (np.abs(a).astype(float) @ np.abs(b) + np.abs(before))
    for a_transposed in (False, True):
        for b_transposed in (False, True):
            left = np.ascontiguousarray(a.T) if a_transposed else a
            right = np.ascontiguousarray(b.T) if b_transposed else b
            for beta in (0.0, 1.0):
                wide = np.full((m, n + 3), 7, F32)  # rows that lie apart, as the blocks of logits do
                out = wide[:, :n]
                out[:] = before if beta else np.nan
                loops.product(left, a_transposed, right, b_transposed, beta, out)
                expected = a.astype(np.float64) @ b + beta * before
                assert np.all(np.abs(out - expected) <= bound)
                assert np.all(wide[:, n:] == 7)


def test_rows_are_added_with_their_counts() -> None:
    for rows, width in ((1, 1), (64, 3), (65, 68), (1000, 27)):
        counts, p, before = np.abs(normal(rows)).astype(np.float64), normal(rows, width, seed=1), normal(width, seed=2)
        out = before.copy()
        loops._add_rows(counts, p, out)
        terms = counts[:, None] * p
        bound = (loops.CHUNK + rows / loops.CHUNK + 2) * UNIT * (np.abs(terms).sum(0) + np.abs(before))
        assert np.all(np.abs(out - before - terms.sum(0)) <= bound)


def random_part(level_rows: int, below: int, seed: int = 0) -> loops.Part:
    """A level whose taps read rows at random, of the first and the last three quarters of those below."""
    generator = np.random.default_rng(seed)
    part = compiled.room(1, below, level_rows, 0)
    share = max(3 * below // 4, 1)
    part.rows[0] = level_rows
    part.ranges[0] = [[0, share], [below - share, below]]
    part.taps[0] = generator.integers(0, share, (2, level_rows))
    part.weights[0] = generator.integers(0, 4, level_rows) + 1
    part.totals[0] = part.weights[0].sum()
    return part


@pytest.mark.parametrize(("rows", "below", "channels", "width"), [(2, 1, 1, 1), (7, 5, 3, 9), (300, 200, 10, 68)])
def test_a_level_forward_and_backward(rows: int, below: int, channels: int, width: int) -> None:
    part, x = random_part(rows, below), normal(below, channels)
    matrices, norm, dh = normal(2, channels, width), normal(2, width, seed=3), normal(rows, width, seed=4)
    products = np.full((2, below, width), np.nan, F32)
    z, mean, var = np.full((rows, width), np.nan, F32), np.empty(width, F32), np.empty(width, F32)
    loops._normalise(x, matrices, part, 0, products, z, mean, var)

    x64 = torch.from_numpy(x).double()
    ranges = [x64[begin:end] for begin, end in part.ranges[0]]
    parts = [read @ torch.from_numpy(w).double() for read, w in zip(ranges, matrices, strict=True)]
    pre = sum(p[torch.from_numpy(t).long()] for p, t in zip(parts, part.taps[0], strict=True))
    assert isinstance(pre, Tensor)
    weights, total = torch.from_numpy(part.weights[0]).double()[:, None], part.totals[0]
    mean64 = (weights * pre).sum(0) / total
    var64 = (weights * (pre - mean64) ** 2).sum(0) / (total - 1)
    scale = float(pre.abs().max())
    terms = channels + loops.CHUNK + rows
    assert np.abs(mean - mean64.numpy()).max() < terms * UNIT * scale
    assert np.abs(z - (pre - mean64).numpy()).max() < terms * UNIT * scale
    assert np.abs(var - var64.numpy()).max() < 4 * terms * UNIT * scale**2

    unkept = np.full((loops.CHUNK, width), np.nan, F32)
    again = np.empty((2, width), F32)
    loops._normalise(x, matrices, part, 0, products, unkept, again[0], again[1])
    if rows > loops.CHUNK:
        assert np.array_equal(again, [mean, var]), "nothing depends on whether deviations are kept"

    rstd, by = np.empty(width, F32), np.empty(width, F32)
    loops._scales(norm, var, 1e-5, rstd, by)
    assert relative(rstd, (var.astype(np.float64) + 1e-5) ** -0.5) < 4 * UNIT
    assert relative(by, norm[0].astype(np.float64) * rstd) < 2 * UNIT
    h = np.empty_like(z)
    loops._activate(z, norm[1], by, h)
    assert relative(h, np.tanh(norm[1] + by.astype(np.float64) * z)) < 10 * UNIT * max(1, np.abs(by * z).max())

    g, dbeta, dgamma = dh.copy(), np.zeros(width, F32), np.zeros(width, F32)
    loops._before_tanh(g, h, z, dbeta, dgamma)
    exact = dh * (1 - h.astype(np.float64) ** 2)
    assert np.abs(g - exact).max() < 4 * UNIT * np.abs(dh).max()
    assert np.abs(dbeta - exact.sum(0)).max() < terms * UNIT * np.abs(dh).sum(0).max()
    assert np.abs(dgamma - (exact * z).sum(0)).max() < terms * UNIT * np.abs(dh * z).sum(0).max()

    a, b = normal(width, seed=5), normal(width, seed=6)
    q = np.zeros((2, below, width), F32)
    loops._scatter(g, z, part.weights[0], part.taps[0], a, b, q)
    moved = g - part.weights[0][:, None].astype(np.float64) * (a + b.astype(np.float64) * z)
    expected = np.zeros(q.shape)
    for j in range(2):
        np.add.at(expected[j], part.taps[0, j], moved)
    assert relative(q, expected) < terms * UNIT


def test_the_head_over_several_blocks() -> None:
    """600 rows are three blocks of 256, the last of them smaller."""
    rows, width, tokens = 600, 9, 27
    part = compiled.room(1, tokens, rows, 2 * rows)
    generator = np.random.default_rng(0)
    part.rows[:] = rows, 2 * rows
    part.weights[0] = 2 + generator.random(rows)
    part.target_rows[:] = np.repeat(np.arange(rows), 2)
    part.target_ids[:] = generator.integers(0, tokens, 2 * rows)  # of which some are equal
    part.target_counts[:] = np.repeat(part.weights[0], 2) / 2
    part.totals[0] = part.weights[0].sum(dtype=np.float64)
    arrays = [normal(tokens, 3), normal(1, 2, width), normal(tokens, width), normal(tokens)]
    net = loops.Network(*arrays, normal(2, 3, width), np.empty((0, 2, width, width), F32))
    grad = loops.Network(*(np.full_like(array, np.nan) for array in net))
    z, scale = normal(rows, width), np.abs(normal(width, seed=2))
    dh, dgamma = np.full_like(z, np.nan), np.full_like(scale, np.nan)
    loss = loops._top(net, grad, part, z, scale, dh, dgamma)

    leaves = [torch.from_numpy(t).double().requires_grad_() for t in (net.norms[0, 1] + scale * z, net.head, net.bias)]
    logits = torch.tanh(leaves[0]) @ leaves[1].T + leaves[2]
    nll = -logits.log_softmax(1)[torch.from_numpy(part.target_rows).long(), torch.from_numpy(part.target_ids).long()]
    expected = (nll * torch.from_numpy(part.target_counts)).sum() / part.totals[0]
    expected.backward()
    assert abs(loss / expected.item() - 1) < 4 * UNIT
    for got, leaf in ((dh, leaves[0]), (grad.head, leaves[1]), (grad.bias, leaves[2])):
        assert leaf.grad is not None
        assert relative(got, leaf.grad) < 50 * UNIT
    assert relative(grad.norms[0, 1], dh.sum(0, dtype=np.float64)) < 50 * UNIT
    assert relative(dgamma, (dh * z).sum(0, dtype=np.float64)) < 50 * UNIT


@pytest.mark.parametrize(("rows", "columns"), [(20, 68), (136, 68), (68, 68), (2, 1), (2, 3)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_orthogonalize_is_that_of_muon(rows: int, columns: int, steps: int) -> None:
    matrix, least = normal(rows, columns), min(rows, columns)
    got = loops.orthogonalize(matrix.copy(), np.empty_like(matrix), np.empty((2, least, least), F32), steps)
    exact = orthogonalize(torch.from_numpy(matrix.T).double(), steps).T
    peer = relative(orthogonalize(torch.from_numpy(matrix.T), steps).T, exact)
    assert relative(got, exact) < 4 * max(peer, 8 * UNIT)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def network(vocab_size: int, n_embd: int = 10, n_hidden: int = 24, levels: int = 3) -> cw.ConvWave:
    """In float32, no parameter neutral."""
    generator = torch.Generator().manual_seed(n_hidden)
    model = cw.ConvWave(vocab_size, n_embd, n_hidden, levels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.train()


def autograd(model: cw.ConvWave, graph: cw.Graph) -> dict[str, Tensor]:
    """Loss and gradients in the model's precision, in training mode."""
    model.zero_grad()
    loss = cw.loss(model(graph), graph)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def work_for(part: loops.Part, model: cw.ConvWave) -> loops.Work:
    rows, L, H = max(int(part.rows[:-1].max()), model.vocab_size), model.levels, model.widths[0]
    return loops.Work(*(np.full((n, rows, H), np.nan, F32) for n in (L, L, 2, 2)))


def gradients(model: cw.ConvWave, part: loops.Part) -> dict[str, Tensor]:
    weights = Parameters(model)
    for row in (weights.vectors[1], weights.matrices[1]):
        row[:] = np.nan
    loss = loops.gradients(weights.net, weights.grad, part, work_for(part, model), weights.eps)
    return {"loss": torch.tensor(loss)} | weights.named(1)


def assert_as_exact(got: dict[str, Tensor], model: cw.ConvWave, graph: cw.Graph) -> None:
    """Float64's loss and gradients, with at most four times the error of PyTorch in float32."""
    peer = autograd(model, graph)
    exact = autograd(model.double(), graph)
    model.float()
    assert got.keys() == exact.keys()
    largest = max(float(g.abs().max()) for g in exact.values())

    def worst(values: dict[str, Tensor]) -> float:
        return max(float((values[name] - exact[name]).abs().max()) for name in exact) / largest

    # where PyTorch is exact by luck: a sum of some hundred terms of either sign
    assert worst(got) < 4 * max(worst(peer), 32 * UNIT)


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize(("n_embd", "n_hidden", "levels"), [(10, 68, 3), (3, 7, 1), (1, 1, 2), (5, 27, 4), (24, 16, 3)])
def test_gradients_are_those_of_autograd(make, n_embd, n_hidden, levels, packed: cw.Packed, vocab) -> None:
    model = network(len(vocab), n_embd, n_hidden, levels)
    counts = torch.randint(0, 3, (len(packed),), generator=torch.Generator().manual_seed(1))
    graph = make(packed, levels, counts=counts)
    assert_as_exact(gradients(model, compiled.part_of(graph, len(vocab))), model, graph)


def test_a_part_of_two_rows(vocab: cw.Vocabulary) -> None:
    graph = cw.distinct_graph(cw.pack(["", "a"], vocab))
    model = network(len(vocab), n_hidden=5)
    assert_as_exact(gradients(model, compiled.part_of(graph, len(vocab))), model, graph)


def test_no_step_reads_what_another_left(packed: cw.Packed, vocab) -> None:
    """All memory is NaN before the first step; a larger part leaves numbers behind."""
    model, weights = network(len(vocab)), Parameters(network(len(vocab)))
    large, small = (
        compiled.part_of(cw.distinct_graph(p), len(vocab)) for p in (packed, packed.select(torch.arange(9)))
    )
    work = work_for(large, model)
    results = []
    for part in (large, small, large, small):
        loss = loops.gradients(weights.net, weights.grad, part, work, weights.eps)
        results.append((loss, weights.vectors[1].copy(), weights.matrices[1].copy()))
    for a, b in zip(results[:2], results[2:], strict=True):
        assert a[0] == b[0]
        assert all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def test_networks_that_the_loops_do_not_compute_are_refused() -> None:
    for model in (
        cw.ConvWave(factors=(4, 2)),
        cw.ConvWave(n_hidden=[5, 6, 7]),
        cw.ConvWave(unbiased=False),
        cw.ConvWave(eps=[1e-5, 1e-5, 1e-4]),
        cw.ConvWave(statistics="positions"),
        cw.ConvWave().double(),
    ):
        with pytest.raises(ValueError, match="model: expected float32, two taps at every level"):
            Parameters(model)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def windows_of(part: loops.Part) -> np.ndarray:
    """Window, weight and targets of every top row, in lexicographic order: the part whatever the order of its rows."""
    levels = part.totals.size
    windows = part.taps[0, :, : part.rows[0]].T
    for level in range(1, levels):
        rows = part.taps[level, :, : part.rows[level]] + part.ranges[level, :, :1]
        windows = np.concatenate([windows[tap] for tap in rows], 1)
    targets = np.zeros((part.rows[levels - 1], 64))
    used = slice(0, part.rows[levels])
    np.add.at(targets, (part.target_rows[used], part.target_ids[used]), part.target_counts[used])
    return np.unique(np.concatenate([windows, part.weights[-1, : len(windows), None], targets], 1), axis=0)


def assert_same_batch(part: loops.Part, batch: Batch) -> None:
    levels = len(batch.taps)
    assert part.rows[:levels].tolist() == [weights.numel() for weights in batch.weights]
    assert part.totals.tolist() == pytest.approx(list(batch.totals), rel=1e-6)
    assert part.ranges.tolist() == [[list(of_tap) for of_tap in ranges] for ranges in batch.ranges]
    for level, (taps, weights) in enumerate(zip(batch.taps, batch.weights, strict=True)):
        assert np.array_equal(part.taps[level, :, : taps.shape[1]], taps.numpy())
        assert relative(part.weights[level, : weights.numel()], weights) < 200 * UNIT  # torch adds up in float32
    targets = np.zeros(batch.targets.shape)
    used = slice(0, part.rows[levels])
    assert np.all(np.diff(part.target_rows[used]) >= 0)
    np.add.at(targets, (part.target_rows[used], part.target_ids[used]), part.target_counts[used])
    assert relative(targets, batch.targets) < 16 * UNIT


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "plan", ["contexts", "grown", "more contexts than names", "names", "all names", "noise", "text"]
)
def test_parts_are_the_batches_of_the_other_tiers(plan: str, levels: int, packed: cw.Packed, vocab) -> None:
    plans = {
        "contexts": Plan("contexts", 60, 12, 1, 1.0, 0.7),
        "grown": Plan("contexts", 40, 12, 2, 3.0, 0.5),
        "more contexts than names": Plan("contexts", 150, 12, 1, 1.0, 0.7),
        "names": Plan("names", 25, 12, 3),
        "all names": Plan("names", 10_000, 12, 3),
        "noise": Plan("names", 25, 12, 3, token_noise=0.3),
        "text": Plan("text", 1, 12, 3),
    }
    readers = [
        StepReader(plans[plan], packed, len(vocab), (2,) * levels, torch.Generator().manual_seed(4)) for _ in range(2)
    ]
    parts = Parts(readers[0])
    for i in (0, 1, 2, 5, 11):
        part = parts(i)
        if plan in ("all names", "text"):  # rows below are in another order
            whole = compiled.part_of(readers[1].everything, len(vocab))
            assert np.array_equal(windows_of(part), windows_of(whole))
            assert part.totals.tolist() == whole.totals.tolist()
            sums = [weights[:n].sum() for weights, n in zip(part.weights, part.rows, strict=False)]
            assert sums == pytest.approx(part.totals.tolist())
        else:
            assert_same_batch(part, readers[1].batch(i))


def test_the_parts_of_a_whole_sprint(names_txt: cw.Words) -> None:
    """Every 7th of 200 steps: phases pass whole numbers at the same steps."""
    corpus = cw.Corpus(names_txt)
    config = Config.make(recipe="sprint", tier="fused")
    run = begin(config, corpus.train, corpus.vocabulary)
    assert isinstance(run, FusedRun)
    for i in range(0, 200, 7):
        assert_same_batch(run.parts(i), run.reader.batch(i))


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and losses


@pytest.mark.parametrize(("n_hidden", "levels"), [(68, 3), (7, 1), (16, 4)])
def test_final_statistics(n_hidden: int, levels: int, few: cw.Words) -> None:
    corpus = cw.Corpus(few)
    config = Config.make(recipe="sprint", steps=2, batch=100, n_hidden=n_hidden, levels=levels, tier="fused")
    run = begin(config, corpus.train, corpus.vocabulary)
    run.steps(0, 2)
    got, model = run.finish().state_dict(), run.model()
    exact = cw.ConvWave(**{**model.config(), "n_hidden": n_hidden}).double()
    exact.load_state_dict(model.state_dict())
    recompute_statistics(exact, cw.distinct_graph(corpus.train, levels))
    for name, value in exact.state_dict().items():
        assert relative(got[name], value) < 1e-5, name
    assert not run.finish().training


@pytest.mark.parametrize(("n_hidden", "levels"), [(68, 3), (7, 1), (16, 4)])
def test_exact_losses(n_hidden: int, levels: int, few: cw.Words) -> None:
    corpus = cw.Corpus(few)
    model = network(len(corpus.vocabulary), n_hidden=n_hidden, levels=levels).eval()
    factors = (2,) * levels
    recompute_statistics(model, cw.distinct_graph(corpus.train, levels))
    ours, theirs = (EvaluationSet(corpus.splits, corpus.vocabulary, factors, compiled=c) for c in (True, False))
    nll, peer, exact = ours.nll(model).clone(), theirs.nll(model), theirs.nll(model.double())
    assert relative(nll, exact) < 4 * max(relative(peer, exact), 4 * UNIT)
    assert torch.equal(nll, ours.nll(model.float()))
    for split, loss in theirs.losses(model).items():
        assert ours.losses(model)[split].loss == pytest.approx(loss.loss, rel=1e-6)
        assert ours.losses(model)[split].positions == loss.positions


def test_large_texts_are_left_to_pytorch(few: cw.Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which computes statistics and losses of any text in blocks; both agree up to rounding."""
    corpus, results = cw.Corpus(few), []
    for most in (2**18, 100):
        for module in ("convwave.train.fused", "convwave.infer.compiled"):
            monkeypatch.setattr(f"{module}.MOST_ROWS", most)
        run = begin(Config.make(steps=2, batch=100, n_hidden=9, tier="fused"), corpus.train, corpus.vocabulary)
        run.step(0)
        evaluation = EvaluationSet(corpus.splits, corpus.vocabulary, (2, 2, 2), compiled=True)
        assert (evaluation._compiled is None) == (most == 100)
        model = run.finish()
        results.append((model.state_dict(), evaluation.losses(model)["val"].loss))
    for name, tensor in results[0][0].items():
        assert relative(tensor, results[1][0][name]) < 1e-5, name
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


def test_other_networks_are_evaluated_by_pytorch(few: cw.Words) -> None:
    corpus = cw.Corpus(few)
    ours, theirs = (EvaluationSet(corpus.splits, corpus.vocabulary, (2, 2, 2), compiled=c) for c in (True, False))
    for model in (cw.ConvWave(n_hidden=[5, 6, 7]).eval(), cw.ConvWave(n_hidden=5).double().eval()):
        assert torch.equal(ours.nll(model), theirs.nll(model))
    other = EvaluationSet(corpus.splits, corpus.vocabulary, (4, 2), compiled=True)
    assert other.losses(cw.ConvWave(factors=(4, 2)).eval())["val"].loss is not None


# ---------------------------------------------------------------------------------------------------------------------
# The tier


def begun(config: Config, corpus: cw.Corpus) -> tiers.Run:
    return begin(config, corpus.train, corpus.vocabulary)


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.optimizer == "muon"])
def test_the_first_loss_to_the_seventh_digit(recipe: str, names_txt: cw.Words) -> None:
    corpus = cw.Corpus(names_txt)
    first = [begun(Config.make(recipe=recipe, tier=tier), corpus).step(0) for tier in ("fused", "cpu")]
    assert first[0] == pytest.approx(first[1], rel=3e-7)


@pytest.mark.parametrize(("recipe", "batch"), [("fast", 64), ("fast", 10_000), ("record", 64), ("sprint", 200)])
def test_tiers_take_the_same_steps(recipe: str, batch: int, few: cw.Words) -> None:
    """Early losses differ by rounding, which has had no time to grow; the bound is that of tier cpu's test."""
    config = Config.make(recipe=recipe, steps=8, batch=batch, n_hidden=20)
    fused, cpu = (train(replace(config, tier=tier), few) for tier in ("fused", "cpu"))
    assert fused.losses == pytest.approx(cpu.losses, abs=2e-4)
    assert abs(fused.losses[0] - fused.losses[-1]) > 0.1, "the loss moves, so equality says something"


def test_an_update_is_muon_and_adamw(few: cw.Words) -> None:
    """One step each of torch's AdamW and of `optim.Muon` in float64, from running means that are not zero."""
    corpus = cw.Corpus(few)
    recipe = replace(FAST, name="mine", weight_decay=0.3, adam_beta=0.8, orthogonal_steps=3, warmup=0.0)
    run = begun(Config.make(recipe=recipe, batch=50, n_hidden=12, tier="fused"), corpus)
    assert isinstance(run, FusedRun)
    model = run.model()
    optimizers = make_optimizers(recipe, model.double())
    for i in range(3):
        run.step(i)
        for name, gradient in run.weights.named(1).items():
            model.get_parameter(name).grad = gradient.double().clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = (recipe.lr if optimizer is optimizers[0] else recipe.adam_lr) * run.config.rate(i)
            optimizer.step()
        for name, value in run.weights.named().items():
            assert relative(value, model.get_parameter(name).detach()) < 2e-5, f"{name} after step {i}"


@pytest.mark.parametrize("recipe", ["fast", "sprint", "record", "full"])
def test_it_is_deterministic(recipe: str, few: cw.Words) -> None:
    config = Config.make(
        recipe=recipe, steps=9, n_hidden=20, tier="fused", **({} if recipe == "full" else {"batch": 80})
    )
    first, second = (train(config, few) for _ in range(2))
    assert first.losses == second.losses
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize("recipe", ["fast", "sprint", "record"])
def test_a_state_goes_from_tier_to_tier(recipe: str, few: cw.Words) -> None:
    """Both have the same tensors, and what comes next depends on nothing else."""
    corpus = cw.Corpus(few)
    config = Config.make(recipe=recipe, steps=8, batch=80, n_hidden=20)
    runs = {tier: begun(replace(config, tier=tier), corpus) for tier in ("fused", "cpu")}
    states = {}
    for tier, run in runs.items():
        run.steps(0, 4)
        states[tier] = {name: tensor.clone() for name, tensor in run.state().items()}
    assert {n: (t.shape, t.dtype) for n, t in states["cpu"].items()} == {
        n: (t.shape, t.dtype) for n, t in states["fused"].items()
    }
    expected = runs["fused"].steps(4, 8)
    again, other = begun(replace(config, tier="fused"), corpus), begun(replace(config, tier="cpu"), corpus)
    again.restore(states["fused"])
    assert again.steps(4, 8) == expected
    assert isinstance(other, ClosedFormRun)
    other.restore(states["fused"])
    assert other.steps(4, 8) == pytest.approx(expected, abs=2e-4)
    # PyTorch does without the number of batches, which no tier counts
    for name in (name for name in states["fused"] if not name.endswith("num_batches_tracked")):
        with pytest.raises((KeyError, RuntimeError)):
            again.restore({key: value for key, value in states["fused"].items() if key != name})


def test_a_batch_of_one_position_is_refused(vocab: cw.Vocabulary) -> None:
    run = begin(Config.make(n_hidden=3, tier="fused"), cw.pack([""], vocab), vocab)
    with pytest.raises(ValueError, match="an unbiased variance needs a total count above 1, got 1"):
        run.step(0)


@pytest.mark.parametrize("names", [["", "a"], ["", "", "b", ""], ["ab"], ["a" * 40, "b" * 3]])
@pytest.mark.parametrize("recipe", ["fast", "sprint"])
def test_few_and_empty_names(names: list[str], recipe: str, vocab: cw.Vocabulary) -> None:
    packed = cw.pack(names, vocab)
    config = Config.make(recipe=recipe, steps=3, batch=1, n_hidden=5)
    runs = [begin(replace(config, tier=tier), packed, vocab) for tier in ("fused", "cpu")]
    batch = runs[1].reader.batch(0)
    if batch.totals[-1] <= 1:
        for run in runs:
            with pytest.raises(ValueError, match="variance needs a total count above 1, got 1"):
                run.step(0)
        return
    wide = [tuple(weights.double() for weights in batch.weights), batch.targets.double()]
    exact = ClosedForm(runs[1].model().double()).gradients(batch._replace(weights=wide[0], targets=wide[1])).item()
    fused, cpu = (abs(run.step(0) - exact) for run in runs)
    assert fused < 4 * max(cpu, 32 * UNIT)


def test_it_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe, expected in {"fast": True, "sprint": True, "record": True, "full": True, "blog": False}.items():
        assert (available_tiers("convwave", recipe)[0] == "fused") == expected
    assert "fused" not in available_tiers("convwave", "full", "cuda")
    windows = replace(FAST, name="mine", batch_of="windows")
    assert available_tiers(recipe=windows) == ["reference"]
    monkeypatch.setitem(sys.modules, "numba", None)
    assert available_tiers() == ["cpu", "reference"]
    assert Config.make().tier == "cpu"
    with pytest.raises(
        UsageError, match=r"tier: fused needs numba, which is not installed: pip install 'convwave\[fast\]'"
    ):
        Config.make(tier="fused")
    with pytest.raises(ValueError, match="expected one of reference for convwave by recipe blog on cpu, got 'fused'"):
        choose_tier("fused", "convwave", "blog", "cpu")


def test_compiling_is_announced_once() -> None:
    @numba.njit
    def double(x: float) -> float:
        return 2 * x

    @numba.njit
    def both(x: float, y: float) -> float:
        return double(x) + double(y)

    said: list[str] = []
    compiled.prepare([(double, (1.0,)), (both, (1.0, 2.0))], said.append)
    assert said == ["tier fused: compiling its loops, once on this machine; later runs read them from files"]
    compiled.prepare([(double, (1.0,)), (both, (1.0, 2.0))], said.append)
    assert len(said) == 1


def test_it_runs_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba then has no place for its files, and says so with a RuntimeError."""
    assert type(loops._entry(lambda x: x)._cache).__name__ == "FunctionCache"

    def nowhere(self: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", nowhere)
    assert loops._entry(lambda x: 2 * x)(4) == 8


def test_a_run_prepares_all_that_it_calls(few: cw.Words) -> None:
    """No function is compiled for other types later: the message would come too late."""
    entries = [value for name, value in vars(loops).items() if isinstance(value, numba.core.dispatcher.Dispatcher)]
    entries = [entry for entry in entries if type(entry._cache).__name__ != "NullCache"]
    assert len(entries) == 7
    begun(Config.make(tier="fused"), cw.Corpus(few)).prepare(lambda _: None)
    known = [len(entry.signatures) for entry in entries]
    assert min(known) >= 1
    for recipe in ("fast", "sprint", "record", "full"):
        for levels in (1, 3):
            train(Config.make(recipe=recipe, steps=2, n_hidden=9, levels=levels, tier="fused"), few)
    assert [len(entry.signatures) for entry in entries] == known


def test_nothing_else_imports_numba() -> None:
    code = (
        "import sys, convwave as cw\n"
        "from convwave.train import Config, fit\n"
        "import convwave.infer, convwave.cli.train, convwave.verify\n"
        "words = ['anna', 'otto', 'emma']\n"
        "vocabulary = cw.Vocabulary.from_words(words)\n"
        "packed = cw.pack(words, vocabulary)\n"
        "for tier in ('cpu', 'reference'): fit(Config.make(tier=tier, steps=2, n_hidden=4), packed, vocabulary)\n"
        "print([name for name in ('numba', 'scipy', 'threadpoolctl') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_killed_and_resumed_ends_in_the_same_bits(few: cw.Words, tmp_path: Path) -> None:
    """Whatever was done before the kill is in the state of some step; the rest follows from it."""
    config = Config.make(recipe="sprint", steps=12, batch=100, n_hidden=20, tier="fused")
    whole = train(config, few, tmp_path / "whole")

    class Killed(BaseException):
        pass

    class Kill(Reporter):
        def step(self, done: int, loss: float, positions: int) -> None:
            if done == 7:
                raise Killed

    with pytest.raises(Killed):
        train(config, few, tmp_path / "killed", save_every=0, reporter=Kill())
    resumed = train(config, few, tmp_path / "killed", resume=True)
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_the_same_graph_as_a_part_and_as_a_batch(packed: cw.Packed, vocab) -> None:
    for make in GRAPHS:
        graph = make(packed)
        assert_same_batch(compiled.part_of(graph, len(vocab)), graph_batch(graph, len(vocab)))
