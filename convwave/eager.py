"""The layers' mathematics in plain PyTorch: what every kernel has to equal, in any precision up to float64.

`gather_conv`, `center`, `batch_norm` and `level` are the definition, differentiable by autograd. `stack_forward` and
`stack_backward` are the same mathematics cut as the kernels are cut, gradients in closed form: the kernels' twins, and
what the ops of `convwave.ops` compute where there are no kernels.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def variance_divisor(total: float, unbiased: bool) -> float:
    """What a sum of squared deviations is divided by.

    Raises:
        ValueError: too few rows for a variance.
    """
    divisor = total - 1 if unbiased else total
    if divisor <= 0:
        raise ValueError(
            f"weights: {'an unbiased' if unbiased else 'a'} variance needs a total count above "
            f"{1 if unbiased else 0}, got {total:g}"
        )
    return divisor


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
    divisor = variance_divisor(total, unbiased)
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
    track(running_mean, running_var, mean, var, total, unbiased, momentum)
    return torch.addcmul(bias, deviation, weight * torch.rsqrt(var + eps))


def _total(z: Tensor, weights: Tensor | None, total: float | None) -> float:
    if total is not None:
        return total
    return float(z.shape[0]) if weights is None else float(weights.sum())


@torch.no_grad()
def track(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    total: float | Tensor,
    unbiased: bool,
    momentum: float,
) -> None:
    """Move the running statistics towards a batch's, in place; the variance that is tracked is the unbiased one.

    Args:
        total: sum of the weights, or (H,) that sum in every channel.
    """
    tracked = var
    if not unbiased:
        # one row has no unbiased variance; its biased one is 0
        if isinstance(total, Tensor):
            tracked = torch.where(total <= 1, var, var * (total / (total - 1)))
        elif total > 1:
            tracked = var * (total / (total - 1))
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


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' twins


class Stats(NamedTuple):
    """Statistics of a level as the kernels keep them: rows of a (5, H) tensor."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor  # rstd * gamma
    var: Tensor
    total: Tensor  # sum of the weights, the same in every channel


def _wide(tensor: Tensor) -> Tensor:
    """float64 as it is, anything narrower as float32: what statistics and sums are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def fixed_stats(mean: Tensor, var: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """(5, H) statistics of evaluation mode from the running ones; the total is not used and 0."""
    mean, var = _wide(mean), _wide(var)
    rstd = torch.rsqrt(var + eps)
    return torch.stack([mean, rstd, rstd * _wide(gamma), var, torch.zeros_like(var)])


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
