"""What training reads and does for given seeds: properties, and digests that must not change unnoticed.

Tiers are compared with one another elsewhere; this file sees what all of them would get wrong alike. Everything runs on
the bundled names.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import convwave as cw
from convwave.data.batches import Plan, StepReader
from convwave.train.closed_form import ClosedForm, ClosedFormRun, MuonAdam
from convwave.train.config import Config
from convwave.train.loop import begin
from convwave.train.optim import ADAM_BETA2, Muon, make_optimizers, orthogonalize
from convwave.train.recipes import FAST, RECIPES, SPRINT, vary
from convwave.train.setup import convolution
from tests.helpers import CPU_TIERS, relative_error


@pytest.fixture(scope="module")
def corpus() -> cw.Corpus:
    return cw.Corpus(cw.data.bundled_words())


def reader_of(corpus: cw.Corpus, plan: Plan, seed: int = 0) -> StepReader:
    generator = torch.Generator().manual_seed(seed)
    return StepReader(plan, corpus.train, len(corpus.vocabulary), (2, 2, 2), generator)


def windows_of(graph: cw.Graph) -> Tensor:
    """(top rows, context) token ids, found by following the taps."""
    windows = graph.tokens[:, None]
    for taps in graph.taps:
        windows = torch.cat([windows[tap] for tap in taps], dim=1)
    return windows


def what_is_read(graph: cw.Graph) -> list[tuple[tuple[int, ...], int, float]]:
    """Every window with what it predicts and how often, in an order that no implementation chooses."""
    rows = torch.arange(graph.num_rows) if graph.target_rows is None else graph.target_rows
    read: Counter[tuple[tuple[int, ...], int]] = Counter()
    for window, target, count in zip(
        windows_of(graph)[rows].tolist(), graph.target_ids.tolist(), graph.target_counts.tolist(), strict=True
    ):
        read[tuple(window), target] += count
    return sorted((*key, round(count, 6)) for key, count in read.items())


def digest(graph: cw.Graph) -> str:
    return hashlib.sha256(repr(what_is_read(graph)).encode()).hexdigest()[:16]


NAMES = Plan("names", 100, 400, 0)
CONTEXTS = Plan("contexts", 300, 100, 0, growth=1.7, context_power=0.7)
WINDOWS = Plan("windows", 32, 100, 0)
NOISY = Plan("names", 100, 400, 0, token_noise=0.1)


FROZEN = {
    ("names", 0): ["99cfb5aeb88a4083", "8873b84f0999e744", "193a077734f724ca"],
    ("names", 3): ["53c81be34ce5c845", "12a6b8ebd9ee75b7", "31443edd9d589426"],
    ("contexts", 0): ["e11d1c4ea85b3ffc", "18ee5d36d76f0e27", "b7a745f9f773309b"],
    ("contexts", 3): ["c713a2fa91b3be7a", "2e45c503f228b442", "c26601175b391e07"],
    ("windows", 0): ["2f460e5c3ad0a629", "e1d28ac3af0cfd4a", "f17cc51c384eac8f"],
    ("windows", 3): ["4a2fdfcdec87938e", "8304180ad7f8d78f", "8dc42ec3aa9a8b59"],
    ("noisy", 0): ["74bfb552ed47e1b8", "9bc07508a6451494", "c2cb7590f09651ee"],
    ("noisy", 3): ["fa392d69ab443fa9", "d02aa9a5303c1136", "058e6a7a4bb2f31a"],
}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("plan", [NAMES, CONTEXTS, WINDOWS, NOISY], ids=["names", "contexts", "windows", "noisy"])
def test_steps_read_what_they_always_read(
    plan: Plan, seed: int, corpus: cw.Corpus, request: pytest.FixtureRequest
) -> None:
    """Steps 0, 1, and one in a later epoch, or a later stage of growing batches."""
    reader = reader_of(corpus, plan._replace(seed=seed), seed)
    name = next(part for part in request.node.callspec.id.split("-") if not part.isdigit())
    assert [digest(reader.graph(i)) for i in (0, 1, 90)] == FROZEN[name, seed]


@pytest.mark.parametrize("plan", [NAMES, CONTEXTS], ids=["names", "contexts"])
def test_a_step_depends_on_seed_and_number_alone(plan: Plan, corpus: cw.Corpus) -> None:
    first, again = reader_of(corpus, plan, 0), reader_of(corpus, plan, 99)
    steps = (0, 1, 40, 41, 99)
    forward = {i: digest(first.graph(i)) for i in steps}
    assert {i: digest(again.graph(i)) for i in reversed(steps)} == forward
    assert len(set(forward.values())) == len(steps)
    other = reader_of(corpus, plan._replace(seed=1), 0)
    assert not set(forward.values()) & {digest(other.graph(i)) for i in steps}


def test_no_epoch_of_a_seed_is_an_epoch_of_another(corpus: cw.Corpus) -> None:
    """Seeds that are neighbours must not read the same names an epoch apart."""
    an_epoch = corpus.train.num_words // NAMES.batch
    firsts = {}
    for seed in range(4):
        reader = reader_of(corpus, NAMES._replace(seed=seed))
        for epoch in range(4):
            firsts[seed, epoch] = digest(reader.graph(an_epoch * epoch))
    assert len(set(firsts.values())) == 16


def test_every_epoch_reads_every_name_once(corpus: cw.Corpus) -> None:
    """On the bundled list: all full batches of an epoch together are the text, but for the names of half a batch."""
    reader = reader_of(corpus, NAMES)
    an_epoch = corpus.train.num_words // NAMES.batch
    whole = Counter({(w, t): n for w, t, n in what_is_read(reader.everything)})
    for epoch in (0, 1):
        read: Counter[tuple[tuple[int, ...], int]] = Counter()
        for i in range(an_epoch):
            read.update({(w, t): n for w, t, n in what_is_read(reader.graph(epoch * an_epoch + i))})
        assert all(n <= whole[key] for key, n in read.items())
        opening = sum(n for (window, _), n in read.items() if not any(window))
        assert opening == an_epoch * NAMES.batch


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_frequent_contexts_are_drawn_by_their_power(power: float, corpus: cw.Corpus) -> None:
    """A context of c windows stands for c / p of them: p = min(1, a c ** power), and the sum of all p is the batch."""
    plan = CONTEXTS._replace(context_power=power)
    reader = reader_of(corpus, plan)
    everything = reader.everything
    often = {tuple(w): c for w, c in zip(windows_of(everything).tolist(), everything.weights[-1].tolist(), strict=True)}
    graph = reader.graph(0)
    counts = torch.tensor([often[tuple(w)] for w in windows_of(graph).tolist()], dtype=torch.float64)
    probability = counts / graph.weights[-1]
    assert bool((probability <= 1 + 1e-9).all())
    factors = (probability / counts**power)[probability < 1 - 1e-9]
    assert len(factors) > 20
    assert relative_error(factors, factors[:1].expand_as(factors)) < 1e-9
    expected = (factors[0] * everything.weights[-1] ** power).clamp(max=1).sum()
    assert float(expected) == pytest.approx(plan.batch, rel=1e-9)


def test_batches_of_contexts_grow(corpus: cw.Corpus) -> None:
    """Draws are even: over n steps a context's count is off by less than 1, so a mean size by some 0.5 R ** 0.5 / n."""
    reader = reader_of(corpus, CONTEXTS)
    sizes = [reader.graph(i).num_rows for i in range(CONTEXTS.steps)]
    means = [sum(sizes[20 * stage : 20 * stage + 20]) / 20 for stage in range(5)]
    bound = 5 * 0.5 * reader.everything.num_rows**0.5 / 20
    for stage, mean in enumerate(means):
        assert abs(mean - 300 * 1.7 ** (stage / 4)) < bound
    assert bound < 0.15 * 300
    constant = reader_of(corpus, CONTEXTS._replace(growth=1.0))
    assert abs(sum(constant.graph(i).num_rows for i in range(80, 100)) / 20 - 300) < bound


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_noise_replaces_letters_at_its_rate_and_nothing_else(rate: float, corpus: cw.Corpus) -> None:
    """A letter is another with probability rate times 1 - its share of the text; the opening 0 never is."""
    clean, noisy = (reader_of(corpus, NAMES._replace(token_noise=noise)) for noise in (0.0, rate))
    share = torch.bincount(corpus.train.tokens, minlength=len(corpus.vocabulary)).double() / len(corpus.train)
    changed, expected, variance = 0, 0.0, 0.0
    arrived: Counter[int] = Counter()
    for i in range(30):
        pair = []
        for graph in (clean.graph(i), noisy.graph(i)):
            assert graph.inverse is not None
            pair.append(windows_of(graph)[graph.inverse][:, -1])
        before, after = pair
        assert len(before) == len(after)
        opens = before == 0
        assert torch.equal(opens & (after == 0), opens), "what opens a name stays"
        probability = rate * (1 - share[before[~opens]])
        different = (before != after)[~opens]
        changed += int(different.sum())
        arrived.update(after[~opens][different].tolist())
        expected += float(probability.sum())
        variance += float((probability * (1 - probability)).sum())
    assert abs(changed - expected) < 5 * variance**0.5
    assert len(arrived) > 20, "replaced by any letter of the text"
    assert noisy.graph(3).totals == clean.graph(3).totals


