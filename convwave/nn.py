"""Modules: the convolution, the weighted BatchNorm, the fused level, and the network.

Parameters lie in torch's own layouts, so weights move to and from `nn.Conv1d`, `nn.BatchNorm1d` and `nn.Linear`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from convwave import functional
from convwave.data import Vocabulary
from convwave.graph import Graph

Statistics = Literal["windows", "positions"]
_T = TypeVar("_T", int, float)


class CausalConv1d(nn.Module):
    """Dilated causal convolution without bias over gathered rows.

    Args:
        in_channels: C.
        out_channels: H.
        kernel_size: k taps.
        dilation: distance of the taps in positions; the graph's taps carry it out, here it documents.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 2, dilation: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.dilation = kernel_size, dilation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal over the square root of the fan-in, as in the post."""
        nn.init.normal_(self.weight, std=(self.in_channels * self.kernel_size) ** -0.5)

    def forward(self, h: Tensor, taps: Tensor) -> Tensor:
        """(N', C), (k, N) -> (N, H)."""
        return functional.gather_conv(h, self.weight, taps)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class BatchNorm(nn.Module):
    """BatchNorm over rows that carry multiplicities; see `functional.batch_norm`."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, unbiased: bool = True, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.unbiased, self.eps, self.momentum = num_features, unbiased, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, z: Tensor, weights: Tensor | None = None, total: float | None = None) -> Tensor:
        """(N, H), (N,) counts or None, their sum or None -> (N, H)."""
        return functional.batch_norm(
            z,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            weights=weights,
            total=total,
            training=self.training,
            unbiased=self.unbiased,
            momentum=self.momentum,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, unbiased={self.unbiased}, eps={self.eps}, momentum={self.momentum}"


class ConvBatchNormTanh(nn.Module):
    """One level: dilated causal convolution, weighted BatchNorm, tanh."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        dilation: int = 1,
        unbiased: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = CausalConv1d(in_channels, out_channels, kernel_size, dilation)
        self.norm = BatchNorm(out_channels, unbiased, eps, momentum)

    def forward(self, h: Tensor, taps: Tensor, weights: Tensor | None = None, total: float | None = None) -> Tensor:
        """(N', C), (k, N), (N,) counts or None, their sum or None -> (N, H)."""
        norm = self.norm
        return functional.conv_bn_tanh(
            h,
            self.conv.weight,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            taps=taps,
            counts=weights,
            total=total,
            training=norm.training,
            unbiased=norm.unbiased,
            momentum=norm.momentum,
            eps=norm.eps,
        )


