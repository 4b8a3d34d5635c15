"""Comparing a convolution with a windowed network: errors, bounds, orders and layouts.

For the certificate, and for tests and benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave import reference
from convwave.data.graph import Graph
from convwave.data.packing import Packed
from convwave.nn import ConvWave

CONTRACT = 1e-10


@torch.no_grad()
def windowed_activations(mlp: reference.Sequential, windows: Tensor) -> list[Tensor]:
    activations, x = [], windows
    for layer in mlp.layers:
        x = layer(x)
        if isinstance(layer, reference.Tanh):
            activations.append(x)
    return activations


@torch.no_grad()
def graph_activations(model: ConvWave, graph: Graph) -> list[Tensor]:
    activations = []
    h = model.embedding(graph.tokens)
    for block, taps, weights, total in zip(model.layers, graph.taps, graph.weights, graph.totals, strict=True):
        h = block(h, taps, weights, total)
        activations.append(h)
    return activations


@torch.no_grad()
def windowed_logits(mlp: reference.Sequential, packed: Packed) -> Tensor:
    return mlp(reference.build_windows(packed, mlp.block_size).inputs)


def windowed_step(
    mlp: reference.Sequential, packed: Packed, counts: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, loss and gradients over every window as often as it counts, literally."""
    windows = reference.build_windows(packed, mlp.block_size)
    rows = literal_rows(len(packed), counts)
    logits = mlp(windows.inputs[rows])
    loss = F.cross_entropy(logits, windows.targets[rows])
    gradients = torch.autograd.grad(loss, mlp.parameters())
    return logits.detach(), loss.detach(), list(gradients)


def literal_rows(positions: int, counts: Tensor | None) -> Tensor:
    rows = torch.arange(positions, device="cpu")
    return rows if counts is None else rows.repeat_interleave(counts)


def per_position(logits: Tensor, graph: Graph) -> Tensor:
    return logits if graph.inverse is None else logits[graph.inverse.to(logits.device)]


def parameter_names(model: ConvWave) -> list[str]:
    """Names of the convolution's parameters in the order of the windowed network's."""
    names = ["embedding.weight"]
    for level in range(model.levels):
        names += [f"blocks.{level}.conv.weight", f"blocks.{level}.norm.weight", f"blocks.{level}.norm.bias"]
    return [*names, "head.weight", "head.bias"]


def named_pairs(model: ConvWave, got: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors in the windowed network's order, two and two under the names of the convolution's parameters."""
    return dict(zip(parameter_names(model), zip(got, expected, strict=True), strict=True))


def windowed_weights(model: ConvWave) -> list[Tensor]:
    """The parameters in the windowed network's order and layouts."""
    parameters = dict(model.named_parameters())
    return [as_windowed(name, parameters[name]) for name in parameter_names(model)]


def windowed_gradients(model: ConvWave) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    gradients = {name: parameters[name].grad for name in parameter_names(model)}
    return [as_windowed(name, gradient) for name, gradient in gradients.items() if gradient is not None]


def as_windowed(name: str, tensor: Tensor) -> Tensor:
    """A convolution weight (H, C, k) as (k * C, H); the head (V, H) as (H, V); others as they are."""
    if name == "head.weight":
        return tensor.T
    return tensor.permute(2, 1, 0).flatten(0, 1) if tensor.ndim == 3 else tensor


def largest(difference: Tensor) -> float:
    """The largest absolute value; NaN counts as infinite, so that no maximum loses it."""
    return float(difference.abs().nan_to_num(nan=math.inf).max())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value; 0 where both are 0."""
    error, scale = largest(got.double() - expected.double()), float(expected.abs().max())
    return error / scale if scale else math.inf if error else 0.0


def float32_bound(error: float) -> float:
    """Four times the windowed network's own error; not below the rounding of one number, which chance may undercut."""
    return 4 * max(error, 2.0**-24)


def first_row(got: Tensor, expected: Tensor, among: Tensor) -> int:
    return int((~((got - expected).abs().amax(1) == 0) & among).nonzero()[0])