def test_noise_leaves_what_is_to_be_predicted(corpus: cw.Corpus) -> None:
    clean, noisy = reader_of(corpus, NAMES), reader_of(corpus, NAMES._replace(token_noise=0.5))
    for i in (0, 7):
        targets = []
        for graph in (clean.graph(i), noisy.graph(i)):
            counts = torch.zeros(len(corpus.vocabulary), dtype=torch.float64)
            targets.append(counts.index_add_(0, graph.target_ids, graph.target_counts))
        assert torch.equal(*targets)


def test_a_new_network_has_the_posts_scales() -> None:
    """The standard deviation of n normal numbers is known to 1 / (2 n) ** 0.5 of itself; five of those are allowed."""
    torch.manual_seed(0)
    model = cw.ConvWave(27, 24, [48, 80, 64], factors=(2, 3, 4))
    fans = (24 * 2, 48 * 3, 80 * 4)
    expected = {f"blocks.{i}.conv.weight": fan**-0.5 for i, fan in enumerate(fans)}
    expected |= {"head.weight": 0.1 * 64**-0.5, "embedding.weight": 1.0}
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        values = parameters.pop(name)
        tolerance = 5 * (2 * values.numel()) ** -0.5
        assert float(values.detach().std()) / std == pytest.approx(1, abs=tolerance), name
        assert abs(float(values.detach().mean())) < 5 * std * values.numel() ** -0.5, name
    for name, values in parameters.items():
        assert torch.equal(values, torch.full_like(values, float(name.endswith("norm.weight")))), name


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_a_run_begins_with_those_scales_and_its_seed(tier: str, corpus: cw.Corpus) -> None:
    config = Config.make(tier=tier, n_hidden=90, seed=5)
    model = begin(config, corpus.train, corpus.vocabulary).model()
    for i, fan in enumerate((20, 180, 180)):
        weight = model.layers[i].conv.weight
        assert float(weight.detach().std()) * fan**0.5 == pytest.approx(1, abs=5 * (2 * weight.numel()) ** -0.5)
    weight = model.head.weight
    assert float(weight.detach().std()) * 10 * 90**0.5 == pytest.approx(1, abs=5 * (2 * weight.numel()) ** -0.5)
    torch.manual_seed(5)
    same = cw.ConvWave(len(corpus.vocabulary), 10, 90)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_weight_decay_is_the_recipes_of_every_parameter(tier: str, corpus: cw.Corpus) -> None:
    """Two first steps, one without decay: they differ by rate * lr * decay of each weight and by nothing else."""
    recipe = vary(FAST, {"weight_decay": 0.4, "warmup": 0.0})
    after = []
    for chosen in (recipe, vary(recipe, {"weight_decay": 0.0})):
        run = begin(Config.make(recipe=chosen, tier=tier, batch=50, seed=1), corpus.train, corpus.vocabulary)
        before = {name: p.detach().clone().double() for name, p in run.model().named_parameters()}
        run.step(0)
        after.append({name: p.detach().clone().double() for name, p in run.model().named_parameters()})
    for name, weight in before.items():
        lr = recipe.lr if name.endswith("conv.weight") else recipe.adam_lr
        lost = after[1][name] - after[0][name]
        assert float((lost - 0.4 * lr * weight).abs().max()) < 1e-6, name
        assert not float(weight.abs().max()) or float(lost.abs().max()) > 0, name