class ConvWave(nn.Module):
    """The post's hierarchical MLP as a stack of dilated causal convolutions.

    Args:
        vocab_size: V.
        n_embd: channels of the embedding.
        n_hidden: channels H of every level, or one number for each.
        levels: number of pairwise levels; the context is ``2 ** levels`` tokens.
        unbiased: normalise with the unbiased variance (the post) or the biased one (`nn.BatchNorm1d`).
        backend: "eager" is plain PyTorch; "auto" picks the fastest that is there; "triton" asks for the kernels.
        statistics: "windows" weighs every row by the windows that contain it, which makes training mode equal to the
            windowed network; "positions" counts every row once, as a user of temporal convolutions expects.
        factors: taps of each level instead of ``levels`` times 2; level l has dilation ``prod(factors[:l])``.
        eps, momentum: of the BatchNorms, or one number for each level.
        vocabulary: kept with the model and its checkpoints when given.

    Attributes:
        data_sha256: of the text that it was trained on, kept with its checkpoints; None where unknown.
    """

    data_sha256: str | None = None

    def __init__(
        self,
        vocab_size: int = 27,
        n_embd: int = 10,
        n_hidden: int | Sequence[int] = 68,
        levels: int = 3,
        unbiased: bool = True,
        backend: str = "auto",
        statistics: Statistics = "windows",
        *,
        factors: Sequence[int] | None = None,
        eps: float | Sequence[float] = 1e-5,
        momentum: float | Sequence[float] = 0.1,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        factors = tuple(factors) if factors is not None else (2,) * levels
        widths = _per_level("n_hidden", n_hidden, len(factors))
        epsilons = _per_level("eps", eps, len(factors))
        momenta = _per_level("momentum", momentum, len(factors))
        sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "levels": len(factors), "n_hidden": min(widths, default=1)}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if any(f < 2 for f in factors):
            raise ValueError(f"factors: expected numbers >= 2, got {factors}")
        if statistics not in ("windows", "positions"):
            raise ValueError(f"statistics: expected 'windows' or 'positions', got {statistics!r}")
        if vocabulary is not None and len(vocabulary) != vocab_size:
            raise ValueError(f"vocabulary: expected {vocab_size} symbols, got {len(vocabulary)}")
        self.vocab_size, self.n_embd, self.widths = vocab_size, n_embd, tuple(widths)
        self.factors, self.unbiased, self.statistics = factors, unbiased, statistics
        self.backend = choose_backend(backend)
        self.vocabulary = vocabulary

        self.embedding = nn.Embedding(vocab_size, n_embd)
        channels = [n_embd, *widths]
        self.blocks = nn.ModuleList(
            ConvBatchNormTanh(
                channels[i], channels[i + 1], factor, math.prod(factors[:i]), unbiased, epsilons[i], momenta[i]
            )
            for i, factor in enumerate(factors)
        )
        self.head = nn.Linear(widths[-1], vocab_size)
        with torch.no_grad():  # the post's start: near-uniform predictions
            self.head.weight.normal_(std=0.1 * widths[-1] ** -0.5)
            self.head.bias.zero_()

    @property
    def layers(self) -> list[ConvBatchNormTanh]:
        """The blocks from the bottom up, typed."""
        return [cast(ConvBatchNormTanh, block) for block in self.blocks]

    @property
    def levels(self) -> int:
        return len(self.factors)

    @property
    def context(self) -> int:
        """Tokens that a position sees, itself included."""
        return math.prod(self.factors)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, graph: Graph) -> Tensor:
        """Logits (graph.num_rows, V) of every top row of the graph.

        Raises:
            ValueError: the graph has other factors than the network, or statistics="positions" in training mode
                on a graph that is not dense.
            IndexError: a token id that is not below vocab_size (on a CPU; on CUDA a device-side assertion).
        """
        if graph.factors != self.factors:
            raise ValueError(f"graph: expected factors {self.factors}, got {graph.factors}")
        if self.statistics == "positions" and self.training and graph.kind != "dense":
            raise ValueError(
                f"graph: statistics='positions' trains on a dense graph only, got a {graph.kind} one, "
                "whose rows are not the positions"
            )
        h = self.embedding(graph.tokens)
        for block, taps, weights, total in zip(self.layers, graph.taps, graph.weights, graph.totals, strict=True):
            h = block(h, taps, weights, total) if self.statistics == "windows" else block(h, taps)
        return self.head(h)

    def config(self) -> dict[str, Any]:
        """What `ConvWave(**config)` needs to make this network again, apart from the backend; plain JSON values."""
        return {
            "vocab_size": self.vocab_size,
            "n_embd": self.n_embd,
            "n_hidden": list(self.widths),
            "factors": list(self.factors),
            "unbiased": self.unbiased,
            "statistics": self.statistics,
            "eps": [block.norm.eps for block in self.layers],
            "momentum": [block.norm.momentum for block in self.layers],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and vocabulary to a safetensors file, atomically."""
        from convwave.checkpoint import save_model

        save_model(self, path)

    def extra_repr(self) -> str:
        return f"context={self.context}, statistics={self.statistics!r}, backend={self.backend!r}"


def _per_level(name: str, value: _T | Sequence[_T], levels: int) -> list[_T]:
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name}: expected one number or {levels}, one per level, got {len(values)}")
    return values


def available_backends() -> list[str]:
    """The backends that this machine and this version have."""
    return ["eager"]


def choose_backend(backend: str) -> str:
    """The backend that "auto", "eager" or "triton" means on this machine.

    Raises:
        ValueError: another name.
        RuntimeError: a backend that is not there.
    """
    if backend not in ("auto", "eager", "triton"):
        raise ValueError(f"backend: expected 'auto', 'eager' or 'triton', got {backend!r}")
    if backend == "triton":
        raise RuntimeError("backend: 'triton' is not available: this version of convwave has no Triton kernels yet")
    return "eager"
