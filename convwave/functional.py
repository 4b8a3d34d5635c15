"""The fused layer's mathematics in plain PyTorch: what every kernel has to equal, in any precision up to float64.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, k taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.graph import Graph


def gather_conv(h: Tensor, weight: Tensor, taps: Tensor, shift: Tensor | None = None) -> Tensor:
    """Convolution over gathered rows: ``z[n] = shift + sum_j weight[:, :, j] @ h[taps[j, n]]``.

    Args:
        h: (N', C) activations of the level below.
        weight: (H, C, k), torch's Conv1d layout, oldest tap first.
        taps: (k, N) int64 rows of `h`.
        shift: (H,) or None for 0.

    Returns:
        (N, H).
    """
    H, C, k = weight.shape
    if h.shape[0] * k < taps.shape[1] and C * k >= H:
        # fewer rows below than above, as in a distinct graph: multiply each once, then gather and add
        z = _affine(h, weight[:, :, 0].T, shift).index_select(0, taps[0])
        for j in range(1, k):
            z.add_((h @ weight[:, :, j].T).index_select(0, taps[j]))
        return z
    joined = torch.cat([h.index_select(0, tap) for tap in taps], dim=1)  # (N, kC)
    return _affine(joined, weight.permute(2, 1, 0).reshape(k * C, H), shift)


def _affine(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    return x @ weight if shift is None else torch.addmm(shift, x, weight)


def center(z: Tensor, weights: Tensor | None, total: float, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and deviations of rows of which row n stands for ``weights[n]`` equal ones.

    Args:
        z: (N, H).
        weights: (N,) >= 0, any dtype; None means 1 each.
        total: sum of the weights.
        unbiased: divide the variance by ``total - 1`` (torch.var's default, the post's) instead of ``total``.

    Returns:
        mean (H,), variance (H,), ``z - mean`` (N, H).

    Raises:
        ValueError: too few rows for a variance.
    """
    divisor = total - 1 if unbiased else total
    if divisor <= 0:
        raise ValueError(
            f"weights: {'an unbiased' if unbiased else 'a'} variance needs a total count above "
            f"{1 if unbiased else 0}, got {total:g}"
        )
    if weights is None:
        mean = z.mean(0)
        deviation = z - mean
        return mean, deviation.square().sum(0) / divisor, deviation
    # .sum adds pairwise; a matrix-vector product adds one by one, and errs 100 times more over 50,000 float32 rows
    w = weights.to(z.dtype)[:, None]
    mean = (w * z).sum(0) / total
    deviation = z - mean
    return mean, (w * deviation.square()).sum(0) / divisor, deviation


def batch_norm(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    weights: Tensor | None = None,
    total: float | None = None,
    training: bool = False,
    unbiased: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm whose rows carry multiplicities.

    In training mode it normalises with the weighted statistics of `z` and moves the running ones towards them in
    place; otherwise it normalises with the running ones. With ``unbiased=True`` the unbiased variance is used for
    both, as in the post; with ``unbiased=False`` the biased one normalises and the unbiased one is tracked, as in
    `torch.nn.BatchNorm1d`.

    Args:
        z: (N, H).
        weight, bias, running_mean, running_var: (H,).
        weights: (N,) how many windows contain each row; None means 1 each.
        total: sum of the weights; computed when None.

    Returns:
        (N, H).

    Raises:
        ValueError: too few rows for a variance in training mode.
    """
    if not training:
        return (z - running_mean) * (weight * torch.rsqrt(running_var + eps)) + bias
    total = _total(z, weights, total)
    mean, var, deviation = center(z, weights, total, unbiased)
    _track(running_mean, running_var, mean, var, total, unbiased, momentum)
    return torch.addcmul(bias, deviation, weight * torch.rsqrt(var + eps))


def _total(z: Tensor, weights: Tensor | None, total: float | None) -> float:
    if total is not None:
        return total
    return float(z.shape[0]) if weights is None else float(weights.sum())


@torch.no_grad()
def _track(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, total: float, unbiased: bool, momentum: float
) -> None:
    """Move the running statistics towards a batch's, in place; the variance that is tracked is the unbiased one."""
    tracked = var * (total / (total - 1)) if not unbiased and total > 1 else var
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(tracked.to(running_var.dtype), momentum)


class _NormTanh(torch.autograd.Function):
    """``tanh(batch_norm(z))`` in training mode, with the gradient in closed form: 8 passes over memory, not 20.

    With zhat = (z - mean) * rstd, g the gradient in front of the tanh (summed over all that read the row), w the
    weights, n their sum and c = 1 for the unbiased variance, else 0:

        dbeta = sum g,   dgamma = sum g zhat,
        dz = gamma rstd (g - w (dbeta / n + zhat dgamma / (n - c)))

    The weights multiply the correction and not g: a row that stands for w windows has all their gradients in g already.
    """

    @staticmethod
    def forward(
        z: Tensor, gamma: Tensor, beta: Tensor, weights: Tensor | None, total: float, unbiased: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mean, var, deviation = center(z, weights, total, unbiased)
        rstd = torch.rsqrt(var + eps)
        return torch.addcmul(beta, deviation, gamma * rstd).tanh_(), mean, var, deviation, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, gamma, _, weights, total, unbiased, _ = inputs
        h, mean, var, deviation, rstd = output
        ctx.mark_non_differentiable(mean, var, deviation, rstd)
        ctx.save_for_backward(h, deviation, rstd, gamma, weights)
        ctx.total, ctx.divisor = total, total - 1 if unbiased else total

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h, deviation, rstd, gamma, weights = ctx.saved_tensors
        g = torch.ops.aten.tanh_backward(dh, h)
        dbeta = g.sum(0)
        dgamma = (g * deviation).sum(0) * rstd
        correction = torch.addcmul(dbeta / ctx.total, deviation, dgamma * rstd / ctx.divisor)
        if weights is not None:
            correction.mul_(weights.to(g.dtype)[:, None])
        dz = g.sub_(correction).mul_(gamma * rstd)
        return dz, dgamma, dbeta, None, None, None, None


def conv_bn_tanh(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    taps: Tensor,
    counts: Tensor | None = None,
    total: float | None = None,
    training: bool = False,
    unbiased: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """One level of the network: ``tanh(batch_norm(gather_conv(x)))``.

    Args:
        x: (N', C) activations of the level below.
        weight: (H, C, k), oldest tap first.
        norm_weight, norm_bias, running_mean, running_var: (H,).
        taps: (k, N) int64 rows of `x`: a level of a graph.
        counts, total, training, unbiased, momentum, eps: see `batch_norm`.

    Returns:
        (N, H).
    """
    if not training:  # fold the running statistics into the convolution
        scale = norm_weight * torch.rsqrt(running_var + eps)
        return gather_conv(x, weight * scale[:, None, None], taps, norm_bias - running_mean * scale).tanh_()
    z = gather_conv(x, weight, taps)
    total = _total(z, counts, total)
    h, mean, var, _, _ = _NormTanh.apply(z, norm_weight, norm_bias, counts, total, unbiased, eps)
    _track(running_mean, running_var, mean, var, total, unbiased, momentum)
    return h


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
    if graph.target_rows is not None:
        logits = logits.index_select(0, graph.target_rows)
    nll = F.cross_entropy(logits, graph.target_ids, reduction="none")
    return (nll * graph.target_counts.to(nll.dtype)).sum() / graph.totals[-1]
