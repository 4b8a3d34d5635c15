"""The closed form of a training step against autograd, its batches against graphs, its optimiser against two others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import convwave as cw
from convwave.data.batches import Batch, ContextBatches, ContextSampler, NameBatches, Parts, graph_batch
from convwave.data.graph import select_contexts, select_windows
from convwave.infer.score import Inference
from convwave.runs.folder import MODEL_FILE
from convwave.train import closed_form
from convwave.train.closed_form import ClosedForm, MuonAdam
from convwave.train.config import Config
from convwave.train.loop import train
from convwave.train.optim import Muon
from convwave.train.recipes import RECIPES, SPRINT
from convwave.train.tiers import TIERS, available_tiers, choose_tier
from tests.helpers import GRAPHS, RELATIVE, relative_bound, relative_error, windowed_pass


def network(
    vocab_size: int, n_embd: int = 10, n_hidden: int = 24, factors: tuple[int, ...] = (2, 2, 2), unbiased: bool = True
) -> cw.ConvWave:
    """In float64, no parameter neutral."""
    generator = torch.Generator().manual_seed(n_hidden)
    model = cw.ConvWave(vocab_size, n_embd, n_hidden, factors=factors, unbiased=unbiased).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.3)
    return model.train()


def largest_difference(form: ClosedForm, model: cw.ConvWave) -> float:
    """Over all gradients, relative to the largest of the model's."""
    got = form.gradients_by_name()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(float((got[name] - expected[name]).abs().max()) for name in expected) / largest


def assert_gradients_equal(model: cw.ConvWave, graph: cw.Graph, batch: Batch, bound: float = RELATIVE) -> None:
    model.zero_grad()
    loss = cw.loss(model(graph), graph)
    loss.backward()
    form = ClosedForm(model)
    assert relative_error(form.gradients(batch), loss) < bound
    assert largest_difference(form, model) < bound


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n_hidden", [10, 24, 27, 68])
def test_gradients_are_those_of_autograd(make, unbiased: bool, n_hidden: int, packed: cw.Packed, vocab) -> None:
    model = network(len(vocab), n_hidden=n_hidden, unbiased=unbiased)
    counts = torch.randint(0, 3, (len(packed),), generator=torch.Generator().manual_seed(1))
    graph = make(packed, counts=counts)
    assert_gradients_equal(model, graph, graph_batch(graph, len(vocab), torch.float64))


@pytest.mark.parametrize("factors", [(2,), (2, 2), (2, 2, 2, 2), (4, 2), (3, 2), (2, 3), (8,)])
def test_gradients_for_other_depths_and_factors(factors: tuple[int, ...], packed: cw.Packed, vocab) -> None:
    model = network(len(vocab), n_embd=5, factors=factors)
    for make in GRAPHS:
        graph = make(packed, factors=factors)
        assert_gradients_equal(model, graph, graph_batch(graph, len(vocab), torch.float64))


def test_a_width_of_its_own_for_every_level(packed: cw.Packed, vocab) -> None:
    model = cw.ConvWave(len(vocab), 7, [20, 68, 27]).double().train()
    graph = cw.distinct_graph(packed)
    assert_gradients_equal(model, graph, graph_batch(graph, len(vocab), torch.float64))
    model.eval()
    with torch.no_grad():
        assert relative_error(Inference(graph)(model)[:, : len(vocab)], model(graph).log_softmax(1)) < RELATIVE


@pytest.mark.parametrize("ids", [[[1]], [[]] * 2, [[1, 1, 1]], [[2, 1], []], [list(range(1, 27))]])
@pytest.mark.parametrize("unbiased", [True, False])
def test_gradients_of_next_to_nothing(ids: list[list[int]], unbiased: bool) -> None:
    """One letter, one name, names of equal windows: BatchNorm amplifies rounding there, in any order of evaluation."""
    names = cw.pack_ids(ids)
    model = network(27, unbiased=unbiased)
    biased = replace_unbiased(model)
    bound = relative_bound(cw.to_windowed(biased), cw.reference.build_windows(names, 8).inputs)
    for make in GRAPHS:
        graph = make(names)
        assert_gradients_equal(model, graph, graph_batch(graph, 27, torch.float64), bound)


