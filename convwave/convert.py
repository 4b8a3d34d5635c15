"""Weights between the windowed networks and the convolution, both ways, without rounding.

A window's Linear reads its n joined neighbours as one row of n * C numbers, oldest first: row ``j * C + c`` of its
(n * C, H) weight is tap j, channel c. The convolution keeps the same numbers as (H, C, n).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from convwave import reference
from convwave.nn import ConvWave
from convwave.reference import BatchNorm1d, Embedding, Flatten, FlattenConsecutive, Linear, Tanh


def from_windowed(mlp: reference.Sequential, backend: str = "auto") -> ConvWave:
    """The convolution that computes the same function as a windowed network; its weights are copied.

    A flat MLP over n tokens becomes one level with n taps.

    Raises:
        ValueError: a network that is not Embedding, then (flatten, Linear without bias, BatchNorm1d, Tanh) per level,
            then Linear.
    """
    embedding, hidden, head = _parts(mlp)
    norms = [norm for _, norm in hidden]
    model = ConvWave(
        vocab_size=embedding.weight.shape[0],
        n_embd=embedding.weight.shape[1],
        n_hidden=head.weight.shape[0],
        factors=mlp.factors,
        unbiased=norms[0].unbiased,
        backend=backend,
    )
    model.to(embedding.weight.device, embedding.weight.dtype).train(norms[0].training)
    with torch.no_grad():
        model.embedding.weight.copy_(embedding.weight)
        for block, (linear, norm) in zip(model.layers, hidden, strict=True):
            H, C, k = block.conv.weight.shape
            block.conv.weight.copy_(linear.weight.view(k, C, H).permute(2, 1, 0))
            for name, ours in _NORM:
                getattr(block.norm, ours).copy_(getattr(norm, name))
            block.norm.eps, block.norm.momentum = norm.eps, norm.momentum
        model.head.weight.copy_(head.weight.T)
        model.head.bias.copy_(cast(Tensor, head.bias))
    return model


def to_windowed(model: ConvWave) -> reference.Sequential:
    """The windowed network that computes the same function as a convolution; its weights are copied."""
    mlp = reference.HierarchicalMLP(model.vocab_size, model.n_embd, model.n_hidden, factors=model.factors)
    mlp.to(model.head.weight.device).to(model.head.weight.dtype)
    embedding, hidden, head = _parts(mlp)
    with torch.no_grad():
        embedding.weight.copy_(model.embedding.weight)
        for block, (linear, norm) in zip(model.layers, hidden, strict=True):
            linear.weight.copy_(block.conv.weight.permute(2, 1, 0).flatten(0, 1))
            for name, ours in _NORM:
                getattr(norm, name).copy_(getattr(block.norm, ours))
            norm.eps, norm.momentum, norm.unbiased = block.norm.eps, block.norm.momentum, block.norm.unbiased
        head.weight.copy_(model.head.weight.T)
        cast(Tensor, head.bias).copy_(model.head.bias)
    return mlp.train(model.training)


# the reference's names and the convolution's for the vectors of a BatchNorm
_NORM = [("gamma", "weight"), ("beta", "bias"), ("running_mean", "running_mean"), ("running_var", "running_var")]


def _parts(mlp: reference.Sequential) -> tuple[Embedding, list[tuple[Linear, BatchNorm1d]], Linear]:
    """Embedding, (Linear, BatchNorm1d) per level, and head of a windowed network."""
    embedding, *levels, head = mlp.layers
    if not isinstance(embedding, Embedding) or not isinstance(head, Linear) or head.bias is None:
        raise ValueError("mlp: expected an Embedding first and a Linear with bias last")
    hidden = []
    for i in range(0, len(levels), 4):
        flatten, linear, norm, tanh = [*levels[i : i + 4], None, None, None][:4]
        if not (
            isinstance(flatten, Flatten | FlattenConsecutive)
            and isinstance(linear, Linear)
            and linear.bias is None
            and isinstance(norm, BatchNorm1d)
            and isinstance(tanh, Tanh)
        ):
            names = [type(layer).__name__ for layer in levels[i : i + 4]]
            raise ValueError(f"mlp: expected flatten, Linear without bias, BatchNorm1d, Tanh per level, got {names}")
        hidden.append((linear, norm))
    return embedding, hidden, head
