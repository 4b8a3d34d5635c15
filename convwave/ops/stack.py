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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.graph import Rows, dense_graph
from convwave.data.packing import Packed
from convwave.ops.fold import fixed_stats, folded
from convwave.ops.level import Level, Stats, wide


class Tape(NamedTuple):
    """What `forward` leaves for `backward`.

    Attributes:
        h: per level, (N, H) activations.
        deviation: per level, (N, P * H) pre-activations less their mean.
        stats: per level, (5, P * H), see `level.Stats`.
        read: per level, (N, kC) what the taps read, None where products were gathered instead.
        z: per level, (N, P * H) pre-activations; empty unless asked for.
    """

    h: list[Tensor]
    deviation: list[Tensor]
    stats: list[Tensor]
    read: list[Tensor | None]
    z: list[Tensor]


def _multiplies_first(x: Tensor, weight: Tensor, taps: Tensor) -> bool:
    """Whether to multiply each row below once, then gather and add: few rows below many, as in a distinct graph."""
    H, C, k = weight.shape
    return x.shape[0] * k < taps.shape[1] and C * k >= H


def _with_zeros(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """x with a row of zeros behind it, and taps that read that row where they were -1."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])]), torch.where(taps < 0, x.shape[0], taps)


def _joined(x: Tensor, taps: Tensor) -> Tensor:
    """(N, kC) what the taps read, side by side."""
    return torch.cat([x.index_select(0, tap) for tap in taps], 1)


def _matrix(weight: Tensor) -> Tensor:
    """(H, C, k) -> (kC, H)."""
    H, C, k = weight.shape
    return weight.permute(2, 1, 0).reshape(k * C, H)


def conv(x: Tensor, weight: Tensor, taps: Tensor, shift: Tensor | None = None, zeros: bool = False) -> Tensor:
    """`naive.conv`, and a shift (H,) where given; `zeros` says that taps may be -1."""
    return _conv(x, weight, taps, shift, zeros)[0]


def _conv(x: Tensor, weight: Tensor, taps: Tensor, shift: Tensor | None, zeros: bool) -> tuple[Tensor, Tensor | None]:
    """The same, with (N, kC) what the taps read, None where products were gathered."""

    def affine(x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix if shift is None else torch.addmm(shift, x, matrix)

    if zeros:
        x, taps = _with_zeros(x, taps)
    if not _multiplies_first(x, weight, taps):
        joined = _joined(x, taps)
        return affine(joined, _matrix(weight)), joined
    z = affine(x, weight[:, :, 0].T).index_select(0, taps[0])
    for j in range(1, weight.shape[2]):
        z.add_((x @ weight[:, :, j].T).index_select(0, taps[j]))
    return z, None


def _conv_backward(
    dz: Tensor, x: Tensor, read: Tensor | None, weight: Tensor, taps: Tensor, zeros: bool, needs_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `_conv`: dx (N', C) where asked for, dweight (H, C, k)."""
    H, C, k = weight.shape
    dx: Tensor | None

    if zeros:
        above, taps = _with_zeros(x, taps)
        dx, dweight = _conv_backward(dz, above, read, weight, taps, False, needs_dx)
        return (None if dx is None else dx[:-1]), dweight

    def scattered(rows: Tensor, tap: Tensor) -> Tensor:
        return rows.new_zeros(x.shape[0], rows.shape[1]).index_add_(0, tap, rows)

    dx = None
    if read is not None:
        dweight = (read.T @ dz).view(k, C, H).permute(2, 1, 0)
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


def forward(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows], keep_z: bool = False) -> Tape:
    """`naive.stack`, with what its backward pass needs.

    Args:
        x: (N_0, C).
        levels, rows: from the bottom up.
        keep_z: the pre-activations too.
    """
    tape = Tape([], [], [], [], [])
    for i, (level, row) in enumerate(zip(levels, rows, strict=True)):
        z, read = _conv(x, level.weight.to(x.dtype), row.taps, None, i == 0)
        if level.of_rows:
            stats, deviation = row_stats(z, level, row)
        else:
            stats = fixed_stats(level)
            deviation = wide(z) - stats[0]
        x = level.activation.value(normalised(deviation, stats[2], level.beta)).to(z.dtype)
        tape.h.append(x)
        tape.deviation.append(deviation)
        tape.stats.append(stats)
        tape.read.append(read)
        if keep_z:
            tape.z.append(z)
    return tape


def inference(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows]) -> Tensor:
    """`naive.stack` in evaluation mode without gradients: BatchNorm folded into the convolution."""
    for i, (level, row) in enumerate(zip(levels, rows, strict=True)):
        weight, shift = folded(level)
        z = conv(x, weight.to(x.dtype), row.taps, shift.to(x.dtype), zeros=i == 0)
        x = level.activation.value(wide(z)).to(z.dtype)
    return x


def score_names(
    embedding: Tensor, levels: Sequence[Level], head_weight: Tensor, head_bias: Tensor, packed: Packed, losses: bool
) -> Tensor:
    """Log-probabilities of packed words' positions, or losses of their targets; arguments of `library.score_names`."""
    graph = dense_graph(packed, factors=[level.weight.shape[2] for level in levels])
    h = inference(embedding[packed.tokens], levels, graph.rows(counted=False))
    logp = wide(F.linear(h, head_weight, head_bias)).log_softmax(1)
    return -logp.gather(1, packed.targets.long()[:, None])[:, 0] if losses else logp


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
        level, (taps, counts, known, _) = levels[i], rows[i]
        deviation, s, h = tape.deviation[i], Stats(*tape.stats[i]), tape.h[i]
        y = partial(normalised, deviation, s.scale, level.beta)
        g = wide(level.activation.gradient(wide(dh), y, wide(h)).to(h.dtype))
        dbeta, dgamma = g.sum(0), (g * deviation).sum(0) * s.rstd
        if level.of_rows:
            total = s.total if known is None else known
            divisor = total - 1 if level.unbiased else total
            correction = torch.addcmul(dbeta / total, deviation, dgamma * s.rstd / divisor)
            w = counted(counts, g)
            g = g.sub_(correction if w is None else correction.mul_(w))
        dz = g.mul_(s.scale).to(x.dtype)
        below = tape.h[i - 1].to(x.dtype) if i else x
        zeros, weight = i == 0, level.weight.to(x.dtype)
        down, dweight = _conv_backward(dz, below, tape.read[i], weight, taps, zeros, i > 0 or needs_dx)
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
    tape = forward(x, levels, rows, keep_z=True)
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
    tape, below = Tape([], [], list(stats), [], []), x
    for i, (level, z, (mean, _, scale, _, _)) in enumerate(zip(levels, zs, stats, strict=True)):
        taps = rows[i].taps
        if i == 0:
            below, taps = _with_zeros(below, taps)
        tape.read.append(None if _multiplies_first(below, level.weight, taps) else _joined(below, taps))
        tape.deviation.append(wide(z) - mean)
        below = level.activation.value(normalised(tape.deviation[i], scale, level.beta)).to(z.dtype)
        tape.h.append(below)
    return backward(dh, x, levels, tape, rows, needs_dx)
