"""Modules: the convolution, the weighted BatchNorm, the fused level, and the network.

Parameters lie in torch's own layouts, so weights move to and from `nn.Conv1d`, `nn.BatchNorm1d` and `nn.Linear`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from convwave.data.graph import Graph, Padding
from convwave.data.packing import Vocabulary
from convwave.files import CheckpointError, read_tensors, write_tensors
from convwave.ops import functional, naive
from convwave.ops.functional import Layout
from convwave.ops.level import Level, check_total, track
from convwave.ops.library import PRECISIONS, choose_backend, conv_stack, runs_kernels

Statistics = Literal["windows", "positions"]
_T = TypeVar("_T", bool, int, float)
MODEL_FORMAT = "convwave.model.1"


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
        return naive.conv(h, self.weight.to(h.dtype), taps)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class BatchNorm(nn.Module):
    """BatchNorm over rows that carry multiplicities, channels last; state and arguments are `nn.BatchNorm1d`'s.

    Running statistics stay float32 under ``.half()`` and ``.bfloat16()``, and are computed in float32 at least.

    Args:
        num_features: H.
        eps: added to the variance.
        momentum: share of a new batch in the running statistics; None is the average over all batches so far.
        affine: scale and shift.
        track_running_stats: keep running statistics; without them evaluation mode takes those of the rows.
        unbiased: normalise with the unbiased variance (the post) or the biased one (`nn.BatchNorm1d`).
        bias: shift, where `affine`.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

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
    ) -> None:
        super().__init__()
        self.num_features, self.unbiased, self.eps, self.momentum = num_features, unbiased, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        like = torch.empty(num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.ones_like(like)) if affine else None
        self.bias = nn.Parameter(torch.zeros_like(like)) if affine and bias else None
        self.register_buffer("running_mean", torch.zeros_like(like) if track_running_stats else None)
        self.register_buffer("running_var", torch.ones_like(like) if track_running_stats else None)
        count = torch.zeros((), dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)

    def level(self, weight: Tensor) -> Level:
        """The level that a convolution's matrix (H, C, k) makes with this norm."""
        ones = torch.ones(self.num_features, dtype=weight.dtype, device=weight.device)
        momentum = self.momentum
        if momentum is None:
            tracked = self.num_batches_tracked
            momentum = 1 / (1 + float(tracked)) if tracked is not None and self.training else 0.0
        return Level(
            weight,
            ones if self.weight is None else self.weight,
            0 * ones if self.bias is None else self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            momentum,
            self.training,
            self.unbiased,
        )

    def count_batch(self) -> None:
        """Note that a batch was tracked, in training mode."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def forward(self, z: Tensor, weights: Tensor | None = None, total: float | None = None) -> Tensor:
        """Normalise rows.

        Args:
            z: (N, H) or (B, T, H).
            weights: counts of the rows in the statistics, (N,) or (B, T); None means 1 each.
            total: their sum, when known.

        Returns:
            Of z's shape and dtype.
        """
        if z.ndim not in (2, 3) or z.shape[-1] != self.num_features:
            expected = f"(N, {self.num_features}) or (B, T, {self.num_features})"
            raise ValueError(f"z: expected shape {expected}, got {tuple(z.shape)}")
        if weights is not None and weights.shape != z.shape[:-1]:
            raise ValueError(f"weights: expected shape {tuple(z.shape[:-1])}, got {tuple(weights.shape)}")
        rows, counts = z.flatten(0, -2), None if weights is None else weights.flatten()
        if counts is not None:
            rows = functional.without_uncounted(rows, torch.arange(len(rows), device=z.device)[None], counts)
        level = self.level(z.new_empty(0))
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
        return y.to(z.dtype).view(z.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device, torch.float32))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "num_batches_tracked"
        if self.num_batches_tracked is not None and key not in state_dict:  # files of before it was kept
            state_dict[key] = self.num_batches_tracked
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, unbiased={self.unbiased}"
        )


class ConvBatchNormTanh(nn.Module):
    """Dilated causal convolution without bias, weighted BatchNorm, tanh: a level, or a layer by itself.

    Args:
        in_channels, out_channels: C, H.
        kernel_size, dilation: k taps, and their distance in positions.
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
        plain = getattr(conv, "forward", None) is CausalConv1d.forward and norm.forward is BatchNorm.forward
        return plain and not any(_hooked(module) for module in (self.conv, self.norm))

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
        of_graph = taps is not None
        dilation, padding = (1, "replicate") if of_graph else (self.conv.dilation, self.padding)
        options = {"dilation": dilation, "padding": padding, "layout": self.layout}
        functional.check_layer(h, self.conv.weight.shape, taps, cu_seqlens, **options)
        rows, row, shape = functional.arrange(
            h, self.conv.kernel_size, taps=taps, counts=weights, total=total, cu_seqlens=cu_seqlens, **options
        )
        if self.fused:
            out = conv_stack(rows, [self.level()], [row], self.backend, self.precision)
            self.norm.count_batch()
        else:
            out = self.norm(self.conv(rows, row.taps), row.counts, row.total).tanh()
        return functional.restore(out, h, shape, self.layout)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}, layout={self.layout!r}, backend={self.backend!r}"


def _hooked(module: nn.Module) -> bool:
    """Whether anybody watches a module's calls."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks) or torch.nn.modules.module._has_any_global_hook()


class ConvWave(nn.Module):
    """The post's hierarchical MLP as a stack of dilated causal convolutions.

    Args:
        vocab_size: V.
        n_embd: channels of the embedding.
        n_hidden: channels H of every level, or one number for each.
        levels: number of pairwise levels; the context is ``2 ** levels`` tokens.
        unbiased: normalise with the unbiased variance (the post) or the biased one (`nn.BatchNorm1d`), or one for each
            level.
        backend: "eager" is plain PyTorch; "triton" the fused kernels, on CUDA tensors; "auto" is "triton" where
            there is a CUDA device. Chosen once, here.
        precision: of float32 products in the kernels: "ieee", "tf32x3" (three TF32 products, as accurate), "tf32", or
            "auto": what `torch.set_float32_matmul_precision` asks for, "tf32x3" at its "highest".
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
        factors = tuple(factors) if factors is not None else (2,) * levels
        widths = _per_level("n_hidden", n_hidden, len(factors))
        epsilons = _per_level("eps", eps, len(factors))
        momenta = _per_level("momentum", momentum, len(factors))
        kinds = _per_level("unbiased", unbiased, len(factors))
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
        """Choose another backend and precision, for all levels; returns self."""
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
        h = conv_stack(h, [block.level() for block in self.layers], rows, self.backend, self.precision)
        for block in self.layers:
            block.norm.count_batch()
        return h

    def config(self) -> dict[str, Any]:
        """What `ConvWave(**config)` needs to make this network again, apart from the backend; plain JSON values."""
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
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise ValueError(f"{name}: expected one number or {levels}, one per level, got {len(values)}")
    return values


def _check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def save_model(model: ConvWave, path: str | os.PathLike[str]) -> None:
    """Write a model with its configuration and vocabulary."""
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
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
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
