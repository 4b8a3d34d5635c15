"""The post's networks: sizes, initialisation, and what their layers compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convwave as cw
from convwave import reference
from convwave.train.recipes import PUBLISHED


def test_parameter_counts() -> None:
    assert reference.HierarchicalMLP().num_parameters == 22_397
    # n_embd * V + context * n_embd * n_hidden + 2 n_hidden + (n_hidden + 1) V, by hand
    assert reference.MLP(27, 10, 200, 3).num_parameters == 270 + 6_000 + 400 + 5_427
    assert reference.MLP(27, 10, 200, 8).num_parameters == 270 + 16_000 + 400 + 5_427
    assert reference.HierarchicalMLP(27, 24, 128).num_parameters == 76_579  # the lecture's scaled network
    assert {name: (n.train, n.val) for name, n in PUBLISHED.items()} == {
        "mlp3": (2.0552, 2.1033),
        "mlp8": (1.9202, 2.0310),
        "hierarchical": (1.9113, 2.0209),
    }


def test_initialisation_draws_what_the_posts_does() -> None:
    """One generator, seeded with 42, in the order of the listing: embedding, then each Linear, the head scaled."""
    torch.manual_seed(42)
    embedding = torch.randn((27, 10))
    weights = [torch.randn((20, 68)) / 20**0.5, torch.randn((136, 68)) / 136**0.5, torch.randn((136, 68)) / 136**0.5]
    head = torch.randn((68, 27)) / 68**0.5 * 0.1
    parameters = reference.HierarchicalMLP().parameters()
    matrices = [p for p in parameters if p.ndim == 2]
    assert all(torch.equal(a, b) for a, b in zip(matrices, [embedding, *weights, head], strict=True))
    torch.manual_seed(42)
    assert torch.equal(reference.MLP(uniform_embedding=True).parameters()[0], torch.rand((27, 10)))


def test_windows_are_filled_with_token_0_on_the_left(vocab: cw.Vocabulary) -> None:
    windows = reference.build_windows(cw.pack_ids([[5, 13, 13, 1]]), 3)
    assert windows.inputs.tolist() == [[0, 0, 0], [0, 0, 5], [0, 5, 13], [5, 13, 13], [13, 13, 1]]
    assert windows.targets.tolist() == [5, 13, 13, 1, 0]


@pytest.mark.parametrize("unbiased", [True, False])
def test_batchnorm_in_three_dimensions(unbiased: bool) -> None:
    norm = reference.BatchNorm1d(4, unbiased=unbiased)
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    flat = x.reshape(15, 4)
    y = norm(x)
    assert torch.allclose(y.reshape(15, 4).mean(0), torch.zeros(4), atol=1e-6)
    assert torch.allclose(y.reshape(15, 4).var(0, correction=int(unbiased)), torch.ones(4), atol=1e-4)
    assert torch.allclose(norm.running_mean, 0.1 * flat.mean(0))
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * flat.var(0))
    norm.training = False
    assert torch.allclose(norm(x), (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt())


def test_the_biased_network_is_torchs() -> None:
    """With the biased variance it equals nn.Sequential's Linear, BatchNorm1d and Tanh, gradients and statistics too."""
    mlp = reference.MLP(27, 10, 30, 3).to(torch.float64)
    for norm in mlp.norms():
        norm.unbiased = False
    embedding, _, linear, _, _, head = mlp.layers
    theirs = nn.Sequential(
        nn.Embedding(27, 10), nn.Flatten(), nn.Linear(30, 30, False), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 27)
    ).double()
    with torch.no_grad():
        theirs[0].weight.copy_(embedding.weight)
        theirs[2].weight.copy_(linear.weight.T)
        theirs[5].weight.copy_(head.weight.T)
        theirs[5].bias.copy_(head.bias)
    x = torch.randint(0, 27, (40, 3), generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 27, (40,), generator=torch.Generator().manual_seed(1))
    losses = [nn.functional.cross_entropy(network(x), y) for network in (mlp, theirs)]
    for loss in losses:
        loss.backward()
    assert abs(float((losses[0] - losses[1]).detach())) < 1e-12
    assert torch.allclose(linear.weight.grad, theirs[2].weight.grad.T, atol=1e-12)
    assert torch.allclose(next(mlp.norms()).running_var, theirs[3].running_var, atol=1e-12)


def test_split_loss_is_the_mean_in_evaluation_mode(packed: cw.Packed, vocab: cw.Vocabulary) -> None:
    mlp = reference.HierarchicalMLP(len(vocab))
    windows = reference.build_windows(packed, 8)
    small, large = (reference.split_loss(mlp, windows, chunk) for chunk in (7, 10**6))
    assert abs(small - large) < 1e-5
    assert all(norm.training for norm in mlp.norms()), "the mode is put back"
    with torch.no_grad():
        assert abs(large - float(nn.functional.cross_entropy(mlp.eval()(windows.inputs), windows.targets))) < 1e-6


def test_sgd_step_is_the_posts_update() -> None:
    mlp = reference.MLP(5, 2, 4, 3)
    before = [p.clone() for p in mlp.parameters()]
    x, y = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 3]]), torch.tensor([2, 3, 0])
    loss = reference.sgd_step(mlp, x, y, 0.5)
    assert loss > 0
    for p, old in zip(mlp.parameters(), before, strict=True):
        assert torch.equal(p.detach(), old - 0.5 * p.grad)
