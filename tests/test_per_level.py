"""Widths, eps, momentum, kind of variance and mode that differ from level to level, in everything that reads them.

Where all levels are alike, taking one level's value for another's goes unnoticed. The expected values are written down
here in plain PyTorch, over windows, level after level.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import convwave as cw
from convwave import reference
from convwave.data.batches import graph_batch
from convwave.infer.generate import GenerationCache
from convwave.ops import library
from convwave.train.closed_form import ClosedForm
from tests.helpers import GRAPHS, RELATIVE, disturb, per_position, relative_error

FACTORS = [(2, 2, 2), (3, 2), (2, 4, 2)]


@dataclass
class Expected:
    """What a pass over windows gives."""

    logits: Tensor  # (N, V)
    means: list[Tensor]
    variances: list[Tensor]


def network(factors: tuple[int, ...], seed: int) -> cw.ConvWave:
    """In float64; every option random and different at every level, no parameter neutral."""
    draw = random.Random(seed)
    levels = len(factors)
    options = {
        "n_hidden": draw.sample(range(5, 25), levels),
        "eps": draw.sample([1e-5, 1e-3, 0.03, 0.2, 0.7], levels),
        "momentum": draw.sample([0.05, 0.1, 0.3, 0.6, 0.9], levels),
        "unbiased": [bool((i + seed) % 2) for i in range(levels)],
    }
    torch.manual_seed(seed)
    return disturb(cw.ConvWave(27, 6, factors=factors, **options).double(), seed)


def over_windows(model: cw.ConvWave, packed: cw.Packed) -> Expected:
    """The definition; running statistics as they are to be after a pass."""
    x = model.embedding.weight[reference.build_windows(packed, model.context).inputs]  # (N, context, C)
    means, variances = [], []
    for block, factor in zip(model.layers, model.factors, strict=True):
        x = x.reshape(x.shape[0], -1, factor, x.shape[2])
        z = sum(x[:, :, j] @ block.conv.weight[:, :, j].T for j in range(factor))
        assert isinstance(z, Tensor)
        norm, rows = block.norm, z.flatten(0, 1)
        if norm.training:
            mean, var = rows.mean(0), rows.var(0, correction=int(norm.unbiased))
            means.append(norm.running_mean + norm.momentum * (mean - norm.running_mean))
            variances.append(norm.running_var + norm.momentum * (rows.var(0) - norm.running_var))
        else:
            mean, var = norm.running_mean, norm.running_var
            means.append(mean.clone())
            variances.append(var.clone())
        x = (norm.weight * (z - mean) / (var + norm.eps).sqrt() + norm.bias).tanh()
    return Expected(model.head(x.squeeze(1)), means, variances)


@pytest.fixture(scope="module")
def few(vocab: cw.Vocabulary) -> cw.Packed:
    words = random.Random(5).sample(cw.data.bundled_words().words, 25)
    return cw.pack([*words, "a", "", words[0]], cw.Vocabulary.from_words([*words, "abcdefghijklmnopqrstuvwxyz"]))


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("modes", ["all", "none", "first", "but the first"])
@pytest.mark.parametrize("factors", FACTORS)
def test_every_level_obeys_its_own_options(factors: tuple[int, ...], modes: str, make, few: cw.Packed) -> None:
    for seed in (0, 1):
        model = network(factors, seed)
        for i, block in enumerate(model.layers):
            block.norm.train({"all": True, "none": False, "first": i == 0, "but the first": i > 0}[modes])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = over_windows(model, few)
        wanted = torch.autograd.grad(expected.logits.square().sum(), list(model.parameters()))
        graph = make(few, factors=factors)
        logits = model(graph)
        assert relative_error(per_position(logits, graph), expected.logits) < 1e3 * RELATIVE
        got = torch.autograd.grad(per_position(logits, graph).square().sum(), list(model.parameters()))
        for ours, theirs in zip(got, wanted, strict=True):
            assert relative_error(ours, theirs) < 1e4 * RELATIVE
        for block, mean, var in zip(model.layers, expected.means, expected.variances, strict=True):
            assert relative_error(block.norm.running_mean, mean) < 1e3 * RELATIVE
            assert relative_error(block.norm.running_var, var) < 1e3 * RELATIVE
        model.load_state_dict(before)
        with torch.no_grad():
            assert relative_error(per_position(model(graph), graph), expected.logits) < 1e3 * RELATIVE


@pytest.mark.parametrize("factors", FACTORS)
def test_so_does_whatever_folds_or_converts_a_network(factors: tuple[int, ...], few: cw.Packed, tmp_path) -> None:
    model = network(factors, 2).eval()
    expected = over_windows(model, few).logits
    symbols = cw.Vocabulary(".abcdefghijklmnopqrstuvwxyz")
    model.vocabulary = symbols
    model.save(tmp_path / "m.safetensors")
    again = cw.load(tmp_path / "m.safetensors")
    graph = cw.dense_graph(few, factors=factors)
    for block, same in zip(model.layers, again.layers, strict=True):
        assert (block.norm.eps, block.norm.momentum, block.norm.unbiased) == (
            same.norm.eps,
            same.norm.momentum,
            same.norm.unbiased,
        )
    assert relative_error(again(graph), expected) < 1e3 * RELATIVE
    words = [symbols.decode(few.tokens[a + 1 : b].tolist()) for a, b in few.cu_seqlens.unfold(0, 2, 1).tolist()]
    nll = cw.EvaluationSet(cw.data.packing.Splits(words, [], []), symbols, factors).nll(model)
    right = torch.nn.functional.cross_entropy(expected, few.targets, reduction="none")
    assert relative_error(nll, right) < 1e3 * RELATIVE
    begin, end = few.cu_seqlens[:2].tolist()
    logits = GenerationCache(model, 1).extend(few.tokens[None, begin:end])[0]
    assert relative_error(logits, expected[begin:end]) < 1e3 * RELATIVE


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("factors", FACTORS)
def test_so_does_the_closed_form(factors: tuple[int, ...], make, few: cw.Packed) -> None:
    model = network(factors, 3).train()
    logits = over_windows(model, few).logits
    loss = torch.nn.functional.cross_entropy(logits, few.targets)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    form = ClosedForm(model)
    found = form.gradients(graph_batch(make(few, factors=factors), 27, torch.float64))
    assert relative_error(found, loss) < 1e3 * RELATIVE
    got = form.gradients_by_name()
    largest = max(float(g.abs().max()) for g in wanted)
    for (name, _), theirs in zip(model.named_parameters(), wanted, strict=True):
        assert float((got[name] - theirs).abs().max()) / largest < 1e3 * RELATIVE, name


@pytest.mark.skipif("triton" not in library.available_backends(), reason="needs triton")
@pytest.mark.parametrize("modes", ["all", "none", "first"])
def test_so_do_the_kernels(modes: str, few: cw.Packed) -> None:
    """In float32, as far as its rounding goes."""
    model = network((2, 2, 2), 4)
    for i, block in enumerate(model.layers):
        block.norm.train({"all": True, "none": False, "first": i == 0}[modes])
    expected = over_windows(model, few)
    graph = cw.distinct_graph(few)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = model.float().use("triton").to(device)
    logits = ours(graph.to(device))
    assert relative_error(per_position(logits, graph.to(device)).cpu(), expected.logits) < 1e-4
    for block, mean, var in zip(ours.layers, expected.means, expected.variances, strict=True):
        assert relative_error(block.norm.running_mean.cpu(), mean) < 1e-4
        assert relative_error(block.norm.running_var.cpu(), var) < 1e-4


def test_one_level_by_itself_obeys_its_momentum_and_eps() -> None:
    """`BatchNorm` alone, with counts, against repeated rows."""
    generator = torch.Generator().manual_seed(0)
    for eps, momentum, unbiased in ((0.5, 0.3, True), (0.01, 0.8, False)):
        norm = disturb(cw.nn.BatchNorm(7, eps, momentum, unbiased=unbiased).double(), 1)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        z = torch.randn(20, 7, generator=generator, dtype=torch.float64)
        counts = torch.randint(0, 4, (20,), generator=generator)
        rows = z.repeat_interleave(counts, 0)
        scale = norm.weight / (rows.var(0, correction=int(unbiased)) + eps).sqrt()
        assert relative_error(norm(z, counts), (z - rows.mean(0)) * scale + norm.bias) < RELATIVE
        assert relative_error(norm.running_mean, mean + momentum * (rows.mean(0) - mean)) < RELATIVE
        assert relative_error(norm.running_var, var + momentum * (rows.var(0) - var)) < RELATIVE


def test_a_network_hands_each_level_its_own_options() -> None:
    net = cw.ConvWave(5, eps=[1e-3, 1e-4, 1e-5], momentum=[0.1, 0.2, 0.3], unbiased=[True, False, True])
    norms = [block.norm for block in net.layers]
    assert [norm.eps for norm in norms] == [1e-3, 1e-4, 1e-5]
    assert [norm.momentum for norm in norms] == [0.1, 0.2, 0.3]
    assert [norm.unbiased for norm in norms] == [True, False, True]
