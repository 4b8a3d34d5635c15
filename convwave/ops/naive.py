"""The definition of a level, and nothing else: the shortest readable PyTorch, differentiated by autograd.

Everything fast is tested against this file, in float64. It is also what runs under `torch.compile`, `torch.func` and
forward-mode differentiation, and what second derivatives are taken of.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, P parts of the activation, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convwave.data.graph import Rows
from convwave.ops.level import Level, Stats, wide


def gather(x: Tensor, tap: Tensor) -> Tensor:
    """Rows of x (N', C) by number (N,); a row of zeros for -1."""
    return torch.where((tap >= 0)[:, None], x.index_select(0, tap.clamp(min=0)), 0)


def conv(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """Convolution over gathered rows: ``z[n] = sum_j weight[:, :, j] @ x[taps[j, n]]``.

    Args:
        x: (N', C).
        weight: (H, C, k), oldest tap first.
        taps: (k, N) rows of x; -1 stands for a row of zeros.

    Returns:
        (N, H).
    """
    joined = torch.cat([gather(x, tap) for tap in taps], 1)  # (N, kC)
    return joined @ weight.permute(2, 1, 0).flatten(0, 1)


def statistics(z: Tensor, counts: Tensor | None, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of rows of which row n stands for ``counts[n]`` equal ones, and the sum of the counts.

    Args:
        z: (N, H), float32 at least.
        counts: (N,) >= 0, any dtype; None means 1 each.
        unbiased: divide by the sum of the counts less 1 instead of the sum.

    Returns:
        (H,), (H,), (); NaN or infinite where the counts are too few for a variance.
    """
    w = torch.ones_like(z[:, :1]) if counts is None else counts.to(z.dtype)[:, None]
    total = w.sum()
    mean = (w * z).sum(0) / total
    return mean, (w * (z - mean).square()).sum(0) / (total - 1 if unbiased else total), total


def batch_norm(z: Tensor, level: Level, counts: Tensor | None = None) -> tuple[Tensor, Stats | None]:
    """Normalise, scale and shift the rows of a level; running statistics are read and not moved.

    Args:
        z: (N, P * H).
        counts: (N,) or None, see `statistics`.

    Returns:
        (N, P * H), float32 at least; the statistics of the rows where they were taken.
    """
    z, stats = wide(z), None
    if level.of_rows:
        mean, var, total = statistics(z, counts, level.unbiased)
        rstd = torch.rsqrt(var + level.eps)
        stats = Stats(mean, rstd, rstd * level.gamma, var, total)
    else:
        assert level.running_mean is not None
        assert level.running_var is not None
        mean, rstd = wide(level.running_mean), torch.rsqrt(wide(level.running_var) + level.eps)
    return (z - mean) * (rstd * level.gamma) + level.beta, stats


def stack(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows]) -> tuple[Tensor, list[Stats | None]]:
    """Levels one above the other.

    Args:
        x: (N_0, C) bottom rows.
        levels, rows: from the bottom up.

    Returns:
        (N_L, H_L) of x's dtype; per level, the statistics of its rows where they were taken.
    """
    taken = []
    for level, (taps, counts, *_) in zip(levels, rows, strict=True):
        z = conv(x, level.weight.to(x.dtype), taps)
        y, stats = batch_norm(z, level, counts)
        x = level.activation.value(y).to(x.dtype)
        taken.append(stats)
    return x, taken