def test_every_recipe_s_numbers_reach_both_optimizers(corpus: cw.Corpus) -> None:
    for recipe in (r for r in RECIPES.values() if r.optimizer == "muon"):
        muon, adam = make_optimizers(recipe, cw.ConvWave(27, 4, 5))
        ours = muon.param_groups[0]
        assert (ours["lr"], ours["momentum"], ours["weight_decay"]) == (recipe.lr, recipe.momentum, recipe.weight_decay)
        assert ours["steps"] == recipe.orthogonal_steps
        other = adam.param_groups[0]
        assert (other["lr"], other["weight_decay"]) == (recipe.adam_lr, recipe.weight_decay)
        assert other["betas"] == (recipe.adam_beta, ADAM_BETA2)
        if recipe.batch_of == "text":
            continue
        form = ClosedFormRun(replace(Config.make(recipe=recipe), tier="cpu"), corpus.train, corpus.vocabulary).optimizer
        assert (form.lr, form.momentum, form.weight_decay) == (recipe.lr, recipe.momentum, recipe.weight_decay)
        assert (form.adam_lr, form.betas) == (recipe.adam_lr, (recipe.adam_beta, ADAM_BETA2))
        assert form.orthogonal_steps == recipe.orthogonal_steps
    assert SPRINT.growth > 1
    assert SPRINT.context_power > 0


