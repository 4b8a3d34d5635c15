"""The layer, the stack and the loss as functions: checked arguments in, the chosen backend behind.

Backends: "eager" is plain PyTorch (`convwave.ops.stack`); "triton" is one op a call (`convwave.ops`), the fused kernels for
CUDA tensors of float32, bfloat16 and float16 (others are computed in plain PyTorch all the same); "auto" is "triton"
where there is a CUDA device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.graph import Consumers, Graph, Padding, dilated_consumers, dilated_taps
from convwave.ops import fold, level, naive
from convwave.ops import library as ops

Layout = Literal["BTC", "BCT"]


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
    - (N, C) rows of sequences that lie end to end, with `cu_seqlens` (without: one sequence);
    - (B, T, C) or, with ``layout="BCT"``, (B, C, T) sequences of equal length.

    In training mode the running statistics are moved in place, as in `naive.batch_norm`. With ``padding="zeros"``,
    ``layout="BCT"`` and ``unbiased=False`` this is left padding, `nn.Conv1d`, `nn.BatchNorm1d` and `nn.Tanh`.

    Args:
        x: floating point.
        weight: (H, C, k), torch's Conv1d layout, oldest tap first.
        norm_weight, norm_bias, running_mean, running_var: (H,).
        taps: (k, N) int64 rows of x; excludes `cu_seqlens`, `dilation` and `padding`.
        counts: how many windows contain each output row, for the statistics: (N,), or (B, T); None means once.
        total: their sum, when known.
        cu_seqlens: (B + 1,) int64, where each sequence begins, and the number of rows.
        dilation: distance of the taps in positions.
        padding: what stands before a sequence: its first row again, or zeros.
        backend, precision: see `ops.choose_backend` and `ConvWave`.

    Returns:
        (N, H), (B, T, H) or (B, H, T), of the dtype of x.

    Raises:
        ValueError: shapes or options that do not go together, or too few rows for a variance.
        RuntimeError: backend="triton" where there is none.
    """
    H, C, k = _check_layer(x, weight, taps, cu_seqlens, dilation, padding, layout)
    if counts is not None:
        counts = counts.reshape(-1)
    rows = x
    if x.ndim == 3:
        rows = (x.transpose(1, 2) if layout == "BCT" else x).reshape(-1, C)
    consumers = []
    triton = backend != "eager" and ops.choose_backend(backend) == "triton" and ops.runs_kernels(x)
    if taps is None:
        first, end = _spans(x, layout, cu_seqlens)
        taps = dilated_taps(first, k, dilation, padding)
        if triton and torch.is_grad_enabled():
            consumers = [dilated_consumers(first, end, k, dilation, padding)]
    if counts is not None and counts.shape[0] != taps.shape[1]:
        raise ValueError(f"counts: expected {taps.shape[1]} numbers, one per output row, got {counts.shape[0]}")
    norm = (norm_weight, norm_bias, running_mean, running_var)
    if triton:
        h = conv_stack(
            rows,
            [weight],
            *([t] for t in norm),
            taps=[taps],
            counts=[counts] if counts is not None else [],
            totals=[total] if total is not None else None,
            training=training,
            unbiased=unbiased,
            momentum=[momentum],
            eps=[eps],
            precision=precision,
            consumers=consumers,
        )
    else:
        if padding == "zeros":  # -1 is read from a row of zeros
            taps = torch.where(taps < 0, rows.shape[0], taps)
            rows = torch.cat([rows, rows.new_zeros(1, C)])
        h = naive.level(
            rows,
            weight,
            *norm,
            taps=taps,
            counts=counts,
            total=total,
            training=training,
            unbiased=unbiased,
            momentum=momentum,
            eps=eps,
        )
    if x.ndim == 2:
        return h
    B, T = (x.shape[0], x.shape[2]) if layout == "BCT" else x.shape[:2]
    h = h.view(B, T, H)
    return h.transpose(1, 2) if layout == "BCT" else h


