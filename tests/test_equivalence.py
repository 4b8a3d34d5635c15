"""The convolution is the windowed network: logits, loss, gradients, running statistics, in both modes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import convwave as cw
from convwave import reference
from convwave.ops import naive, stack
from convwave.train.setup import recompute_statistics
from tests.helpers import (
    GRAPHS,
    RELATIVE,
    as_reference_gradients,
    per_position,
    randomize,
    relative_bound,
    relative_error,
    windowed_pass,
)


def network(seed: int, **sizes) -> reference.Sequential:
    return randomize(
        reference.HierarchicalMLP(**sizes, generator=torch.Generator().manual_seed(seed)).to(torch.float64), seed
    )


def assert_equal_step(mlp: reference.Sequential, packed: cw.Packed, make, counts=None, training=True) -> None:
    """One forward and backward pass of both, from the same weights; everything equal to 1e-10."""
    mlp.train(training)
    model = cw.from_windowed(mlp)
    logits, loss, gradients = windowed_pass(mlp, packed, counts)
    graph = make(packed, factors=mlp.factors, counts=counts)
    got = model(graph)
    got_loss = cw.loss(got, graph)
    got_loss.backward()

    rows = torch.arange(len(packed)) if counts is None else torch.arange(len(packed)).repeat_interleave(counts)
    bound = relative_bound(mlp, reference.build_windows(packed, mlp.block_size).inputs[rows])
    assert relative_error(per_position(got, graph)[rows], logits) < bound
    assert abs(float(got_loss.detach() - loss)) < bound
    largest = max(float(g.abs().max()) for g in gradients)
    for expected, ours in zip(gradients, as_reference_gradients(model), strict=True):
        assert float((expected - ours).abs().max()) < bound * largest
    for norm, block in zip(mlp.norms(), model.layers, strict=True):
        assert relative_error(block.norm.running_mean, norm.running_mean) < bound
        assert relative_error(block.norm.running_var, norm.running_var) < bound


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("training", [True, False])
def test_a_step_on_real_names(make, training: bool, packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    assert_equal_step(network(0, vocab_size=len(vocab)), packed, make, training=training)


@pytest.mark.parametrize("n_hidden", [1, 10, 24, 27, 68])
@pytest.mark.parametrize("factors", [(2,), (2, 2), (2, 2, 2, 2), (8,), (4, 2), (3, 2, 2)])
def test_odd_widths_and_factors(n_hidden: int, factors: tuple[int, ...]) -> None:
    packed = cw.pack_ids([[1, 2, 1, 3], [2], [], [3, 3, 3, 1, 2, 1, 2, 3, 1, 2]])
    mlp = network(n_hidden, vocab_size=4, n_embd=3, n_hidden=n_hidden, factors=factors)
    for make in GRAPHS:
        assert_equal_step(mlp, packed, make)


@settings(max_examples=60)
@given(
    ids=st.lists(st.lists(st.integers(1, 4), max_size=40), min_size=1, max_size=6),
    levels=st.integers(1, 6),
    n_embd=st.integers(1, 12),
    n_hidden=st.integers(1, 20),
    data=st.data(),
)
def test_any_counts_equal_the_literal_multiset_of_windows(ids, levels, n_embd, n_hidden, data) -> None:
    packed = cw.pack_ids(ids)
    numbers = data.draw(st.lists(st.integers(0, 3), min_size=len(packed), max_size=len(packed)))
    counts = torch.tensor(numbers)
    counts[0] += 2  # a variance needs two rows
    mlp = network(len(packed), vocab_size=5, n_embd=n_embd, n_hidden=n_hidden, levels=levels)
    windows = reference.build_windows(packed, mlp.block_size).inputs
    assume(relative_bound(mlp.train(), windows[torch.arange(len(packed)).repeat_interleave(counts)]) < 1e-6)
    for make in GRAPHS:
        assert_equal_step(mlp, packed, make, counts=counts)


def test_random_windows_with_repeats_equal_counts(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    """select_windows is the post's random minibatch."""
    drawn = torch.randint(0, len(packed), (64,), generator=torch.Generator().manual_seed(0))
    mlp = network(3, vocab_size=len(vocab)).train()
    model = cw.from_windowed(mlp)
    windows = reference.build_windows(packed, 8)
    expected = nn.functional.cross_entropy(mlp(windows.inputs[drawn]), windows.targets[drawn])
    graph = cw.select_windows(cw.distinct_graph(packed), drawn, packed.targets[drawn])
    assert abs(float((cw.loss(model(graph), graph) - expected).detach())) < RELATIVE
    for norm, block in zip(mlp.norms(), model.layers, strict=True):
        assert relative_error(block.norm.running_var, norm.running_var) < RELATIVE


def test_the_order_of_words_does_not_matter(some_words: list[str], vocab: cw.Vocabulary) -> None:
    model = cw.from_windowed(network(1, vocab_size=len(vocab)))
    losses = []
    for chosen in (some_words, some_words[::-1], sorted(some_words)):
        graph = cw.dense_graph(cw.pack(chosen, vocab))
        losses.append(float(cw.loss(model.train()(graph), graph).detach()))
    assert max(losses) - min(losses) < RELATIVE


