"""Modules: the convolution, the weighted BatchNorm, the fused level, and the network.

Parameters lie in torch's own layouts, so weights move to and from `nn.Conv1d`, `nn.BatchNorm1d` and `nn.Linear`.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convwave.data.graph import Graph, Padding
from convwave.data.packing import Vocabulary
from convwave.files import CheckpointError, read_tensors, write_tensors
from convwave.ops import functional, naive, stack
from convwave.ops.functional import Layout, Reading
from convwave.ops.level import Level, check_total, track
from convwave.ops.library import PRECISIONS, choose_backend, conv_stack, runs_kernels

Statistics = Literal["windows", "positions"]
_T = TypeVar("_T", bool, int, float)
MODEL_FORMAT = "convwave.model.1"

__all__ = [
    "BatchNorm",
    "CausalConv1d",
    "ConvBatchNormTanh",
    "ConvStack",
    "ConvWave",
    "evaluating",
    "load",
    "save_model",
]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back, also where they differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def on_device(device: torch.device | str = "cpu") -> AbstractContextManager[object]:
    """New tensors are made on this device, whatever `torch.set_default_device` says.

    Nothing where that is so anyway: in the context every call of torch costs a microsecond more.
    """
    device = torch.device(device)
    return nullcontext() if torch.get_default_device() == device else device


class CausalConv1d(nn.Module):
    """Dilated causal convolution, of the rows of a graph or of sequences.

    With ``padding="zeros", layout="BCT"`` it equals `nn.Conv1d` behind zeros on the left.

    Args:
        in_channels: C.
        out_channels: H.
        kernel_size: k taps.
        dilation: distance of the taps in positions; for rows of a graph its taps say so, and this documents it.
        bias: add one number per output channel.
        padding: what stands before a sequence: its first row again ("replicate"), or "zeros".
        layout: of three-dimensional input and output: "BTC", or "BCT" as in `nn.Conv1d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        dilation: int = 1,
        *,
        bias: bool = False,
        padding: Padding = "replicate",
        layout: Layout = "BTC",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        functional.check_options(dilation, padding, layout)
        self.in_channels = _whole("in_channels", in_channels)
        self.out_channels = _whole("out_channels", out_channels)
        self.kernel_size, self.dilation = _whole("kernel_size", kernel_size), _whole("dilation", dilation)
        self.padding, self.layout = padding, layout
        shape = (self.out_channels, self.in_channels, self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        empty = torch.empty(self.out_channels, device=device, dtype=dtype)
        self.bias = nn.Parameter(empty) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal over the square root of the fan-in, as in the post; the bias is 0."""
        nn.init.normal_(self.weight, std=(self.in_channels * self.kernel_size) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, h: Tensor, taps: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Rows or sequences in, the same out.

        Args:
            h: (N', C) rows with `taps`; (N, C) sequences end to end with `cu_seqlens`; (B, T, C) or (B, C, T).
            taps: (k, N) rows of h, a level of a graph; then dilation and padding are not used.

        With ``layout="BCT"`` and neither of them, h may also be (C, T), as for `nn.Conv1d`.

        Returns:
            (N, H), (B, T, H) or (B, H, T).
        """
        if h.ndim == 2 and self.layout == "BCT" and taps is None and cu_seqlens is None:
            return self(h[None])[0]
        reading = _reading(self, h, taps, None, None, cu_seqlens)
        rows, row, _ = reading.rows(h, self.kernel_size)
        bias = None if self.bias is None else self.bias.to(h.dtype)
        zeros = taps is None and self.padding == "zeros"
        return reading.restore(stack.conv(rows, self.weight.to(h.dtype), row.taps, bias, zeros=zeros), h)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, padding={self.padding!r}, layout={self.layout!r}"
        )


class BatchNorm(_BatchNorm):
    """BatchNorm over rows with counts; arguments and state are `nn.BatchNorm1d`'s.

    Running statistics stay float32 under ``.half()`` and ``.bfloat16()``, and are computed in float32 at least.

    Args:
        num_features: H.
        eps: added to the variance.
        momentum: share of a new batch in the running statistics; None averages over all batches so far.
        affine: scale and shift.
        track_running_stats: keep running statistics; without them evaluation mode takes those of the rows.
        unbiased: normalise with the unbiased variance (the post) or the biased one (`nn.BatchNorm1d`).
        bias: shift, where `affine`.
        layout: where the channels are: last in "BTC", second in "BCT", as in `nn.BatchNorm1d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        unbiased: bool = True,
        bias: bool = True,
        layout: Layout = "BTC",
    ) -> None:
        functional.check_options(1, "zeros", layout)
        if not 0 <= float(eps) < math.inf:
            raise ValueError(f"eps: expected a number >= 0, got {eps}")
        if momentum is not None and not 0 <= float(momentum) <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, or None, got {momentum}")
        features = _whole("num_features", num_features)
        momentum = None if momentum is None else float(momentum)
        super().__init__(features, float(eps), momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.unbiased, self.layout = bool(unbiased), layout

    def level(self, weight: Tensor) -> Level:
        """The level that a convolution's matrix (H, C, k) makes with this norm."""
        momentum = self.momentum
        if momentum is None:
            tracked = self.num_batches_tracked
            momentum = 1 / (1 + float(tracked)) if tracked is not None and self.training else 0.0
        gamma = weight.detach().new_ones(self.num_features) if self.weight is None else self.weight
        beta = weight.detach().new_zeros(self.num_features) if self.bias is None else self.bias
        statistics = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return Level(weight, gamma, beta, *statistics, self.eps, momentum, self.training, self.unbiased)

    def count_batch(self) -> None:
        """Note that a batch was tracked, in training mode."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def forward(self, z: Tensor, weights: Tensor | None = None, total: float | None = None) -> Tensor:  # type: ignore[override]
        """Normalise rows over all dimensions but the channels.

        Args:
            z: (N, H), (B, T, H), .. with the channels last; with ``layout="BCT"`` (N, H), (B, H, T), ..
            weights: counts of the rows in the statistics, (N,), (B, T), ..; None means 1 each.
            total: their sum, when known.

        Returns:
            Of z's shape and dtype.
        """
        last = z if self.layout == "BTC" or z.ndim < 3 else z.movedim(1, -1)
        if z.ndim < 2 or last.shape[-1] != self.num_features:
            expected = "(N, {0}) or (B, T, {0})" if self.layout == "BTC" else "(N, {0}) or (B, {0}, T)"
            raise ValueError(f"z: expected shape {expected.format(self.num_features)}, got {tuple(z.shape)}")
        if weights is not None and weights.shape != last.shape[:-1]:
            raise ValueError(f"weights: expected shape {tuple(last.shape[:-1])}, got {tuple(weights.shape)}")
        rows, counts = last.reshape(-1, self.num_features), None if weights is None else weights.reshape(-1)
        if counts is not None:
            rows = functional.without_uncounted(rows, torch.arange(len(rows), device=z.device)[None], counts)
        level = self.level(rows)
        if level.of_rows and not torch.compiler.is_compiling():
            known = float(len(rows)) if counts is None else total
            if known is None and counts is not None and not counts.is_cuda:
                known = float(counts.double().sum())
            if known is not None:
                check_total(known, self.unbiased)
        y, stats = naive.batch_norm(rows, level, counts)
        if stats is not None and self.training:
            track(level, stats.mean.detach(), stats.var.detach(), stats.total.detach())
            self.count_batch()
        y = y.to(z.dtype).view(last.shape)
        return y if last is z else y.movedim(-1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device, torch.float32))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unbiased={self.unbiased}"


class ConvBatchNormTanh(nn.Module):
    """Dilated causal convolution without bias, weighted BatchNorm, tanh: a level of a network, or a layer on its own.

    Args:
        in_channels, out_channels: C, H.
        kernel_size, dilation: k taps, and the distance between them in positions.
        unbiased, eps, momentum: see `BatchNorm`.
        padding: what stands before a sequence: its first row again ("replicate"), or "zeros".
        layout: of three-dimensional input and output: "BTC", or "BCT" as in `nn.Conv1d`.
        backend, precision: see `ConvWave`.

    With ``unbiased=False, padding="zeros", layout="BCT"`` it equals `nn.Conv1d` (without bias, padded with zeros on the
    left) + `nn.BatchNorm1d` + `nn.Tanh` of the same parameters.

    Hooks on `conv` and `norm`, and modules put in their place, are obeyed: the level is then computed one module after
    another, without fusion.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        dilation: int = 1,
        unbiased: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        padding: Padding = "replicate",
        layout: Layout = "BTC",
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        functional.check_options(dilation, padding, layout)
        self.conv = CausalConv1d(in_channels, out_channels, kernel_size, dilation)
        self.norm = BatchNorm(out_channels, eps, momentum, unbiased=unbiased)
        self.padding, self.layout = padding, layout
        self.backend, self.precision = choose_backend(backend), _check_precision(precision)

    @property
    def fused(self) -> bool:
        """Whether convolution, norm and tanh can be one: no hook wants to see them, no other module replaces them."""
        conv, norm = type(self.conv), type(self.norm)
        plain = conv.forward is CausalConv1d.forward and norm.forward is BatchNorm.forward and self.conv.bias is None
        return plain and not any(_hooked(module) for module in (self.conv, self.norm))

    @property
    def kernel_size(self) -> int:
        return self.conv.kernel_size

    @property
    def dilation(self) -> int:
        return self.conv.dilation

    def level(self) -> Level:
        """Its parameters and statistics as the value that every engine reads."""
        return self.norm.level(self.conv.weight)

    def forward(
        self,
        h: Tensor,
        taps: Tensor | None = None,
        weights: Tensor | None = None,
        total: float | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Rows or sequences in, the same out.

        Args:
            h: (N', C) rows with `taps`; (N, C) sequences end to end with `cu_seqlens`; (B, T, C) or (B, C, T).
            taps: (k, N) rows of h, a level of a graph; then dilation and padding are not used.
            weights: counts of the output rows for the statistics, (N,) or (B, T); None means 1 each.
            total: their sum, when known.

        Returns:
            (N, H), (B, T, H) or (B, H, T).
        """
        reading = _reading(self, h, taps, weights, total, cu_seqlens)
        if self.fused:
            out = reading.stack(h, [self.level()], [self.dilation], self.backend, self.precision)
            self.norm.count_batch()
            return out
        if not isinstance(self.norm, BatchNorm):
            raise TypeError(
                f"norm: expected a convwave.nn.BatchNorm, whose rows may carry counts, got {type(self.norm).__name__}"
            )
        rows, row, _ = reading.rows(h, self.kernel_size)
        return reading.restore(self.norm(self.conv(rows, row.taps), row.counts, row.total).tanh(), h)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}, layout={self.layout!r}, backend={self.backend!r}"


def _reading(
    module: CausalConv1d | ConvBatchNormTanh,
    h: Tensor,
    taps: Tensor | None,
    counts: Tensor | None,
    total: float | None,
    cu_seqlens: Tensor | None,
) -> Reading:
    """What a module's options and these arguments say, checked."""
    options: tuple[int, Padding] = (1, "replicate") if taps is not None else (module.dilation, module.padding)
    conv = module.conv if isinstance(module, ConvBatchNormTanh) else module
    reading = Reading(taps, counts, total, cu_seqlens, *options, module.layout)
    reading.check(h, (conv.out_channels, conv.in_channels, conv.kernel_size))
    return reading


def _whole(name: str, value: int) -> int:
    """A count of something as a plain int, also from numpy; ValueError below 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def _hooked(module: nn.Module) -> bool:
    """Whether anybody watches a module's calls."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or torch.nn.modules.module._has_any_global_hook()


class ConvStack(nn.Module):
    """Levels of `ConvBatchNormTanh` one above the other over sequences, fused into one op where they can be.

    Args:
        channels: C, H_1, .., H_L: of the input and of every level.
        kernel_size: k taps, of all levels or of each.
        dilations: of each level; None means 1, k, k^2, .. as in a tree.
        unbiased, eps, momentum, padding, layout, backend, precision: see `ConvBatchNormTanh`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernel_size: int | Sequence[int] = 2,
        dilations: Sequence[int] | None = None,
        *,
        unbiased: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        padding: Padding = "replicate",
        layout: Layout = "BTC",
        backend: str = "auto",
        precision: str = "auto",
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels: expected at least 2 numbers, of the input and of each level, got {channels}")
        sizes = _per_level("kernel_size", kernel_size, len(channels) - 1)
        if dilations is None:
            dilations = [math.prod(sizes[:i]) for i in range(len(sizes))]
        distances = _per_level("dilations", dilations, len(sizes))
        self.blocks = nn.ModuleList(
            ConvBatchNormTanh(
                below,
                above,
                size,
                distance,
                unbiased,
                eps,
                momentum,
                padding=padding,
                layout=layout,
                backend=backend,
                precision=precision,
            )
            for below, above, size, distance in zip(channels[:-1], channels[1:], sizes, distances, strict=True)
        )

    def forward(self, h: Tensor, weights: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Sequences in, the same out: (B, T, C), (B, C, T), or (N, C) end to end with `cu_seqlens`.

        Args:
            weights: counts of the rows in the statistics of every level, (B, T) or (N,); None means 1 each.
        """
        blocks = [cast(ConvBatchNormTanh, block) for block in self.blocks]
        if not all(block.fused and not _hooked(block) for block in blocks):
            for block in blocks:
                h = block(h, weights=weights, cu_seqlens=cu_seqlens)
            return h
        first = blocks[0]
        reading = _reading(first, h, None, weights, None, cu_seqlens)
        levels, dilations = [block.level() for block in blocks], [block.dilation for block in blocks]
        out = reading.stack(h, levels, dilations, first.backend, first.precision)
        for block in blocks:
            block.norm.count_batch()
        return out


class ConvWave(nn.Module):
    """The post's hierarchical MLP as a stack of dilated causal convolutions.

    Args:
        vocab_size: V.
        n_embd: channels of the embedding.
        n_hidden: channels H of every level, or one number per level.
        levels: number of pairwise levels; the context is ``2 ** levels`` tokens.
        unbiased: normalise with the unbiased variance (the post) or the biased one (`nn.BatchNorm1d`), or one for each
            level.
        backend: "eager" is plain PyTorch; "triton" the fused kernels, on CUDA tensors; "auto" is "triton" where
            there is a CUDA device. Resolved once, when the network is made.
        precision: of float32 products in the kernels: "ieee", "tf32x3" (three TF32 products, as accurate), "tf32", or
            "auto": what `torch.set_float32_matmul_precision` asks for, "tf32x3" at its "highest".
        statistics: "windows" counts every row once per window that contains it, so that training mode equals the
            windowed network; "positions" counts every row once, as in temporal convolutional networks.
        factors: taps of each level instead of ``levels`` times 2; level l has dilation ``prod(factors[:l])``.
        eps, momentum: of all BatchNorms, or one number per level.
        vocabulary: kept with the model and its checkpoints when given.

    Attributes:
        data_sha256: of the training text, kept in checkpoints; None if unknown.
    """

    data_sha256: str | None = None

    def __init__(
        self,
        vocab_size: int = 27,
        n_embd: int = 10,
        n_hidden: int | Sequence[int] = 68,
        levels: int = 3,
        unbiased: bool | Sequence[bool] = True,
        backend: str = "auto",
        statistics: Statistics = "windows",
        *,
        factors: Sequence[int] | None = None,
        eps: float | Sequence[float] = 1e-5,
        momentum: float | Sequence[float] = 0.1,
        vocabulary: Vocabulary | None = None,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        vocab_size, n_embd = _whole("vocab_size", vocab_size), _whole("n_embd", n_embd)
        if factors is None:
            factors = (2,) * _whole("levels", levels)
        factors = tuple(operator.index(factor) for factor in factors)
        widths = _per_level("n_hidden", n_hidden, len(factors))
        epsilons = _per_level("eps", eps, len(factors))
        momenta = _per_level("momentum", momentum, len(factors))
        kinds = _per_level("unbiased", unbiased, len(factors))
        widths = [_whole("n_hidden", width) for width in widths]
        if not factors:
            raise ValueError("factors: expected at least one level, got none")
        if any(f < 2 for f in factors):
            raise ValueError(f"factors: expected numbers >= 2, got {factors}")
        if statistics not in ("windows", "positions"):
            raise ValueError(f"statistics: expected 'windows' or 'positions', got {statistics!r}")
        if vocabulary is not None and len(vocabulary) != vocab_size:
            raise ValueError(f"vocabulary: expected {vocab_size} symbols, got {len(vocabulary)}")
        self.vocab_size, self.n_embd, self.widths = vocab_size, n_embd, tuple(widths)
        self.factors, self.statistics = factors, statistics
        self.backend, self.precision = choose_backend(backend), _check_precision(precision)
        self.vocabulary = vocabulary

        self.embedding = nn.Embedding(vocab_size, n_embd)
        channels = [n_embd, *widths]
        self.blocks = nn.ModuleList(
            ConvBatchNormTanh(
                channels[i],
                channels[i + 1],
                factor,
                math.prod(factors[:i]),
                kinds[i],
                epsilons[i],
                momenta[i],
                backend=backend,
                precision=precision,
            )
            for i, factor in enumerate(factors)
        )
        self.head = nn.Linear(widths[-1], vocab_size)
        with torch.no_grad():  # the post's start: near-uniform predictions
            self.head.weight.normal_(std=0.1 * widths[-1] ** -0.5)
            self.head.bias.zero_()

    def use(self, backend: str, precision: str = "auto") -> ConvWave:
        """Set backend and precision of all levels; returns self."""
        self.backend, self.precision = choose_backend(backend), _check_precision(precision)
        for block in self.layers:
            block.backend, block.precision = self.backend, precision
        return self

    @property
    def layers(self) -> list[ConvBatchNormTanh]:
        """The blocks from the bottom up, typed."""
        return [cast(ConvBatchNormTanh, block) for block in self.blocks]

    @property
    def unbiased(self) -> bool:
        """Whether all levels normalise with the unbiased variance."""
        return all(block.norm.unbiased for block in self.layers)

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

    @property
    def plain(self) -> bool:
        """Whether nobody watches or has replaced a module, so that none of them needs to be called."""
        types = type(self).forward, type(self.embedding), type(self.head), *map(type, self.blocks)
        own = types == (ConvWave.forward, nn.Embedding, nn.Linear, *[ConvBatchNormTanh] * self.levels)
        parts = (self, self.embedding, self.head, *self.blocks)
        return own and all(block.fused for block in self.layers) and not any(map(_hooked, parts))

    def forward(self, graph: Graph) -> Tensor:
        """Logits (graph.num_rows, V) of every top row of the graph.

        Raises:
            ValueError: the graph's factors differ from the network's, or statistics="positions" in training mode
                on a graph that is not dense.
            IndexError: a token id >= vocab_size (on a CPU; on CUDA a device-side assertion).
        """
        if graph.factors != self.factors:
            raise ValueError(f"graph: expected factors {self.factors}, got {graph.factors}")
        if self.statistics == "positions" and self.training and graph.kind != "dense":
            raise ValueError(
                f"graph: statistics='positions' trains on a dense graph only, got a {graph.kind} one, "
                "whose rows are not the positions"
            )
        return self.head(self.features(self.embedding(graph.tokens), graph))

    def features(self, h: Tensor, graph: Graph) -> Tensor:
        """The stack by itself: bottom activations (N_0, n_embd) -> top activations (graph.num_rows, H)."""
        counted = self.statistics == "windows"
        if not all(block.fused and not _hooked(block) for block in self.layers):
            for block, row in zip(self.layers, graph.rows(counted), strict=True):
                h = block(h, row.taps, row.counts, row.total)
            return h
        kernels = self.backend == "triton" and runs_kernels(h)
        backward = kernels and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        rows = graph.rows(counted, consumers=backward)
        if counted and not graph.all_count:
            h = functional.without_uncounted(h, rows[0].taps, graph.weights[0])
        h = conv_stack(h, [block.level() for block in self.layers], rows, self.backend, self.precision)
        for block in self.layers:
            block.norm.count_batch()
        return h

    def config(self) -> dict[str, Any]:
        """The arguments of `ConvWave` that recreate this network, except the backend, as plain JSON values."""
        return {
            "vocab_size": self.vocab_size,
            "n_embd": self.n_embd,
            "n_hidden": list(self.widths),
            "factors": list(self.factors),
            "unbiased": [block.norm.unbiased for block in self.layers],
            "statistics": self.statistics,
            "eps": [block.norm.eps for block in self.layers],
            "momentum": [block.norm.momentum for block in self.layers],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration and vocabulary to a safetensors file, atomically."""
        save_model(self, path)

    def extra_repr(self) -> str:
        return f"context={self.context}, statistics={self.statistics!r}, backend={self.backend!r}"


def _per_level(name: str, value: _T | Sequence[_T], levels: int) -> list[_T]:
    many = isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0  # an array of numpy's is no Sequence
    values = list(cast(Sequence[_T], value)) if many else [cast(_T, value)] * levels
    if len(values) != levels:
        raise ValueError(f"{name}: expected one number or {levels}, one per level, got {len(values)}")
    return values


def _check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def save_model(model: ConvWave, path: str | os.PathLike[str]) -> None:
    """Write a model with its configuration and vocabulary.

    Raises:
        ValueError: modules were put in place of others, so that the file could not be read again.
    """
    with on_device("meta"), torch.random.fork_rng(devices=[]):
        expected = ConvWave(**model.config(), backend="eager").state_dict().keys()
    if changed := expected ^ model.state_dict().keys():
        raise ValueError(f"model: expected the tensors of a ConvWave and no others, but {sorted(changed)[0]} differs")
    vocabulary = None if model.vocabulary is None else "".join(model.vocabulary.symbols)
    metadata = {
        "format": MODEL_FORMAT,
        "config": model.config(),
        "vocabulary": vocabulary,
        "data_sha256": model.data_sha256,
    }
    write_tensors(path, model.state_dict(), metadata)


def load(path: str | os.PathLike[str], backend: str = "auto") -> ConvWave:
    """Read a model that `save_model` wrote, in evaluation mode, on the CPU, in the precision it was saved in.

    The global random generator is left alone.

    Raises:
        CheckpointError: the file is missing, damaged, not a convwave model, or holds what makes no numbers: NaN,
            infinity, a negative variance, an eps that is not positive.
    """
    tensors, metadata = read_tensors(path, MODEL_FORMAT)
    try:
        symbols, config, data_sha256 = metadata["vocabulary"], metadata["config"], metadata["data_sha256"]
        if not isinstance(symbols, str | None) or not isinstance(data_sha256, str | None):
            raise ValueError("vocabulary, data_sha256: expected text or null")
        _check_config(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        vocabulary = None if symbols is None else Vocabulary(symbols)
        with torch.random.fork_rng(devices=[]), on_device("cpu"):
            model = ConvWave(**config, backend=backend, vocabulary=vocabulary)
        model.load_state_dict({name: _checked(name, tensor) for name, tensor in tensors.items()}, assign=True)
        model.to(tensors["head.weight"].dtype)
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: does not hold a convwave model: {reason}") from None
    model.data_sha256 = data_sha256
    return model.eval()


def _check_config(config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError for numbers that make no network, or one that is not of these shapes, before it is built."""
    if not isinstance(config, dict) or not isinstance(config["factors"], list):
        raise ValueError("config: expected an object with a list of factors")
    vocab_size, n_embd, factors = config["vocab_size"], config["n_embd"], config["factors"]
    widths = _per_level("n_hidden", config["n_hidden"], len(factors))
    for size in (vocab_size, n_embd, *widths, *factors):
        if type(size) is not int or size < 1:
            raise ValueError(f"config: expected whole numbers from 1 on, got {size!r}")
    if math.prod(factors) >= 2**31:
        raise ValueError(f"factors: expected a context below 2**31 tokens, got {len(factors)} levels beyond it")
    for name, low, high in (("eps", sys.float_info.min, 1e6), ("momentum", 0, 1)):
        for value in _per_level(name, config.get(name, 0.1), len(factors)):
            if not (type(value) in (int, float) and low <= value <= high) and (name == "eps" or value is not None):
                raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}")
    if not all(type(value) is bool for value in _per_level("unbiased", config["unbiased"], len(factors))):
        raise ValueError(f"unbiased: expected true or false, got {config['unbiased']!r}")
    check_shapes(shapes, vocab_size, n_embd, widths, factors)


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], vocab_size: int, n_embd: int, widths: Sequence[int], factors: Sequence[int]
) -> None:
    """Raise ValueError or KeyError where parameters of these shapes are not those of a network of these sizes."""
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab_size, n_embd)}
    for i, (below, above, factor) in enumerate(zip([n_embd, *widths], widths, factors, strict=False)):
        expected[f"blocks.{i}.conv.weight"] = (above, below, factor)
    expected |= {"head.weight": (vocab_size, widths[-1]), "head.bias": (vocab_size,)}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name}: expected shape {shape} as in its configuration, got {shapes[name]}")


def _checked(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a model file; raises ValueError for one that makes no numbers."""
    kind = name.rpartition(".")[2]
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    dtypes = (torch.int64,) if kind == "num_batches_tracked" else floats
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected {expected}, got {str(tensor.dtype).removeprefix('torch.')}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} is not finite")
    if kind in ("running_var", "num_batches_tracked") and bool((tensor < 0).any()):
        raise ValueError(f"{name} is negative")
    return tensor