def replace_unbiased(model: cw.ConvWave) -> cw.ConvWave:
    """The same network with the post's variance, which is the only one that the windowed network has."""
    copy = cw.ConvWave(27, 10, 24).double()
    copy.load_state_dict(model.state_dict())
    return copy


def test_gradients_are_those_of_the_windowed_network(packed: cw.Packed, vocab) -> None:
    """Without our own graphs: the post's network, every window in the batch as often as it counts."""
    model = network(len(vocab))
    mlp = cw.to_windowed(model)
    _, loss, gradients = windowed_pass(mlp, packed)
    form = ClosedForm(model)
    graph = cw.distinct_graph(packed)
    assert relative_error(form.gradients(graph_batch(graph, len(vocab), torch.float64)), loss) < RELATIVE
    got = form.gradients_by_name()
    expected = [got["embedding.weight"]]
    for level in range(3):
        expected.append(got[f"blocks.{level}.conv.weight"].permute(2, 1, 0).flatten(0, 1))
        expected += [got[f"blocks.{level}.norm.weight"], got[f"blocks.{level}.norm.bias"]]
    expected += [got["head.weight"].T, got["head.bias"]]
    for ours, theirs in zip(expected, gradients, strict=True):
        assert relative_error(ours, theirs) < RELATIVE


def test_no_step_reads_what_another_left_in_the_buffers(packed: cw.Packed, vocab) -> None:
    form = ClosedForm(network(len(vocab)))
    batch = graph_batch(cw.distinct_graph(packed), len(vocab), torch.float64)
    loss, first = form.gradients(batch).clone(), [g.clone() for g in form.gradients_by_name().values()]
    for memory in [*form._buffer._flat.values(), form.flat_gradient, *form.matrix_gradients]:
        memory.fill_(float("nan"))
    assert torch.equal(form.gradients(batch), loss)
    assert all(torch.equal(a, b) for a, b in zip(form.gradients_by_name().values(), first, strict=True))


def test_what_the_closed_form_does_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match="statistics='windows'"):
        ClosedForm(cw.ConvWave(statistics="positions"))
    one = graph_batch(cw.dense_graph(cw.pack_ids([[]])), 27)
    with pytest.raises(ValueError, match="variance needs a total count above 1"):
        ClosedForm(cw.ConvWave()).gradients(one)


