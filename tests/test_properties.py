"""Properties that hold for any vocabulary, width, depth, batch and counts."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import convwave as cw
from convwave import reference
from convwave.ops import naive
from tests.helpers import GRAPHS, RELATIVE, per_position, randomize, relative_bound, relative_error


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Names as token ids, of 0 to 40 letters, some of them repeated, and the size of their vocabulary."""
    vocabulary = draw(st.integers(2, 40))
    ids = draw(st.lists(st.lists(st.integers(1, vocabulary - 1), max_size=40), min_size=1, max_size=5))
    repeats = draw(st.lists(st.integers(0, len(ids) - 1), max_size=3))
    return [*ids, *(ids[i] for i in repeats)], vocabulary


@st.composite
def networks(draw: st.DrawFn, vocabulary: int) -> cw.ConvWave:
    levels = draw(st.integers(1, 6))
    n_embd = draw(st.integers(1, 70))
    widths = draw(st.lists(st.integers(1, 70), min_size=levels, max_size=levels))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mlp = reference.HierarchicalMLP(vocabulary, n_embd, widths, levels, factors=(2,) * levels, generator=generator)
    return cw.from_windowed(randomize(mlp.to(torch.float64), 0))


@settings(max_examples=60)
@given(st.data())
def test_windowed_dense_distinct_and_the_mlp_agree(data: st.DataObject) -> None:
    """Evaluation mode: four evaluations, one function, at any width, depth and vocabulary."""
    ids, vocabulary = data.draw(batches())
    model = data.draw(networks(vocabulary)).eval()
    packed = cw.pack_ids(ids)
    expected = cw.to_windowed(model)(reference.build_windows(packed, model.context).inputs)
    for make in GRAPHS:
        graph = make(packed, model.levels)
        assert relative_error(per_position(model(graph), graph), expected) < RELATIVE


@settings(max_examples=60)
@given(st.data())
def test_a_training_step_with_any_counts_is_the_literal_multiset(data: st.DataObject) -> None:
    ids, vocabulary = data.draw(batches())
    model = data.draw(networks(vocabulary)).train()
    packed = cw.pack_ids(ids)
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(packed), max_size=len(packed))))
    counts[-1] += 2  # a variance needs two rows
    mlp = cw.to_windowed(model)
    rows = torch.arange(len(packed)).repeat_interleave(counts)
    windows = reference.build_windows(packed, model.context).inputs[rows]
    bound = relative_bound(mlp, windows)
    assume(bound < 1e-6)  # beyond, the batch is so nearly constant that both results are rounding
    expected = mlp(windows)
    loss = torch.nn.functional.cross_entropy(expected, packed.targets[rows])
    for make in GRAPHS:
        ours = cw.from_windowed(cw.to_windowed(model))
        graph = make(packed, model.levels, counts)
        got = ours(graph)
        assert relative_error(per_position(got, graph)[rows], expected) < bound
        assert abs(float((cw.loss(got, graph) - loss).detach())) < bound * max(1.0, float(loss.detach()))


@settings(max_examples=60)
@given(st.data())
def test_packing_order_does_not_matter(data: st.DataObject) -> None:
    """Permuting the names of a batch permutes its logits and leaves loss, statistics and gradients alone."""
    ids, vocabulary = data.draw(batches())
    model = data.draw(networks(vocabulary)).train()
    order = data.draw(st.permutations(range(len(ids))))
    results = []
    for chosen in (ids, [ids[i] for i in order]):
        packed = cw.pack_ids(chosen)
        assume(len(packed) > 1)
        ours = cw.from_windowed(cw.to_windowed(model))
        graph = data.draw(st.sampled_from(GRAPHS))(packed, model.levels)
        logits = ours(graph)
        cw.loss(logits, graph).backward()
        words = per_position(logits, graph).split(packed.cu_seqlens.diff().tolist())
        results.append((words, ours))
    bound = relative_bound(cw.to_windowed(model), reference.build_windows(cw.pack_ids(ids), model.context).inputs)
    assume(bound < 1e-6)
    (words, first), (permuted, second) = results
    scale = max(float(w.detach().abs().max()) for w in words)
    for place, i in enumerate(order):
        assert float((words[i] - permuted[place]).detach().abs().max()) < bound * scale
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        largest = max(float(p.grad.abs().max()) for p in first.parameters())
        assert float((a.grad - b.grad).abs().max()) < 10 * bound * largest, name
    for block, other in zip(first.layers, second.layers, strict=True):
        assert relative_error(other.norm.running_var, block.norm.running_var) < bound


def weighted_sums(model: cw.ConvWave, graph: cw.Graph) -> list[tuple[float, Tensor, Tensor]]:
    """Per level: n, sum w z and sum w z^2 of the pre-activations, with the running statistics normalising."""
    sums = []
    h = model.embedding(graph.tokens)
    for block, taps, weights in zip(model.layers, graph.taps, graph.weights, strict=True):
        z = naive.conv(h, block.conv.weight, taps)
        sums.append((float(weights.sum()), weights @ z, weights @ z.square()))
        h = torch.tanh(block.norm(z))
    return sums


@settings(max_examples=60)
@given(st.data())
@torch.no_grad()
def test_the_weighted_sums_of_two_halves_add_up_to_the_whole(data: st.DataObject) -> None:
    ids, vocabulary = data.draw(batches())
    assume(len(ids) > 1)
    model = data.draw(networks(vocabulary)).eval()
    cut = data.draw(st.integers(1, len(ids) - 1))
    make = data.draw(st.sampled_from(GRAPHS))
    whole, first, second = (
        weighted_sums(model, make(cw.pack_ids(part), model.levels)) for part in (ids, ids[:cut], ids[cut:])
    )
    for (n, s, q), (n1, s1, q1), (n2, s2, q2) in zip(whole, first, second, strict=True):
        assert n == n1 + n2
        assert float((s1 + s2 - s).abs().max()) <= RELATIVE * float(q.sum().sqrt() * n**0.5 + 1)
        assert relative_error(q1 + q2, q) < RELATIVE


@settings(max_examples=60)
@given(st.data())
def test_counts_scale_out_of_the_biased_statistics(data: st.DataObject) -> None:
    """Counting every window c times changes neither the loss nor the biased statistics."""
    ids, vocabulary = data.draw(batches())
    factor = data.draw(st.integers(2, 5))
    torch.manual_seed(0)
    packed = cw.pack_ids(ids)
    losses = []
    for counts in (None, torch.full((len(packed),), factor)):
        torch.manual_seed(1)
        model = cw.ConvWave(vocabulary, 4, 9, 2, unbiased=False).double()
        graph = cw.dense_graph(packed, 2, counts)
        losses.append(float(cw.loss(model(graph), graph).detach()))
    assert abs(losses[0] - losses[1]) < 1e-9