def _check_layer(
    x: Tensor,
    weight: Tensor,
    taps: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    padding: Padding,
    layout: Layout,
) -> tuple[int, int, int]:
    """H, C, k."""
    if weight.ndim != 3:
        raise ValueError(f"weight: expected shape (H, C, k), got {tuple(weight.shape)}")
    H, C, k = weight.shape
    if layout not in ("BTC", "BCT"):
        raise ValueError(f"layout: expected 'BTC' or 'BCT', got {layout!r}")
    if padding not in ("replicate", "zeros"):
        raise ValueError(f"padding: expected 'replicate' or 'zeros', got {padding!r}")
    if dilation < 1:
        raise ValueError(f"dilation: expected at least 1, got {dilation}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected (N, C), (B, T, C) or (B, C, T), got shape {tuple(x.shape)}")
    channels = x.shape[1] if x.ndim == 3 and layout == "BCT" else x.shape[-1]
    if channels != C:
        raise ValueError(f"x: expected {C} channels, as many as weight has, got {channels} in shape {tuple(x.shape)}")
    if x.ndim == 3 and (taps is not None or cu_seqlens is not None):
        raise ValueError(f"taps, cu_seqlens: expected None with x of shape {tuple(x.shape)}, they are for rows (N, C)")
    if taps is not None and cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None together with taps")
    if taps is not None and (padding != "replicate" or dilation != 1):
        raise ValueError("padding, dilation: expected their defaults together with taps, which carry both out")
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
    return H, C, k


def _spans(x: Tensor, layout: Layout, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N,), (N,) the row at which each row's sequence begins, and one past its last."""
    if cu_seqlens is not None:
        bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]])
        first, end = bounds.repeat_interleave(cu_seqlens.diff(), dim=1, output_size=x.shape[0])
        return first, end
    if x.ndim == 2:
        B, T = 1, x.shape[0]
    else:
        B, T = (x.shape[0], x.shape[2]) if layout == "BCT" else x.shape[:2]
    first = (torch.arange(B, device=x.device) * T).repeat_interleave(T, output_size=B * T)
    return first, first + T


def conv_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    taps: Sequence[Tensor],
    counts: Sequence[Tensor] = (),
    totals: Sequence[float] | None = None,
    training: bool,
    unbiased: bool,
    momentum: Sequence[float],
    eps: Sequence[float],
    precision: str = "auto",
    consumers: Sequence[Consumers] = (),
) -> Tensor:
    """Levels of `conv_bn_tanh` one above the other in one op, activations in between never written to memory.

    Args:
        x: (N_0, C).
        totals: sums of the counts, to be checked; None leaves them unchecked, and too few rows give NaN.
        consumers: `Graph.consumers`, for the backward pass; found out there when not given.
        others: one per level, see `conv_bn_tanh`.

    Returns:
        (N_L, H_L).
    """
    if training:
        for i, tap in enumerate(taps):
            total = totals[i] if totals is not None else None if counts else float(tap.shape[1])
            if total is not None:
                level.variance_divisor(total, unbiased)
        h, stats = ops.stack(
            x, weights, norm_weights, norm_biases, [], taps, counts, eps, unbiased, precision, consumers
        )
        for i, (mean, var) in enumerate(zip(running_means, running_vars, strict=True)):
            s = level.Stats(*stats[i].detach())
            level.track(mean, var, s.mean, s.var, s.total, unbiased, momentum[i])
        return h
    norms = zip(running_means, running_vars, norm_weights, eps, strict=True)
    fixed = [fold.fixed_stats(mean, var, gamma.detach(), e) for mean, var, gamma, e in norms]
    return ops.stack(x, weights, norm_weights, norm_biases, fixed, taps, counts, eps, unbiased, precision, consumers)[0]


def loss(logits: Tensor, graph: Graph) -> Tensor:
    """Mean cross-entropy in nats over the graph's counted targets: ``sum(count * nll) / sum(count)``.

    Args:
        logits: (graph.num_rows, V).
        graph: the graph that the logits were computed on.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        ValueError: logits of another number of rows, or a graph in which no window counts.
    """
    if logits.shape[0] != graph.num_rows:
        raise ValueError(f"logits: expected {graph.num_rows} rows, one per top row of the graph, got {logits.shape[0]}")
    if not graph.totals[-1] > 0:
        raise ValueError("graph: expected at least one window that counts, the counts sum to 0")
    if graph.target_rows is None:
        nll = F.cross_entropy(logits, graph.target_ids, reduction="none")
        return (nll * graph.target_counts.to(nll.dtype)).sum() / graph.totals[-1]
    # how often each row is followed by each token: a table, because gathering rows would scatter their gradients, on a
    # GPU in an order that changes from run to run
    counts = graph.target_counts.new_zeros(logits.shape)
    counts.index_put_((graph.target_rows, graph.target_ids), graph.target_counts, accumulate=True)
    nll = counts.to(logits.dtype) * -F.log_softmax(logits, dim=1)
    return nll.sum() / graph.totals[-1]
