"""Levels in plain PyTorch cut as the kernels are cut, gradients in closed form: the kernels' twins.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convwave.ops.level import Stats, _wide


def norm_tanh(z: Tensor, stats: Tensor, beta: Tensor) -> Tensor:
    """(N, H) pre-activations -> activations of the same dtype."""
    s = Stats(*stats)
    return torch.tanh((_wide(z) - s.mean) * s.scale + _wide(beta)).to(z.dtype)


def _gather(x: Tensor, tap: Tensor) -> Tensor:
    """Rows of x; a row of zeros for -1."""
    return x.index_select(0, tap.clamp(min=0)) * (tap >= 0).to(x.dtype)[:, None]


def stack_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    fixed: Sequence[Tensor],
    taps: Sequence[Tensor],
    counts: Sequence[Tensor],
    eps: Sequence[float],
    unbiased: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """L levels forward.

    Args:
        x: (N_0, C).
        weights: per level (H, C, k), oldest tap first.
        gammas, betas: per level (H,).
        fixed: statistics (5, H) per level to normalise with (evaluation mode); none takes them from the rows.
        taps: per level (k, N); -1 stands for a row of zeros, at the bottom only.
        counts: per level (N,), or none for 1 each.
        eps: per level.
        unbiased: divide variances by the sum of the counts less 1.

    Returns:
        (N_L, H_L) activations, pre-activations per level, statistics (5, H) per level.
    """
    zs, stats, h = [], [], x
    for level, weight in enumerate(weights):
        z = torch.zeros((), dtype=x.dtype, device=x.device)
        for j in range(weight.shape[2]):
            z = z + _gather(h, taps[level][j]) @ weight[:, :, j].T.to(x.dtype)
        if fixed:
            stats.append(fixed[level])
        else:
            wide = _wide(z)
            w = _wide(counts[level])[:, None].to(wide.dtype) if counts else torch.ones_like(wide[:, :1])
            total = w.sum()
            mean = (w * wide).sum(0) / total
            var = (w * (wide - mean).square()).sum(0) / (total - 1 if unbiased else total)
            rstd = torch.rsqrt(var + eps[level])
            stats.append(torch.stack([mean, rstd, rstd * _wide(gammas[level]), var, total.expand_as(var)]))
        zs.append(z)
        h = norm_tanh(z, stats[-1], betas[level])
    return h, zs, stats


def stack_backward(
    dh: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    betas: Sequence[Tensor],
    zs: Sequence[Tensor],
    stats: Sequence[Tensor],
    taps: Sequence[Tensor],
    counts: Sequence[Tensor],
    training: bool,
    unbiased: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `stack_forward` in closed form.

    With g the gradient in front of a level's tanh, zhat = (z - mean) rstd, w the weights, n their sum and c = 1 for the
    unbiased variance, else 0:

        dbeta = sum g,   dgamma = sum g zhat,   dz = gamma rstd (g - w (dbeta / n + zhat dgamma / (n - c)))

    (in evaluation mode without the correction), dW_j = sum_n dz[n] act(x[taps[j, n]])^T, dx[r] = sum_j W_j^T dz[n] over
    all n that read r as tap j.

    Args:
        dh: (N_L, H_L).
        zs, stats: what `stack_forward` returned.
        training: the statistics came from the rows.

    Returns:
        dx (N_0, C); per level dweight (H, C, k), dgamma (H,), dbeta (H,).
    """
    dweights: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    for level in reversed(range(len(weights))):
        s, weight = Stats(*stats[level]), weights[level]
        below = norm_tanh(zs[level - 1], stats[level - 1], betas[level - 1]) if level else x
        deviation = _wide(zs[level]) - s.mean
        h = torch.tanh(deviation * s.scale + _wide(betas[level]))
        g = _wide((_wide(dh) * (1 - h.square())).to(x.dtype))
        dbeta, dgamma = g.sum(0), (g * deviation).sum(0) * s.rstd
        dz = g
        if training:
            divisor = s.total - 1 if unbiased else s.total
            correction = dbeta / s.total + deviation * (dgamma * s.rstd / divisor)
            dz = g - (correction * _wide(counts[level])[:, None].to(g.dtype) if counts else correction)
        dz = (dz * s.scale).to(x.dtype)
        dweight = [dz.T @ _gather(below, tap) for tap in taps[level]]
        dh = below.new_zeros(below.shape)
        for j, tap in enumerate(taps[level]):
            dh.index_add_(0, tap.clamp(min=0), (dz @ weight[:, :, j].to(x.dtype)) * (tap >= 0).to(x.dtype)[:, None])
        dweights.insert(0, torch.stack(dweight, 2))
        dgammas.insert(0, dgamma)
        dbetas.insert(0, dbeta)
    return dh, dweights, dgammas, dbetas