@pytest.mark.parametrize("make", GRAPHS)
def test_float32_errs_no_more_than_the_windowed_network_does(make, packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    """At most four times the error of the reference in float32, both against float64."""
    exact = network(2, vocab_size=len(vocab)).train()
    single = network(2, vocab_size=len(vocab)).to(torch.float32).train()
    model = cw.from_windowed(single)
    graph = make(packed)
    expected, _, exact_gradients = windowed_pass(exact, packed)
    theirs, _, their_gradients = windowed_pass(single, packed)
    got = model(graph)
    cw.loss(got, graph).backward()
    assert relative_error(per_position(got, graph), expected) <= 4 * relative_error(theirs, expected)
    # all gradients as one vector: single small tensors can be exact by luck
    flat = [torch.cat([g.flatten().double() for g in gs]) for gs in (their_gradients, as_reference_gradients(model))]
    exact_flat = torch.cat([g.flatten() for g in exact_gradients])
    assert relative_error(flat[1], exact_flat) <= 4 * relative_error(flat[0], exact_flat)


def test_biased_variance_and_positions_are_torchs_batchnorm() -> None:
    """unbiased=False with plain statistics is nn.BatchNorm1d, running statistics included."""
    z = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs, ours = nn.BatchNorm1d(7).double(), cw.BatchNorm(7, unbiased=False).double()
    for mode in (True, True, False):
        theirs.train(mode), ours.train(mode)
        assert relative_error(ours(z), theirs(z)) < RELATIVE
        assert relative_error(ours.running_mean, theirs.running_mean) < RELATIVE
        assert relative_error(ours.running_var, theirs.running_var) < RELATIVE
    ours.load_state_dict(theirs.state_dict())


def test_statistics_of_positions_count_every_row_once(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    """With one level every row is in as many windows as it has counts, so only the counts differ."""
    torch.manual_seed(0)
    windows = cw.ConvWave(len(vocab), levels=2).double()
    positions = cw.ConvWave(len(vocab), levels=2, statistics="positions").double()
    positions.load_state_dict(windows.state_dict())
    graph = cw.dense_graph(packed, 2)
    assert relative_error(positions(graph).detach(), windows(graph).detach()) > 1e-3
    h = positions.embedding(graph.tokens)
    for block, taps in zip(positions.layers, graph.taps, strict=True):
        z = naive.conv(h, block.conv.weight, taps)
        h = torch.tanh((z - z.mean(0)) * (z.var(0) + 1e-5).rsqrt())
    assert relative_error(positions.head(h).detach(), positions(graph).detach()) < RELATIVE


def test_both_ways_of_the_product_agree() -> None:
    """The closed form multiplies before it gathers when that is less work."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, 2, dtype=torch.float64, generator=generator)
    h = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    for rows in (3, 100):
        taps = torch.randint(0, 4, (2, rows), generator=generator)
        expected = h[taps[0]] @ weight[:, :, 0].T + h[taps[1]] @ weight[:, :, 1].T
        assert relative_error(stack.conv(h, weight, taps), expected) < RELATIVE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [4, 40])
def test_gradcheck_of_the_fused_layer(training: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    taps = torch.randint(0, 6, (2, rows), generator=generator)
    counts = torch.randint(0, 4, (rows,), generator=generator).double()
    counts[:2] += 1
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def layer(x, weight, gamma, beta):
        return cw.conv_bn_tanh(
            x, weight, gamma, beta, mean.clone(), var.clone(), taps=taps, counts=counts, training=training
        )

    assert torch.autograd.gradcheck(layer, (make(6, 5), make(3, 5, 2), make(3), make(3)))


def test_torch_func_and_compile_see_the_same_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    taps = torch.randint(0, 9, (2, 40), generator=generator)
    weight = torch.randn(6, 5, 2, dtype=torch.float64, generator=generator)
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        ones, zeros = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        h = cw.conv_bn_tanh(x, weight, ones, zeros, zeros.clone(), ones.clone(), taps=taps, training=True)
        return h.square().sum()

    loss(x).backward()
    assert relative_error(torch.func.grad(loss)(x.detach()), x.grad) < RELATIVE


def test_expanded_and_strided_inputs_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    taps = torch.randint(0, 9, (2, 12), generator=generator)
    wide = torch.randn(9, 20, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 10, 3, dtype=torch.float64, generator=generator).permute(2, 1, 0)
    vectors = [torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)] * 2
    results = []
    for x in (wide[:, ::2], wide[:, ::2].contiguous()):
        x = x.detach().requires_grad_()
        gamma, beta, mean, var = (v.clone() for v in (vectors[0], vectors[1], vectors[1], vectors[0]))
        y = cw.conv_bn_tanh(x, weight, gamma, beta, mean, var, taps=taps, training=True)
        y[:, :1].expand(-1, 4).sum().backward()  # an expanded gradient, stride 0
        results.append((y.detach(), x.grad))
    assert all(relative_error(a, b) < RELATIVE for a, b in zip(*results, strict=True))


def test_conversion_both_ways_keeps_every_bit(vocab: cw.Vocabulary) -> None:
    for factors in [(2, 2, 2), (3,), (8,), (4, 2)]:
        mlp = network(5, vocab_size=len(vocab), factors=factors).eval()
        again = cw.to_windowed(cw.from_windowed(mlp))
        assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), again.parameters(), strict=True))
        for a, b in zip(mlp.norms(), again.norms(), strict=True):
            assert torch.equal(a.running_mean, b.running_mean)
            assert torch.equal(a.running_var, b.running_var)
        x = torch.randint(0, len(vocab), (9, mlp.block_size))
        assert torch.equal(mlp(x), again(x))


def test_networks_that_cannot_be_converted_are_refused() -> None:
    mlp = reference.HierarchicalMLP()
    del mlp.layers[4]
    with pytest.raises(cw.ConversionError, match="flatten, Linear, BatchNorm1d, Tanh per level, got"):
        cw.from_windowed(mlp)
    mlp.layers = mlp.layers[1:]
    with pytest.raises(cw.ConversionError, match="an embedding first"):
        cw.from_windowed(mlp)


def test_state_dict_has_the_documented_names_and_layouts() -> None:
    state = cw.ConvWave(27, 10, 68, 3).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": (27, 10), "head.weight": (27, 68), "head.bias": (27,)}
    for level, channels in enumerate((10, 68, 68)):
        expected[f"blocks.{level}.conv.weight"] = (68, channels, 2)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"blocks.{level}.norm.{name}"] = (68,)
        expected[f"blocks.{level}.norm.num_batches_tracked"] = ()
    assert shapes == expected
    assert cw.ConvWave().num_parameters == 22_397


def test_weights_move_to_torchs_own_conv1d() -> None:
    """Where both taps lie inside the sequence, the same weights give what nn.Conv1d gives."""
    torch.manual_seed(0)
    ours, theirs = cw.CausalConv1d(5, 4, dilation=2), nn.Conv1d(5, 4, 2, dilation=2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 5, 20)
    taps = torch.stack([torch.arange(18), torch.arange(2, 20)])
    assert torch.allclose(ours(x[0].T, taps), theirs(x)[0].T, atol=1e-6)


def test_recomputed_statistics_are_those_of_the_whole_text(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    torch.manual_seed(0)
    model = cw.ConvWave(len(vocab)).double().eval()
    graph = cw.distinct_graph(packed)
    recompute_statistics(model, graph)
    assert not model.training
    assert model.blocks[0].norm.momentum == 0.1
    mlp = cw.to_windowed(model).train()
    mlp(reference.build_windows(packed, 8).inputs)  # moves 10 % of the way, so nothing when already there
    for norm, block in zip(mlp.norms(), model.layers, strict=True):
        assert relative_error(norm.running_mean, block.norm.running_mean) < RELATIVE
        assert relative_error(norm.running_var, block.norm.running_var) < RELATIVE


def test_errors_name_the_argument() -> None:
    packed = cw.pack_ids([[1, 2]])
    with pytest.raises(ValueError, match=r"graph: expected factors \(2, 2, 2\), got \(2, 2\)"):
        cw.ConvWave(5)(cw.dense_graph(packed, 2))
    with pytest.raises(IndexError):
        cw.ConvWave(2)(cw.dense_graph(packed))
    with pytest.raises(ValueError, match=r"unbiased variance needs a total count above 1, got 1"):
        cw.ConvWave(5)(cw.dense_graph(cw.pack_ids([[]])))
    positions = cw.ConvWave(5, statistics="positions")
    for make in (cw.windowed_graph, cw.distinct_graph):
        with pytest.raises(ValueError, match="statistics='positions' trains on a dense graph only"):
            positions.train()(make(packed))
        positions.eval()(make(packed))
    with pytest.raises(ValueError, match="the counts sum to 0"):
        cw.loss(torch.zeros(3, 5), cw.dense_graph(packed, counts=torch.zeros(3)))
    with pytest.raises(ValueError, match="eps: expected one number or 3"):
        cw.ConvWave(5, eps=[1e-5])
    with pytest.raises(ValueError, match="n_hidden: expected at least 1, got 0"):
        cw.ConvWave(5, n_hidden=0)
    with pytest.raises(ValueError, match="statistics"):
        cw.ConvWave(5, statistics="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: expected 'auto', 'eager' or 'triton'"):
        cw.ConvWave(5, backend="cuda")
    with pytest.raises(ValueError, match="logits: expected 3 rows"):
        cw.loss(torch.zeros(2, 5), cw.dense_graph(packed))


def test_one_word_of_one_letter_evaluates() -> None:
    model = cw.ConvWave(5).eval()
    for ids in ([[1]], [[]]):
        packed = cw.pack_ids(ids)
        for make in GRAPHS:
            graph = make(packed)
            assert per_position(model(graph), graph).shape == (len(packed), 5)
