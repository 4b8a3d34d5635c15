"""The layer and the loss as functions: checked arguments in, `library.conv_stack` behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.graph import Graph, Padding, Rows
from convwave.ops import library
from convwave.ops.level import Level
from convwave.ops.sequences import Shift

Layout = Literal["BTC", "BCT"]


@dataclass(frozen=True)
class Reading:
    """What the rows of a level read, and how often they count: arguments that all layers have, see `conv_bn_tanh`."""

    taps: Tensor | None = None
    counts: Tensor | None = None
    total: float | None = None
    cu_seqlens: Tensor | None = None
    dilation: int = 1
    padding: Padding = "replicate"
    layout: Layout = "BTC"

    def check(self, x: Tensor, weight: Sequence[int]) -> None:
        """Raise ValueError for shapes and options that do not go together; `weight` is the shape of the matrix."""
        if len(weight) != 3:
            raise ValueError(f"weight: expected shape (H, C, k), got {tuple(weight)}")
        _, C, k = weight
        taps, cu_seqlens = self.taps, self.cu_seqlens
        check_options(self.dilation, self.padding, self.layout)
        if x.ndim not in (2, 3):
            raise ValueError(f"x: expected (N, C), (B, T, C) or (B, C, T), got shape {tuple(x.shape)}")
        if x.ndim == 2 and self.layout == "BCT" and taps is None and cu_seqlens is None:
            raise ValueError(
                "x: expected (B, C, T), or rows (N, C) with taps or cu_seqlens, with layout='BCT', "
                f"got {tuple(x.shape)}"
            )
        channels = x.shape[1] if x.ndim == 3 and self.layout == "BCT" else x.shape[-1]
        if channels != C:
            raise ValueError(
                f"x: expected {C} channels, as many as weight has, got {channels} in shape {tuple(x.shape)}"
            )
        if x.ndim == 3 and (taps is not None or cu_seqlens is not None):
            raise ValueError(
                f"taps, cu_seqlens: expected None with x of shape {tuple(x.shape)}, they are for rows (N, C)"
            )
        if taps is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens: expected None together with taps")
        if taps is not None and (self.padding != "replicate" or self.dilation != 1):
            raise ValueError(
                "padding, dilation: must be left at their defaults when taps is given (taps already encode them)"
            )
        if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2):
            raise ValueError(f"cu_seqlens: expected shape (B + 1,), B >= 1, got {tuple(cu_seqlens.shape)}")
        if cu_seqlens is not None and not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
            begin, stop = cu_seqlens[[0, -1]].tolist()
            if (begin, stop) != (0, x.shape[0]) or (cu_seqlens.diff() < 0).any():
                raise ValueError(
                    f"cu_seqlens: expected to rise from 0 to {x.shape[0]}, the rows of x, got {begin} .. {stop}"
                )
        if taps is not None and (taps.ndim != 2 or taps.shape[0] != k):
            raise ValueError(f"taps: expected shape ({k}, N), one row per tap of weight, got {tuple(taps.shape)}")

    def stack(
        self, x: Tensor, levels: Sequence[Level], dilations: Sequence[int], backend: str, precision: str
    ) -> Tensor:
        """Levels over x, in the form that x has; `dilations` of each, where sequences are read."""
        if self.taps is not None:
            rows, row, _ = self.rows(x, levels[0].weight.shape[2])
            return library.conv_stack(rows, levels, [row], backend, precision)
        h, cu_seqlens = self._sequences(x)
        shape = h.shape[:-1]
        counts = self._counts(shape)
        shifts = [
            # a view of the counts: torch.compile takes no tensor twice
            Shift(
                level.weight.shape[2],
                dilation,
                self.padding,
                None if counts is None else counts.view_as(counts),
                self.total,
                cu_seqlens,
            )
            for level, dilation in zip(levels, dilations, strict=True)
        ]
        if counts is not None and not _all_count(counts):
            taps = shifts[0].rows(shape, x.device).taps
            h = without_uncounted(h.reshape(-1, h.shape[-1]), taps, counts).view(h.shape)
        h = library.conv_sequences(h, levels, shifts, backend, precision)
        return self.restore(h, x)

    def rows(self, x: Tensor, kernel_size: int) -> tuple[Tensor, Rows, tuple[int, ...]]:
        """Rows or sequences as the rows of one level.

        Returns:
            (N', C) rows; what each output row reads and how often it counts; (N,) or (B, T), the shape of counts.
        """
        rows = x.transpose(1, 2) if x.ndim == 3 and self.layout == "BCT" else x
        shape = tuple(rows.shape[:-1]) if self.taps is None else (self.taps.shape[1],)
        counts = self._counts(shape)
        if self.taps is None:
            row = Shift(kernel_size, self.dilation, self.padding, counts, self.total, self.cu_seqlens).rows(
                shape, x.device, library.runs_kernels(x) and torch.is_grad_enabled()
            )
        else:
            row = Rows(self.taps, counts, self.total)
            _check_taps(self.taps, x)
        rows = rows.reshape(-1, rows.shape[-1])
        return (rows if counts is None else without_uncounted(rows, row.taps, counts)), row, shape

    def _sequences(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x as (B, T, C) where it holds sequences of one length; else (N, C), and where each begins."""
        if x.ndim == 3:
            return (x.transpose(1, 2) if self.layout == "BCT" else x), None
        if self.cu_seqlens is None:
            return x.unsqueeze(0), None
        if x.is_cuda or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return x, self.cu_seqlens
        lengths = self.cu_seqlens.diff()
        even = x.numel() > 0 and bool((lengths == lengths[0]).all())
        return (x.unflatten(0, (len(lengths), -1)), None) if even else (x, self.cu_seqlens)

    def _counts(self, shape: tuple[int, ...]) -> Tensor | None:
        """(N,) counts of rows of this shape."""
        if self.counts is None:
            return None
        found, number = tuple(self.counts.shape), math.prod(shape)
        if found not in (shape, (number,)):
            text = " or ".join(
                f"({', '.join(map(str, s))}{',' * (len(s) == 1)})" for s in dict.fromkeys((shape, (number,)))
            )
            raise ValueError(f"counts: expected shape {text}, one number per output row, got {found}")
        return self.counts.reshape(-1)

    def restore(self, h: Tensor, x: Tensor) -> Tensor:
        """Output rows (N, H), (B, T, H) or (1, N, H) in the form that the input x had."""
        if x.ndim == 2:
            return h.reshape(-1, h.shape[-1])
        B, T = (x.shape[0], x.shape[2 if self.layout == "BCT" else 1])
        h = h.view(B, T, h.shape[-1])
        return h.transpose(1, 2) if self.layout == "BCT" else h


def conv_bn_tanh(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    taps: Tensor | None = None,
    counts: Tensor | None = None,
    total: float | None = None,
    cu_seqlens: Tensor | None = None,
    dilation: int = 1,
    padding: Padding = "replicate",
    layout: Layout = "BTC",
    training: bool = False,
    unbiased: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """Dilated causal convolution without bias, BatchNorm, tanh.

    `x` is one of

    - (N', C) rows with `taps`: one level of a graph;
    - (N, C) rows of sequences packed end to end, with `cu_seqlens` (without it: one sequence, with ``layout="BTC"``);
    - (B, T, C) or, with ``layout="BCT"``, (B, C, T) sequences of equal length.

    In training mode the running statistics are updated in place. With ``padding="zeros"``, ``layout="BCT"`` and
    ``unbiased=False`` this is left padding, `nn.Conv1d`, `nn.BatchNorm1d` and `nn.Tanh`.

    Args:
        x: floating point.
        weight: (H, C, k), torch's Conv1d layout, oldest tap first.
        norm_weight, norm_bias, running_mean, running_var: (H,).
        taps: (k, N) int64 rows of x; excludes `cu_seqlens`, `dilation` and `padding`.
        counts: how many windows contain each output row, for the statistics: (N,), or (B, T); None means once.
        total: their sum, if known.
        cu_seqlens: (B + 1,) int64, where each sequence begins, and the number of rows.
        dilation: distance between taps, in positions.
        padding: what precedes a sequence: its first row repeated, or zeros.
        backend, precision: see `ConvWave`.

    Returns:
        (N, H), (B, T, H) or (B, H, T), of the dtype of x.

    Raises:
        ValueError: incompatible shapes or options, or too few rows for a variance.
        RuntimeError: backend="triton" where it is not available.
    """
    reading = Reading(taps, counts, total, cu_seqlens, dilation, padding, layout)
    reading.check(x, weight.shape)
    level = Level(
        weight, norm_weight, norm_bias, running_mean, running_var, eps, momentum, training=training, unbiased=unbiased
    )
    _check_level(level)
    return reading.stack(x, [level], [dilation], library.choose_backend(backend), precision)


def without_uncounted(x: Tensor, taps: Tensor, counts: Tensor) -> Tensor:
    """x with zeros for rows that hold no numbers and that only rows which count 0 times read, such as padding.

    Whatever such memory holds must not reach statistics or gradients, and 0 times NaN is NaN. Numbers whose squares may
    overflow further up are no numbers either.

    Args:
        x: (N', C).
        taps: (k, N) rows of x, -1 reads nothing.
        counts: (N,).
    """
    if _all_count(counts):
        return x
    read = (counts > 0).expand(taps.shape[0], -1) & (taps >= 0)
    needed = torch.zeros(x.shape[0] + 1, dtype=torch.int8, device=x.device)
    needed = needed.scatter_reduce(
        0, torch.where(read, taps, x.shape[0]).flatten(), torch.ones_like(needed[:1]).expand(taps.numel()), "amax"
    )
    most = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).max ** 0.25
    return torch.where((needed[:-1] > 0)[:, None] | (x.abs() <= most).all(1, keepdim=True), x, 0)


def _all_count(counts: Tensor) -> bool:
    """Whether no count is 0, as far as that is known without waiting for a GPU or a trace."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return counts.device.type == "cpu" and not traced and bool((counts > 0).all())


def _check_taps(taps: Tensor, x: Tensor) -> None:
    """Raise IndexError for a row that is not there; on a GPU an assertion on the device, which does not wait for it."""
    if torch.compiler.is_compiling() or not taps.numel():
        return
    inside = ((taps >= -1) & (taps < x.shape[0])).all()
    if taps.is_cuda:
        torch._assert_async(inside)
    elif not bool(inside):
        raise IndexError(
            f"taps: expected rows 0 to {x.shape[0] - 1} of x, or -1 for zeros, "
            f"got {int(taps.min())} to {int(taps.max())}"
        )


def _check_level(level: Level) -> None:
    """Raise ValueError where the shapes of a level's tensors do not go together."""
    channels = level.weight.shape[0]
    for name, tensor in (
        ("norm_weight", level.gamma),
        ("norm_bias", level.beta),
        ("running_mean", level.running_mean),
        ("running_var", level.running_var),
    ):
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},), one number per channel, got {tuple(tensor.shape)}")