def test_parameters_go_in_and_out(vocab) -> None:
    model, other = network(len(vocab)), network(len(vocab)).requires_grad_(False)
    form = ClosedForm(other)
    form.load(model)
    assert all(torch.equal(form.parameters()[name], p) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def sorted_windows(batch: Batch) -> torch.Tensor:
    """Of every top row: its window, weight and targets; rows in lexicographic order."""
    windows = batch.taps[0].T
    for level in range(1, len(batch.taps)):
        begin = torch.tensor([b for b, _ in batch.ranges[level]])
        rows = batch.taps[level] + begin[:, None]
        windows = torch.cat([windows[tap] for tap in rows], dim=1)
    table = torch.cat([windows.double(), batch.weights[-1][:, None], batch.targets], dim=1)
    return torch.unique(table, dim=0)


@pytest.mark.parametrize("factors", [(2, 2, 2), (2,), (4, 2), (3, 2), (2, 3), (2, 4)])
def test_batches_of_names_are_select_windows(factors: tuple[int, ...], packed: cw.Packed, vocab) -> None:
    everything = cw.distinct_graph(packed, factors=factors)
    model = network(len(vocab), factors=factors)
    batches = NameBatches(packed, everything, len(vocab), torch.float64)
    generator = torch.Generator().manual_seed(3)
    for words in (
        torch.randint(0, packed.num_words, (30,), generator=generator),
        torch.tensor([5, 5, 7]),
        torch.arange(packed.num_words),
    ):
        positions, _ = packed.positions(words)
        graph = select_windows(everything, positions, packed.targets[positions])
        batch = batches(words)
        expected = graph_batch(graph, len(vocab), torch.float64)
        assert torch.equal(sorted_windows(batch), sorted_windows(expected))
        assert batch.totals == expected.totals
        assert [float(w.sum()) for w in batch.weights] == list(batch.totals)
        assert_gradients_equal(model, graph, batch)
    with pytest.raises(ValueError, match="expected a distinct graph, got a dense one"):
        NameBatches(packed, cw.dense_graph(packed), len(vocab))


@pytest.mark.parametrize("factors", [(2, 2, 2), (2,), (4, 2), (2, 3)])
def test_batches_of_contexts_are_select_contexts(factors: tuple[int, ...], packed: cw.Packed, vocab) -> None:
    everything = cw.distinct_graph(packed, factors=factors)
    model = network(len(vocab), factors=factors)
    sampler = ContextSampler(everything.weights[-1], 20, 60, 10, 0.7, seed=1)
    batches = ContextBatches(sampler, everything, len(vocab), torch.float64)
    for step in range(10):
        graph = select_contexts(everything, *sampler(step))
        batch = batches(step)
        assert relative_error(batch.targets.sum(1), batch.weights[-1]) < RELATIVE
        assert_gradients_equal(model, graph, batch)
    with pytest.raises(ValueError, match="expected a distinct graph and a row"):
        select_contexts(cw.dense_graph(packed, factors=factors), *sampler(0))


def test_the_oldest_tap_reads_few_rows(names_txt: cw.Words) -> None:
    """What the order of the rows below is for: each tap's product is over a range of them."""
    vocabulary = cw.Vocabulary.from_words(names_txt.words)
    graph = cw.distinct_graph(cw.pack(cw.split_words(names_txt.words).train, vocabulary))
    parts = Parts(graph, len(vocabulary))
    whole = parts.part(torch.arange(graph.num_rows), graph.weights[-1], graph.totals[-1], graph.weights[-1])
    (begin, end), (_, last) = whole.ranges[2]
    assert last == graph.weights[1].numel()
    assert end - begin < 0.3 * last


# ---------------------------------------------------------------------------------------------------------------------
# Sampling contexts

COUNTS = torch.tensor([1.0] * 400 + [2.0] * 100 + [7.0] * 20 + [60.0, 300.0])


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_over_the_steps_every_context_counts_as_often_as_in_the_text(power: float) -> None:
    """A phase that moves on by p crosses an integer p times a step, but for one: weighted by 1 / p, that is once."""
    steps = 500
    sampler = ContextSampler(COUNTS, 50, 50, steps, power, seed=0)
    seen, probability = torch.zeros(COUNTS.numel(), dtype=torch.float64), torch.ones(COUNTS.numel()).double()
    for step in range(steps):
        rows, scale = sampler(step)
        assert torch.equal(rows, rows.sort()[0])
        seen[rows] += scale
        probability[rows] = 1 / scale
    assert bool(((seen / steps - 1).abs() <= 1 / (steps * probability) + 1e-9).all())
    assert float(probability.sum()) == pytest.approx(50, rel=0.02)


def test_every_step_is_unbiased_and_batches_grow() -> None:
    """Over seeds: the mean count of each context at a step is its count, and the sizes are those asked for."""
    steps, seeds = 20, 1500
    for step, expected in ((0, 40), (19, 160)):
        total, size = torch.zeros(COUNTS.numel(), dtype=torch.float64), 0
        smallest = 1.0
        for seed in range(seeds):
            rows, scale = ContextSampler(COUNTS, 40, 160, steps, 0.7, seed)(step)
            total[rows] += scale
            size += rows.numel()
            smallest = min(smallest, float((1 / scale).min()))
        # the mean of `seeds` draws that are 1 / p with probability p has variance (1 / p - 1) / seeds; 6 deviations
        assert float((total / seeds - 1).abs().max()) < 6 * ((1 / smallest - 1) / seeds) ** 0.5
        assert size / seeds == pytest.approx(expected, rel=0.02)


def test_a_step_depends_on_nothing_but_its_number() -> None:
    samplers = [ContextSampler(COUNTS, 40, 160, 30, 0.7, seed=5) for _ in range(2)]
    for step in range(30):
        samplers[0](step)
    for step in (29, 3, 17):
        assert torch.equal(samplers[0](step)[0], samplers[1](step)[0])
    other = ContextSampler(COUNTS, 40, 160, 30, 0.7, seed=6)
    assert not torch.equal(other(3)[0], samplers[0](3)[0])


def test_a_batch_larger_than_the_text_is_the_text() -> None:
    sampler = ContextSampler(COUNTS, 10_000, 20_000, 5, 0.7, seed=0)
    for step in range(5):
        rows, scale = sampler(step)
        assert torch.equal(rows, torch.arange(COUNTS.numel()))
        assert bool((scale == 1).all())
    with pytest.raises(ValueError, match="first, last: expected 1 <= first <= last, got 5 and 4"):
        ContextSampler(COUNTS, 5, 4, 5, 0.7, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser


def test_muon_adam_is_muon_and_adamw(packed: cw.Packed, vocab) -> None:
    """Step by step, with a rate that changes; in float64, so that they differ by rounding alone."""
    model = network(len(vocab), n_hidden=17)
    form = ClosedForm(model)
    ours = MuonAdam(form, 0.1, 0.03, 0.9, 0.1, (0.8, 0.95), orthogonal_steps=3)
    matrices = [p for name, p in model.named_parameters() if name.endswith("conv.weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("conv.weight")]
    theirs = [Muon(matrices, 0.1, 0.9, 0.1, steps=3), torch.optim.AdamW(rest, 0.03, (0.8, 0.95), weight_decay=0.1)]
    graph = cw.distinct_graph(packed)
    batch = graph_batch(graph, len(vocab), torch.float64)
    for step in range(6):
        rate = 1 - 0.1 * step
        model.zero_grad()
        cw.loss(model(graph), graph).backward()
        for optimizer, lr in zip(theirs, (0.1, 0.03), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
        form.gradients(batch)
        ours.step(rate)
        for name, p in model.named_parameters():
            assert relative_error(form.parameters()[name], p) < 1e-8, f"{name} after step {step}"


def test_the_optimizer_s_state_is_complete(packed: cw.Packed, vocab) -> None:
    batch = graph_batch(cw.distinct_graph(packed), len(vocab), torch.float64)

    def run(form: ClosedForm, optimizer: MuonAdam, steps: int) -> None:
        for _ in range(steps):
            form.gradients(batch)
            optimizer.step()

    form = ClosedForm(network(len(vocab)))
    optimizer = MuonAdam(form, 0.1, 0.03)
    run(form, optimizer, 3)
    taken_up = ClosedForm(network(len(vocab)))
    for name, value in taken_up.parameters().items():
        value.copy_(form.parameters()[name])
    other = MuonAdam(taken_up, 0.1, 0.03)
    state = {name: value.clone() for name, value in optimizer.state().items()}
    other.load(state)
    run(form, optimizer, 3)
    run(taken_up, other, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(form.parameters().values(), taken_up.parameters().values(), strict=True)
    )
    for name in state:
        with pytest.raises(KeyError):
            other.load({key: value for key, value in state.items() if key != name})


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("factors", [(2, 2, 2), (2,), (4, 2), (2, 2, 2, 2), (2, 3)])
def test_inference_is_the_network(make, factors: tuple[int, ...], packed: cw.Packed, vocab, monkeypatch) -> None:
    model = network(len(vocab), n_hidden=27, factors=factors)
    for block in model.layers:
        block.norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        block.norm.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    model.eval()
    monkeypatch.setattr("convwave.infer.score._BLOCK", 100)  # several blocks, the last of them smaller
    graph = make(packed, factors=factors)
    infer = Inference(graph)
    with torch.no_grad():
        expected = model(graph).log_softmax(1)
    for _ in range(2):
        got = infer(model)[:, : len(vocab)]
        assert relative_error(got, expected) < RELATIVE
        infer._buffers[torch.float64]("result", *infer(model).shape).fill_(float("nan"))
    # float32 has at most four times the error of the definition in PyTorch
    single = replace_dtype(model)
    with torch.no_grad():
        peer = relative_error(single(graph).log_softmax(1), expected)
    assert relative_error(infer(single)[:, : len(vocab)], expected) < 4 * max(peer, 1e-7)
    with pytest.raises(ValueError, match="model: expected factors"):
        infer(cw.ConvWave(len(vocab), factors=(2, 2, 2, 2, 2)))


def replace_dtype(model: cw.ConvWave) -> cw.ConvWave:
    copy = cw.ConvWave(model.vocab_size, 10, 27, factors=model.factors)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Tiers


@pytest.fixture(scope="module")
def few(words: cw.Words) -> cw.Words:
    return words._replace(words=words.words[:400])


@pytest.mark.parametrize(("recipe", "batch"), [("fast", 64), ("fast", 10_000), ("record", 64), ("sprint", 200)])
def test_tiers_take_the_same_steps(recipe: str, batch: int, few: cw.Words) -> None:
    """The same batches and the same arithmetic: early losses differ by rounding, which has had no time to grow."""
    config = Config.make(recipe=recipe, steps=8, batch=batch, n_hidden=20)
    fast, plain = (train(replace(config, tier=tier), few) for tier in ("cpu", "reference"))
    assert fast.losses == pytest.approx(plain.losses, abs=2e-4)
    assert abs(fast.losses[0] - fast.losses[-1]) > 0.1, "the loss moves, so equality says something"


@pytest.mark.parametrize("recipe", ["fast", "sprint"])
def test_tiers_end_at_the_same_losses(recipe: str, names_txt: cw.Words) -> None:
    """Within twice the spread between seeds, 0.0016."""
    results = [train(Config.make(recipe=recipe, tier=tier), names_txt).splits for tier in ("cpu", "reference")]
    for split in ("train", "val"):
        assert results[0][split].loss == pytest.approx(results[1][split].loss, abs=0.0032)


def test_tiers_make_the_same_checkpoints(few: cw.Words, tmp_path) -> None:
    """One form, whichever tier wrote it: names, shapes, statistics of the training split."""
    for tier in ("cpu", "reference"):
        train(Config.make("convwave", "sprint", steps=6, batch=100, tier=tier), few, tmp_path / tier)
    models = [cw.load(tmp_path / tier / MODEL_FILE) for tier in ("cpu", "reference")]
    states = [model.state_dict() for model in models]
    assert {n: t.shape for n, t in states[0].items()} == {n: t.shape for n, t in states[1].items()}
    for name, tensor in states[0].items():
        assert relative_error(tensor, states[1][name]) < 1e-2, name


@pytest.mark.parametrize("recipe", ["fast", "sprint"])
def test_a_tier_is_deterministic(recipe: str, few: cw.Words) -> None:
    config = Config.make(recipe=recipe, steps=12, batch=100)
    assert config.tier == "cpu"
    first, second = (train(config, few) for _ in range(2))
    assert first.losses == second.losses
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_the_fastest_tier_is_chosen() -> None:
    assert available_tiers() == ["cpu", "reference"]
    assert available_tiers("convwave", "fast", "cuda") == ["reference"]
    assert choose_tier("auto", "convwave", "sprint", "cpu") == "cpu"
    assert choose_tier("auto", "mlp3", "blog", "cpu") == choose_tier("reference", "convwave", "fast", "cpu")
    for recipe in RECIPES:
        assert available_tiers("convwave", recipe)[-1] == "reference", "which runs everything"
    with pytest.raises(ValueError, match="tier: expected auto or one of cuda-graph, cpu, reference, got 'warp'"):
        choose_tier("warp", "convwave", "fast", "cpu")
    with pytest.raises(ValueError, match="expected one of reference for convwave by recipe blog on cpu, got 'cpu'"):
        choose_tier("cpu", "convwave", "blog", "cpu")
    assert list(TIERS) == ["cuda-graph", "cpu", "reference"]


def test_the_padding_of_the_vocabulary_is_whole_vectors() -> None:
    assert [closed_form.padded(n) for n in (1, 16, 17, 27, 33)] == [16, 16, 32, 32, 48]


def test_the_sprint_recipe_has_the_posts_network() -> None:
    config = Config.make(recipe="sprint")
    assert (config.n_embd, config.n_hidden, config.levels) == (10, 68, 3)
    assert SPRINT.batch_of == "contexts"
