"""The definition of a level in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convwave.ops.level import _total, center, track


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
    track(running_mean, running_var, mean, var, total, unbiased, momentum)
    return torch.addcmul(bias, deviation, weight * torch.rsqrt(var + eps))


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


def level(
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
    track(running_mean, running_var, mean, var, total, unbiased, momentum)
    return h
