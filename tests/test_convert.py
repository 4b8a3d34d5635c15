"""Conversion of windowed networks, the post's own classes and torch.nn's, both ways; refusals with their reasons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from convwave import reference
from tests.helpers import GRAPHS, RELATIVE, as_reference_gradients, per_position, randomize, relative_error

FACTORS = [(2, 2, 2), (4, 2), (2, 4), (8,), (3, 2, 2), (2,)]


class Join(nn.Module):
    """Somebody's own module that joins n neighbours of (B, T, C)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        return x.reshape(B, T // self.n, self.n * C)


class Transposed(nn.Module):
    """nn.BatchNorm1d wants channels second: a common way to write the hierarchical network with torch.nn."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1)


def somebodys_network(factors: tuple[int, ...], widths: list[int], bias: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Embedding(6, 3)]
    channels = 3
    for factor, width in zip(factors, widths, strict=True):
        norm = Transposed(nn.BatchNorm1d(width, momentum=0.2))
        layers += [Join(factor), nn.Linear(channels * factor, width, bias=bias), norm, nn.Tanh()]
        channels = width
    net = nn.Sequential(*layers, Last(), nn.Linear(channels, 6)).double()
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean += torch.randn_like(module.running_mean)
            module.running_var *= 1.5
    return net


@pytest.fixture
def packed() -> cw.Packed:
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 2, 5, 9, 17, 3]
    return cw.pack_ids([torch.randint(1, 6, (n,), generator=generator).tolist() for n in lengths])


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_torch_network_becomes_the_same_function(factors, bias: bool, packed: cw.Packed) -> None:
    """Outputs in both modes, gradients, and running statistics up to the folded bias."""
    net = somebodys_network(factors, [7, 5, 10][: len(factors)], bias)
    model = cw.from_windowed(net)
    assert not model.unbiased
    windows = reference.build_windows(packed, model.context)
    for training in (False, True):
        expected = net.train(training)(windows.inputs)
        F.cross_entropy(expected, windows.targets).backward()
        for make in GRAPHS:
            again = cw.from_windowed(net) if not training else model
            model.train(training), model.zero_grad()
            graph = make(packed, factors=model.factors)
            got = model(graph)
            assert relative_error(per_position(got, graph), expected) < RELATIVE
            cw.loss(got, graph).backward()
            assert relative_error(model.head.weight.grad, net[-1].weight.grad) < RELATIVE
            linears = [m for m in net if isinstance(m, nn.Linear)][:-1]
            for block, linear in zip(model.layers, linears, strict=True):
                ours = block.conv.weight.grad.transpose(1, 2).flatten(1)
                assert float((ours - linear.weight.grad).abs().max()) < RELATIVE
            assert again.factors == factors
            if training:
                break  # the running statistics of `model` have moved once, as those of `net` have
        net.zero_grad()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    for block, norm, linear in zip(model.layers, norms, linears, strict=True):
        shift = 0 if linear.bias is None else linear.bias.detach()
        assert relative_error(block.norm.running_mean, norm.running_mean - shift) < RELATIVE
        assert relative_error(block.norm.running_var, norm.running_var) < RELATIVE
        assert block.norm.momentum == 0.2


@pytest.mark.parametrize("factors", FACTORS)
def test_to_torch_and_back_keeps_every_bit(factors, packed: cw.Packed) -> None:
    torch.manual_seed(0)
    model = cw.ConvWave(6, 3, [9, 4, 6][: len(factors)], unbiased=False, factors=factors).double()
    net = cw.to_torch(model)
    assert {type(m).__module__ for m in net} == {
        t.__module__ for t in (nn.Embedding, nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.Tanh)
    }
    windows = reference.build_windows(packed, model.context)
    graph = cw.dense_graph(packed, factors=factors)
    for training in (True, False):
        assert relative_error(net.train(training)(windows.inputs), model.train(training)(graph)) < RELATIVE
    again = cw.from_windowed(net)
    for name, tensor in model.state_dict().items():
        assert relative_error(again.state_dict()[name], tensor) < RELATIVE, name
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in again.named_parameters())


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_posts_classes_with_other_widths_and_factors(unbiased: bool, packed: cw.Packed) -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = reference.HierarchicalMLP(6, 3, [5, 11], factors=(4, 2), generator=generator).to(torch.float64)
    randomize(mlp, 1)
    for norm in mlp.norms():
        norm.unbiased = unbiased
    model = cw.from_windowed(mlp)
    assert (model.factors, model.widths, model.unbiased) == ((4, 2), (5, 11), unbiased)
    assert [block.conv.dilation for block in model.layers] == [1, 4]
    again = cw.to_windowed(model)
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), again.parameters(), strict=True))
    windows = reference.build_windows(packed, 8)
    expected = mlp(windows.inputs)
    F.cross_entropy(expected, windows.targets).backward()
    graph = cw.dense_graph(packed, factors=(4, 2))
    cw.loss(model(graph), graph).backward()
    for theirs, ours in zip(mlp.parameters(), as_reference_gradients(model), strict=True):
        assert float((theirs.grad - ours).abs().max()) < RELATIVE


def test_a_linear_bias_of_the_posts_classes_is_folded(packed: cw.Packed) -> None:
    mlp = randomize(reference.HierarchicalMLP(6, 3, 5).to(torch.float64), 2)
    mlp.layers[2].bias = torch.randn(5, dtype=torch.float64)
    windows = reference.build_windows(packed, 8)
    for training in (True, False):
        model = cw.from_windowed(mlp.train(training))
        graph = cw.dense_graph(packed)
        assert relative_error(model(graph), mlp(windows.inputs)) < RELATIVE


def test_frozen_parameters_stay_frozen() -> None:
    net = somebodys_network((2, 2), [4, 5], False)
    net[0].weight.requires_grad_(False)
    net[1 + 1].weight.requires_grad_(False)
    model = cw.from_windowed(net)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embedding.weight", "blocks.0.conv.weight"}


def tied() -> nn.Sequential:
    net = plain(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5))
    net[5].weight = net[0].weight
    return net


def half_evaluating() -> nn.Sequential:
    net = plain(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5))
    net[3].eval()
    return net


def plain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


REFUSED = [
    (tied, "shares a weight between layers"),
    (half_evaluating, "some layers are in training mode and some are not"),
    (lambda: plain(nn.Linear(3, 4)), "an nn.Embedding first"),
    (lambda: plain(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 5)), "at least one Linear, BatchNorm1d, Tanh"),
    (lambda: plain(nn.Embedding(5, 3), nn.Conv1d(3, 4, 2), nn.Linear(4, 5)), r"cannot convert Conv1d"),
    (
        lambda: plain(
            nn.Embedding(5, 3),
            nn.Flatten(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(0.1),
            nn.Linear(4, 5),
        ),
        "cannot convert Dropout",
    ),
    (
        lambda: plain(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 5)),
        r"Linear, BatchNorm1d, Tanh per level, got \['Linear', 'Tanh', 'BatchNorm1d'\]",
    ),
    (
        lambda: plain(
            nn.Embedding(5, 3, padding_idx=0),
            nn.Flatten(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Linear(4, 5),
        ),
        "padding_idx",
    ),
    (
        lambda: plain(
            nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5, bias=False)
        ),
        "nn.Linear with bias last",
    ),
    (
        lambda: plain(
            nn.Embedding(5, 3),
            nn.Flatten(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4, affine=False),
            nn.Tanh(),
            nn.Linear(4, 5),
        ),
        "needs affine parameters",
    ),
    (
        lambda: plain(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5)),
        "level 0 reads 7 numbers from neighbours of 3",
    ),
    (
        lambda: plain(
            nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 5)
        ),
        "computes another function in training mode",
    ),
    (
        lambda: plain(
            nn.Embedding(5, 3),
            nn.Flatten(0, 1),
            nn.Unflatten(0, (2, -1)),
            nn.Flatten(1),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Linear(4, 5),
        ),
        "cannot read windows of 2 tokens|computes another function",
    ),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason[:30] for _, reason in REFUSED])
def test_a_network_that_cannot_be_converted_is_refused_with_the_reason(make, reason: str) -> None:
    with pytest.raises(cw.ConversionError, match=reason) as caught:
        cw.from_windowed(make())
    assert "\n" not in str(caught.value)


def test_the_unbiased_network_has_no_torch_counterpart() -> None:
    with pytest.raises(cw.ConversionError, match=r"unbiased variance, nn\.BatchNorm1d with the biased one"):
        cw.to_torch(cw.ConvWave())


def test_statistics_over_positions_have_no_windowed_counterpart() -> None:
    model = cw.ConvWave(5, unbiased=False, statistics="positions")
    for convert in (cw.to_windowed, cw.to_torch):
        with pytest.raises(cw.ConversionError, match="statistics='positions'"):
            convert(model)


def test_conversion_leaves_the_network_as_it_was() -> None:
    net = somebodys_network((2, 2), [4, 5], True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    cw.from_windowed(net)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