@pytest.mark.parametrize(("rows", "columns"), [(48, 6), (6, 48), (7, 7)])
def test_muon_moves_tall_matrices_further(rows: int, columns: int) -> None:
    """By (rows / columns) ** 0.5, so that a step changes what comes out by as much; wide ones are not slowed down."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(rows, columns, 1, generator=generator).double())
    weight.grad = torch.randn(rows, columns, 1, generator=generator).double()
    before = weight.detach().clone()
    Muon([weight], lr=0.1, momentum=0.0).step()
    moved = (before - weight.detach()).flatten(1)
    expected = 0.1 * max(1.0, rows / columns) ** 0.5 * orthogonalize(weight.grad.flatten(1))
    assert relative_error(moved, expected) < 1e-10
    # nearly orthogonal: the norm of as many unit vectors as the shorter side has, up to the quintic's (0.7, 1.2)
    norm = float(moved.norm()) / (0.1 * math.sqrt(max(1.0, rows / columns) * min(rows, columns)))
    assert 0.6 < norm < 1.25


def test_the_closed_form_s_muon_does_too() -> None:
    torch.manual_seed(0)
    model = cw.ConvWave(27, 3, [40, 12, 9], factors=(2, 2, 2)).double()
    form = ClosedForm(model)
    optimizer = MuonAdam(form, 0.1, 0.0, momentum=0.0)
    for gradient in form.matrix_gradients:
        gradient.normal_()
    gradients = {name: g.clone() for name, g in form.gradients_by_name().items()}
    before = {name: p.clone() for name, p in form.parameters().items()}
    optimizer.step()
    for name, after in form.parameters().items():
        if name.endswith("conv.weight"):
            moved = (before[name] - after).flatten(1)
            rows, columns = moved.shape
            expected = 0.1 * max(1.0, rows / columns) ** 0.5 * orthogonalize(gradients[name].flatten(1))
            assert relative_error(moved, expected) < 1e-10, name
    assert [matrix.shape[2] > matrix.shape[0] * matrix.shape[1] for matrix in form.matrices] == [True, False, False]


FIRST_LOSSES = {
    "fast": [3.3046, 3.2516, 3.1781, 3.0912, 3.059],
    "sprint": [3.3039, 3.2049, 3.1316, 2.9996, 2.9446],
    "record": [3.304, 3.2804, 3.2619, 3.2399, 3.232],
}


@pytest.mark.parametrize("tier", CPU_TIERS)
@pytest.mark.parametrize("recipe", ["fast", "sprint", "record"])
def test_the_first_losses_are_what_they_always_were(recipe: str, tier: str, corpus: cw.Corpus) -> None:
    """Five steps from a seed, on any machine: draws are whole numbers, and rounding is far below 1e-3."""
    config = Config.make(recipe=recipe, tier=tier, batch=100, steps=5, seed=7, n_embd=10, n_hidden=24)
    run = begin(config, corpus.train, corpus.vocabulary)
    losses = [run.step(i) for i in range(5)]
    assert losses == pytest.approx(FIRST_LOSSES[recipe], abs=1e-3)


def test_a_plan_has_what_the_recipe_says() -> None:
    words = cw.data.bundled_words()
    corpus = cw.data.packing.Corpus(words._replace(words=words.words[:100]))
    for recipe in RECIPES.values():
        if recipe.batch_of != "windows":
            _, reader = convolution(Config.make("convwave", recipe), corpus.train, corpus.vocabulary)
            plan = reader.plan
            assert (plan.token_noise, plan.growth, plan.context_power) == (
                recipe.token_noise,
                recipe.growth,
                recipe.context_power,
            )
