"""Comparing a convolution with a windowed network; what the command says to bad arguments."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from convwave import cli, reference
from convwave.train.tiers import available_tiers
from convwave.verify.compare import CONTRACT as RELATIVE
from convwave.verify.compare import per_position as per_position
from convwave.verify.compare import relative_error as relative_error

Module = TypeVar("Module", bound=nn.Module)
CPU_TIERS = available_tiers()  # with "fused" where the extra `fast` is installed
GRAPHS = [cw.windowed_graph, cw.dense_graph, cw.distinct_graph]


def randomize(mlp: reference.Sequential, seed: int) -> reference.Sequential:
    """Give every parameter and running statistic a value of its own, so that none is neutral (0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    for p in mlp.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
    for norm in mlp.norms():
        norm.running_mean = norm.running_mean + torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var = norm.running_var * (0.5 + torch.rand(norm.running_var.shape, generator=generator))
    return mlp


@torch.no_grad()
def disturb(module: Module, seed: int) -> Module:
    """The same for a module of the library."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draw = torch.rand(tensor.shape, generator=generator)
        tensor.mul_(0.5 + draw) if name.endswith("var") else tensor.add_(draw - 0.5)
    return module


@torch.no_grad()
def relative_bound(mlp: reference.Sequential, windows: Tensor) -> float:
    """The relative difference that rounding alone can make in float64: 1e-10, more where BatchNorm amplifies it.

    A channel of batch variance v is multiplied by ``(v + 1e-5) ** -0.5``: by 316 where all windows are equal. Rounding
    (2.2e-16 for each term of the longest sum, some 16 where sums are short) grows by that factor at every level, in any
    order of evaluation.
    """
    terms = max([16, *(layer.weight.shape[0] for layer in mlp.layers if isinstance(layer, reference.Linear))])
    amplification = 1.0
    x = windows
    for layer in mlp.layers:
        if isinstance(layer, reference.BatchNorm1d) and layer.training:
            variance = x.flatten(0, -2).var(0)
            amplification *= max(1.0, float((layer.gamma.abs() * (variance + layer.eps).rsqrt()).max()))
            scale = layer.gamma * (variance + layer.eps).rsqrt()
            x = (x - x.flatten(0, -2).mean(0)) * scale + layer.beta
        else:
            x = layer(x)
    return max(RELATIVE, terms * 2.2e-16 * amplification)


def windowed_pass(
    mlp: reference.Sequential, packed: cw.Packed, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits of every position, loss and gradients of the windowed network.

    Counts are taken literally: a window that counts twice is in the batch twice.
    """
    windows = reference.build_windows(packed, mlp.block_size)
    repeats = torch.ones(len(packed), dtype=torch.int64) if counts is None else counts
    rows = torch.arange(len(packed)).repeat_interleave(repeats)
    for p in mlp.parameters():
        p.grad = None
    logits = mlp(windows.inputs[rows])
    loss = F.cross_entropy(logits, windows.targets[rows])
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in mlp.parameters()]
    return logits, loss.detach(), gradients


def as_reference_gradients(model: cw.ConvWave) -> list[Tensor]:
    """The convolution's gradients in the order and the layouts of the windowed network's parameters."""

    def grad(p: Tensor) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    result = [grad(model.embedding.weight)]
    for block in model.layers:
        result.append(grad(block.conv.weight).permute(2, 1, 0).flatten(0, 1))
        result += [grad(block.norm.weight), grad(block.norm.bias)]
    return [*result, grad(model.head.weight).T, grad(model.head.bias)]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command refuses arguments, with exit status 2 and nothing on standard output."""
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.count("\n") == 1
    return output.err
