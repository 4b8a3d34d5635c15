"""Levels in plain PyTorch, gradients in closed form: the eager backend, and the twin of the kernels.

Equal to `naive`, which is its definition, with less work: products before gathering where that is cheaper, 8 passes
over memory for BatchNorm and activation instead of some 20, and no autograd graph.

With g the gradient in front of a level's BatchNorm (summed over all that read the row), zhat = (z - mean) rstd, w the
counts, n their sum and c = 1 for the unbiased variance, else 0:

    dbeta = sum g,   dgamma = sum g zhat,   dz = gamma rstd (g - w (dbeta / n + zhat dgamma / (n - c)))

(with running statistics without the correction), dW_j = sum_n dz[n] x[taps[j, n]]^T, dx[r] = sum_j W_j^T dz[n] over all
n that read r as tap j. The counts multiply the correction and not g: a row that stands for w windows has all their
gradients in g already.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, P parts of the activation, k taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from convwave.data.graph import Rows
from convwave.ops.fold import fixed_stats, folded
from convwave.ops.level import Level, Stats, wide
from convwave.ops.naive import gather


class Tape(NamedTuple):
    """What `forward` leaves for `backward`.

    Attributes:
        h: per level, (N, H) activations.
        z: per level, (N, P * H) pre-activations.
        stats: per level, (5, P * H), see `level.Stats`.
    """

    h: list[Tensor]
    z: list[Tensor]
    stats: list[Tensor]


def _reads_zeros(i: int, taps: Tensor) -> bool:
    """Whether taps of level i may be -1; on a GPU the bottom's are taken to be, since looking would wait for it."""
    return i == 0 and (taps.is_cuda or bool((taps < 0).any()))


def _multiplies_first(x: Tensor, weight: Tensor, taps: Tensor) -> bool:
    """Whether to multiply each row below once, then gather and add: few rows below many, as in a distinct graph."""
    H, C, k = weight.shape
    return x.shape[0] * k < taps.shape[1] and C * k >= H


def _joined(x: Tensor, taps: Tensor, zeros: bool) -> Tensor:
    """(N, kC) what the taps read, side by side."""
    return torch.cat([gather(x, tap) if zeros else x.index_select(0, tap) for tap in taps], 1)


def _matrix(weight: Tensor) -> Tensor:
    """(H, C, k) -> (kC, H)."""
    H, C, k = weight.shape
    return weight.permute(2, 1, 0).reshape(k * C, H)


