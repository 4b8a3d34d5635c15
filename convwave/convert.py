"""Weights between windowed networks and the convolution, both ways, without rounding.

A window's Linear reads its n joined neighbours as one row of n * C numbers, oldest first: row ``j * C + c`` of its
(n * C, H) weight is tap j, channel c. The convolution keeps the same numbers as (H, C, n). torch's own nn.Linear
keeps the transpose, (H, n * C).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convwave import reference
from convwave.data.graph import graph_of_windows
from convwave.nn import BatchNorm, ConvWave, on_device


class ConversionError(ValueError):
    """A network that is not the same function as any `ConvWave`; the message says why."""


@dataclass
class _Level:
    """One level of a windowed network, in the convolution's terms."""

    weight: Tensor  # (H, n * C)
    shift: Tensor | None  # (H,) the Linear's bias, which BatchNorm cancels
    norm: reference.BatchNorm1d | nn.BatchNorm1d
    unbiased: bool
    training: bool


@dataclass
class _Parts:
    """The tensors of a windowed network."""

    embedding: Tensor  # (V, C)
    levels: list[_Level]
    head_weight: Tensor  # (V, H)
    head_bias: Tensor  # (V,)


def from_windowed(mlp: reference.Sequential | nn.Module, backend: str = "auto") -> ConvWave:
    """The convolution that computes the same function as a windowed network, in training mode too.

    Args:
        mlp: the post's own classes (`reference`), or a torch.nn network that reads (B, context) token ids: Embedding,
            then per level something that joins n neighbours, Linear, BatchNorm1d and Tanh, then Linear. How it joins
            them does not matter (nn.Flatten, nn.Unflatten, your own module without parameters): n follows from the
            Linear's width, and both networks are compared on random windows before this returns. A bias in front of a
            BatchNorm is folded into its running mean.
        backend: of the convolution.

    Raises:
        ConversionError: a network that is not of this form, or whose output is another function.
    """
    parts = _of_torch(mlp) if isinstance(mlp, nn.Module) else _of_scratch(mlp)
    factors, channels = [], parts.embedding.shape[1]
    for i, level in enumerate(parts.levels):
        width, joined = level.weight.shape
        if joined % channels or joined == channels:
            raise ConversionError(
                f"mlp: level {i} reads {joined} numbers from neighbours of {channels} each, expected a multiple"
            )
        factors.append(joined // channels)
        channels = width
    if parts.head_weight.shape[1] != channels:
        raise ConversionError(f"mlp: the head reads {parts.head_weight.shape[1]} numbers, expected {channels}")

    # the initial weights are overwritten: draw none of the user's numbers
    with torch.random.fork_rng(devices=[]), on_device():
        model = _network(parts, factors, backend)
    model.to(parts.embedding.device, parts.embedding.dtype)
    with torch.no_grad():
        model.embedding.weight.copy_(parts.embedding)
        for block, level in zip(model.layers, parts.levels, strict=True):
            H, C, k = block.conv.weight.shape
            block.conv.weight.copy_(level.weight.view(H, k, C).transpose(1, 2))
            for ours, theirs in _vectors(block.norm, level.norm):
                ours.copy_(theirs)
                if isinstance(ours, nn.Parameter):
                    ours.requires_grad_(theirs.requires_grad)
            if level.shift is not None:
                assert block.norm.running_mean is not None
                block.norm.running_mean -= level.shift
            block.train(level.training)
            block.conv.weight.requires_grad_(level.weight.requires_grad)
        model.head.weight.copy_(parts.head_weight)
        model.head.bias.copy_(parts.head_bias)
        model.embedding.weight.requires_grad_(parts.embedding.requires_grad)
        model.head.weight.requires_grad_(parts.head_weight.requires_grad)
        model.head.bias.requires_grad_(parts.head_bias.requires_grad)
    model.training = any(level.training for level in parts.levels)
    if isinstance(mlp, nn.Module):
        _check_same_function(mlp, model)
    return model


def _network(parts: _Parts, factors: Sequence[int], backend: str) -> ConvWave:
    return ConvWave(
        vocab_size=parts.embedding.shape[0],
        n_embd=parts.embedding.shape[1],
        n_hidden=[level.weight.shape[0] for level in parts.levels],
        factors=factors,
        unbiased=[level.unbiased for level in parts.levels],
        eps=[level.norm.eps for level in parts.levels],
        momentum=[float(level.norm.momentum or 0.0) for level in parts.levels],
        backend=backend,
    )


def to_windowed(model: ConvWave) -> reference.Sequential:
    """The windowed network of the post's own classes that computes the same function; the weights are copied.

    Raises:
        ConversionError: a network with ``statistics="positions"``, which no windowed network has.
    """
    _check_statistics(model)
    mlp = reference.HierarchicalMLP(model.vocab_size, model.n_embd, model.widths, factors=model.factors)
    mlp.to(model.head.weight.device).to(model.head.weight.dtype)
    parts = _of_scratch(mlp)
    for block, theirs in zip(model.layers, mlp.norms(), strict=True):
        ours = block.norm
        if ours.momentum is None:
            raise ConversionError("model: momentum=None, a cumulative average, has no windowed counterpart")
        theirs.eps, theirs.momentum, theirs.unbiased, theirs.training = (
            ours.eps,
            ours.momentum,
            ours.unbiased,
            ours.training,
        )
    _copy_into(parts, model)
    return mlp


def to_torch(model: ConvWave) -> nn.Sequential:
    """The windowed network of torch.nn's own modules that computes the same function; the weights are copied.

    It reads (B, context) token ids. All windows' nodes of a level are rows of one matrix, so joining neighbours is
    nn.Unflatten and nn.Flatten, and nn.BatchNorm1d counts each of them.

    Raises:
        ConversionError: a network with ``unbiased=True``, as nn.BatchNorm1d normalises with the biased variance, or
            with ``statistics="positions"``.
    """
    _check_statistics(model)
    if any(block.norm.unbiased for block in model.layers):
        raise ConversionError("model: normalises with the unbiased variance, nn.BatchNorm1d with the biased one")
    with on_device(model.head.weight.device):
        layers: list[nn.Module] = [nn.Embedding(model.vocab_size, model.n_embd), nn.Flatten(0, 1)]
        for block in model.layers:
            H, C, k = block.conv.weight.shape
            norm = nn.BatchNorm1d(H, block.norm.eps, block.norm.momentum)
            layers += [nn.Unflatten(0, (-1, k)), nn.Flatten(1), nn.Linear(k * C, H, bias=False), norm, nn.Tanh()]
        layers.append(nn.Linear(model.widths[-1], model.vocab_size))
    mlp = nn.Sequential(*layers)
    mlp.to(model.head.weight.dtype)
    _copy_into(_of_torch(mlp), model)
    return mlp.train(model.training)


# ---------------------------------------------------------------------------------------------------------------------


def _check_statistics(model: ConvWave) -> None:
    if model.statistics != "windows":
        raise ConversionError("model: statistics='positions' has no windowed counterpart, expected 'windows'")


@torch.no_grad()
def _copy_into(parts: _Parts, model: ConvWave) -> None:
    """Write a convolution's weights into the tensors of a windowed network of the same shape."""
    parts.embedding.copy_(model.embedding.weight)
    for block, level in zip(model.layers, parts.levels, strict=True):
        level.weight.copy_(block.conv.weight.transpose(1, 2).flatten(1))
        for ours, theirs in _vectors(block.norm, level.norm):
            theirs.copy_(ours)
    parts.head_weight.copy_(model.head.weight)
    parts.head_bias.copy_(model.head.bias)


def _vectors(ours: BatchNorm, theirs: reference.BatchNorm1d | nn.BatchNorm1d) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a BatchNorm of the convolution, each with its counterpart, also where that is (1, 1, H)."""
    names = ["weight", "bias", "running_mean", "running_var"]
    other = [*names, "num_batches_tracked"] if isinstance(theirs, nn.BatchNorm1d) else ["gamma", "beta", *names[2:]]
    pairs = []
    for a, b in zip([*names, "num_batches_tracked"], other, strict=False):
        mine, its = getattr(ours, a), getattr(theirs, b)
        if mine is None or its is None:
            raise ConversionError(f"norm: expected affine parameters and running statistics on both sides, got no {b}")
        if mine.numel() != its.numel():
            raise ConversionError(f"mlp: {b} has shape {tuple(its.shape)}, expected {mine.numel()} numbers")
        pairs.append((mine, its if its.shape == mine.shape else its.view(mine.shape)))
    return pairs


def _kind(layer: object) -> str:
    """What a layer of a network from scratch is, by its tensors and, where it has none, by its name."""
    tensors = {name for name, value in vars(layer).items() if isinstance(value, Tensor)}
    if {"gamma", "beta", "running_mean", "running_var"} <= tensors:
        return "norm"
    if "weight" in tensors:
        return "linear" if hasattr(layer, "bias") else "embedding"
    name = type(layer).__name__.lower()
    return next((kind for kind in ("flatten", "tanh") if kind in name), type(layer).__name__)


def _of_scratch(mlp: reference.Sequential) -> _Parts:
    """A network of `reference`'s classes, or of a notebook's own that keep their tensors under the same names."""
    embedding, *middle, head = getattr(mlp, "layers", None) or [None, None]
    if embedding is None or _kind(embedding) != "embedding":
        raise ConversionError(
            f"mlp: expected an embedding first (an object with a tensor `weight` and no `bias`), "
            f"got {type(embedding).__name__} with {sorted(vars(embedding)) if embedding is not None else 'no layers'}"
        )
    if _kind(head) != "linear" or head.bias is None:
        raise ConversionError("mlp: expected a Linear with bias last")
    levels: list[_Level] = []
    for i in range(0, len(middle), 4):
        layers = middle[i : i + 4]
        if [_kind(layer) for layer in layers] != ["flatten", "linear", "norm", "tanh"]:
            names = [type(layer).__name__ for layer in layers]
            raise ConversionError(f"mlp: expected flatten, Linear, BatchNorm1d, Tanh per level, got {names}")
        _, linear, norm, _ = layers
        levels.append(_Level(linear.weight.T, linear.bias, norm, getattr(norm, "unbiased", True), norm.training))
    if not levels:
        raise ConversionError("mlp: expected at least one flatten, Linear, BatchNorm1d, Tanh")
    return _Parts(embedding.weight, levels, head.weight.T, head.bias)


def _of_torch(mlp: nn.Module) -> _Parts:
    leaves = [module for module in mlp.modules() if not list(module.children())]
    kinds = (nn.Embedding, nn.Linear, nn.BatchNorm1d, nn.Tanh)
    for leaf in leaves:
        if not isinstance(leaf, kinds) and (list(leaf.parameters()) or isinstance(leaf, nn.Dropout)):
            raise ConversionError(f"mlp: cannot convert {leaf}")
    known = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    embedding, *middle, head = known if len(known) > 1 else [None, None]
    if not isinstance(embedding, nn.Embedding):
        raise ConversionError("mlp: expected an nn.Embedding first")
    padded = embedding.padding_idx is not None or embedding.max_norm is not None
    if padded or embedding.scale_grad_by_freq or embedding.sparse:
        raise ConversionError(f"mlp: {embedding} trains differently, its options have no counterpart")
    tensors = [p.data_ptr() for leaf in known for p in leaf.parameters()]
    if len(set(tensors)) != len(tensors):
        raise ConversionError("mlp: shares a weight between layers, and would train differently")
    if len({leaf.training for leaf in known}) != 1:
        raise ConversionError("mlp: some layers are in training mode and some are not")
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ConversionError("mlp: expected an nn.Linear with bias last")
    levels: list[_Level] = []
    for i in range(0, len(middle), 3):
        linear, norm, tanh = [*middle[i : i + 3], None, None][:3]
        if not (isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and isinstance(tanh, nn.Tanh)):
            names = [type(module).__name__ for module in middle[i : i + 3]]
            raise ConversionError(f"mlp: expected Linear, BatchNorm1d, Tanh per level, got {names}")
        if not norm.affine or not norm.track_running_stats or norm.momentum is None:
            raise ConversionError(f"mlp: {norm} needs affine parameters, running statistics and a momentum")
        levels.append(_Level(linear.weight, linear.bias, norm, False, mlp.training))
    if not levels:
        raise ConversionError("mlp: expected at least one Linear, BatchNorm1d, Tanh between Embedding and head")
    return _Parts(embedding.weight, levels, head.weight, head.bias)


@torch.no_grad()
def _check_same_function(mlp: nn.Module, model: ConvWave) -> None:
    """Compare copies of both in float64 on random windows, in both modes."""
    theirs, ours = copy.deepcopy(mlp).double().cpu(), copy.deepcopy(model).double().cpu()
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, model.vocab_size, (64, model.context), generator=generator, device="cpu")
    graph = graph_of_windows(windows, windows[:, -1], model.factors)
    for training in (True, False):
        try:
            expected = theirs.train(training)(windows)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise ConversionError(f"mlp: cannot read windows of {model.context} tokens: {reason}") from None
        got = ours.train(training)(graph)
        if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-9, atol=1e-9):
            mode = "training" if training else "evaluation"
            detail = f"shape {tuple(expected.shape)} instead of {tuple(got.shape)}"
            if expected.shape == got.shape:
                detail = f"logits differ by up to {float((expected - got).abs().max()):.2g}"
            raise ConversionError(f"mlp: computes another function in {mode} mode ({detail})")