def check_options(dilation: int, padding: str, layout: str) -> None:
    """Raise ValueError for an option of a layer that is not one."""
    if layout not in ("BTC", "BCT"):
        raise ValueError(f"layout: expected 'BTC' or 'BCT', got {layout!r}")
    if padding not in ("replicate", "zeros"):
        raise ValueError(f"padding: expected 'replicate' or 'zeros', got {padding!r}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation}")


def loss(logits: Tensor, graph: Graph) -> Tensor:
    """Mean cross-entropy in nats over the graph's counted targets: ``sum(count * nll) / sum(count)``.

    Args:
        logits: (graph.num_rows, V).
        graph: the graph that the logits were computed on.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        ValueError: the wrong number of rows, or a graph whose counts are all 0.
    """
    if logits.shape[0] != graph.num_rows:
        raise ValueError(f"logits: expected {graph.num_rows} rows, one per top row of the graph, got {logits.shape[0]}")
    if not graph.totals[-1] > 0:
        raise ValueError("graph: expected at least one window that counts, the counts sum to 0")
    if not graph.all_count:  # what the others hold does not matter
        logits = torch.where((graph.weights[-1] > 0)[:, None], logits, 0)
    if graph.target_rows is None:
        nll = F.cross_entropy(logits, graph.target_ids, reduction="none")
        return (nll * graph.target_counts.to(nll.dtype)).sum() / graph.totals[-1]
    # how often each row is followed by each token: a table, because gathering rows would scatter their gradients, on a
    # GPU in an order that changes from run to run
    counts = graph.target_counts.new_zeros(logits.shape)
    counts.index_put_((graph.target_rows, graph.target_ids), graph.target_counts, accumulate=True)
    counts = counts.to(logits.dtype)
    nll = torch.where(counts > 0, counts * -F.log_softmax(logits, dim=1), 0)  # a token may be impossible
    return nll.sum() / graph.totals[-1]