def conv(x: Tensor, weight: Tensor, taps: Tensor, shift: Tensor | None = None, zeros: bool = False) -> Tensor:
    """`naive.conv`, and a shift (H,) where given; `zeros` says that taps may be -1."""

    def affine(x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix if shift is None else torch.addmm(shift, x, matrix)

    if zeros or not _multiplies_first(x, weight, taps):
        return affine(_joined(x, taps, zeros), _matrix(weight))
    z = affine(x, weight[:, :, 0].T).index_select(0, taps[0])
    for j in range(1, weight.shape[2]):
        z.add_((x @ weight[:, :, j].T).index_select(0, taps[j]))
    return z


def conv_backward(
    dz: Tensor, x: Tensor, weight: Tensor, taps: Tensor, zeros: bool, needs_dx: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `conv`: dx (N', C) where asked for, dweight (H, C, k)."""
    H, C, k = weight.shape

    def scattered(rows: Tensor, tap: Tensor) -> Tensor:
        if zeros:
            rows = torch.where((tap >= 0)[:, None], rows, 0)
            tap = tap.clamp(min=0)
        return rows.new_zeros(x.shape[0], rows.shape[1]).index_add_(0, tap, rows)

    dx: Tensor | None = None
    if zeros or not _multiplies_first(x, weight, taps):
        dweight = (_joined(x, taps, zeros).T @ dz).view(k, C, H).permute(2, 1, 0)
        if needs_dx:
            for part, tap in zip((dz @ _matrix(weight).T).split(C, 1), taps, strict=True):
                dx = scattered(part, tap) if dx is None else dx.add_(scattered(part, tap))
        return dx, dweight
    dweights = []
    for j, tap in enumerate(taps):
        products = scattered(dz, tap)
        dweights.append((x.T @ products).T)
        if needs_dx:
            part = products @ weight[:, :, j]
            dx = part if dx is None else dx.add_(part)
    return dx, torch.stack(dweights, 2)


def counted(counts: Tensor | None, like: Tensor) -> Tensor | None:
    """(N, 1) counts of a dtype that their sums fit, None for 1 each."""
    return None if counts is None else counts.to(like.dtype)[:, None]


def row_stats(z: Tensor, level: Level, rows: Rows) -> tuple[Tensor, Tensor]:
    """Statistics (5, P * H) of the rows of a level, and the deviations (N, P * H) from their mean."""
    z = wide(z)
    w = counted(rows.counts, z)
    # .sum adds pairwise; a matrix-vector product adds one by one, and has 100 times the rounding error over 50,000 rows
    total: Tensor | float
    if rows.total is not None or w is None:
        total = rows.total if rows.total is not None else float(z.shape[0])
    else:
        total = w.sum()
    mean = z.mean(0) if w is None else (w * z).sum(0) / total
    deviation = z - mean
    squares = deviation.square() if w is None else w * deviation.square()
    var = squares.sum(0) / (total - 1 if level.unbiased else total)
    rstd = torch.rsqrt(var + level.eps)
    sums = total.expand_as(var) if isinstance(total, Tensor) else torch.full_like(var, total)
    return torch.stack([mean, rstd, level.gamma * rstd, var, sums]), deviation


def normalised(deviation: Tensor, scale: Tensor, beta: Tensor) -> Tensor:
    """(N, P * H) deviations from the mean, scaled and shifted."""
    return torch.addcmul(wide(beta), deviation, scale)


def forward(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows]) -> Tape:
    """`naive.stack`, with what its backward pass needs.

    Args:
        x: (N_0, C).
        levels, rows: from the bottom up.
    """
    tape = Tape([], [], [])
    for i, (level, row) in enumerate(zip(levels, rows, strict=True)):
        z = conv(x, level.weight.to(x.dtype), row.taps, zeros=_reads_zeros(i, row.taps))
        if level.of_rows:
            stats, deviation = row_stats(z, level, row)
        else:
            stats = fixed_stats(level)
            deviation = wide(z) - stats[0]
        x = level.activation.value(normalised(deviation, stats[2], level.beta)).to(z.dtype)
        tape.h.append(x)
        tape.z.append(z)
        tape.stats.append(stats)
    return tape


def inference(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows]) -> Tensor:
    """`naive.stack` in evaluation mode without gradients: BatchNorm folded into the convolution."""
    for i, (level, row) in enumerate(zip(levels, rows, strict=True)):
        weight, shift = folded(level)
        z = conv(x, weight.to(x.dtype), row.taps, shift.to(x.dtype), zeros=_reads_zeros(i, row.taps))
        x = level.activation.value(wide(z)).to(z.dtype)
    return x


def backward(
    dh: Tensor,
    x: Tensor,
    levels: Sequence[Level],
    tape: Tape,
    rows: Sequence[Rows],
    needs_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `forward` in closed form.

    Args:
        dh: (N_L, H_L).
        x: (N_0, C).
        tape: what `forward` returned.
        needs_dx: whether the gradient of x is wanted.

    Returns:
        dx (N_0, C) or None; per level dweight (P * H, C, k), dgamma (P * H,), dbeta (P * H,).
    """
    dweights: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    for i in reversed(range(len(levels))):
        level, (taps, counts, known, _), z, s = levels[i], rows[i], tape.z[i], Stats(*tape.stats[i])
        deviation = wide(z) - s.mean
        y = normalised(deviation, s.scale, level.beta)
        g = wide(level.activation.gradient(wide(dh), y, wide(tape.h[i])).to(z.dtype))
        dbeta, dgamma = g.sum(0), (g * deviation).sum(0) * s.rstd
        if level.of_rows:
            total = s.total if known is None else known
            divisor = total - 1 if level.unbiased else total
            correction = torch.addcmul(dbeta / total, deviation, dgamma * s.rstd / divisor)
            w = counted(counts, g)
            g = g - (correction if w is None else correction.mul_(w))
        dz = (g * s.scale).to(x.dtype)
        below = tape.h[i - 1].to(x.dtype) if i else x
        down, dweight = conv_backward(
            dz, below, level.weight.to(x.dtype), taps, _reads_zeros(i, taps), i > 0 or needs_dx
        )
        if down is not None:
            dh = down
        dweights.insert(0, dweight)
        dgammas.insert(0, dgamma)
        dbetas.insert(0, dbeta)
    return (dh if needs_dx else None), dweights, dgammas, dbetas


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' twins: the same with the kernels' signatures, activations computed again from what the kernels keep


def stack_forward(
    x: Tensor, levels: Sequence[Level], rows: Sequence[Rows]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(N_L, H_L) activations; per level pre-activations (N, P * H) and statistics (5, P * H)."""
    tape = forward(x, levels, rows)
    return tape.h[-1], tape.z, tape.stats


def stack_backward(
    dh: Tensor,
    x: Tensor,
    levels: Sequence[Level],
    zs: Sequence[Tensor],
    stats: Sequence[Tensor],
    rows: Sequence[Rows],
    needs_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    """`backward` from what `stack_forward` returned."""
    hs = []
    for level, z, (mean, _, scale, _, _) in zip(levels, zs, stats, strict=True):
        hs.append(level.activation.value(normalised(wide(z) - mean, scale, level.beta)).to(z.dtype))
    return backward(dh, x, levels, Tape(hs, list(zs), list(stats)), rows, needs_dx)
