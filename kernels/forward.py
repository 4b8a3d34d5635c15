"""One level forward: gather, BatchNorm + activation of the level below on load, product, statistics of counted rows.

    z[n] = sum_j W_j act(x[taps[j, n]]),   act = activation(batchnorm(.)) or nothing

The definition is `convwave.ops.naive`. The kernel saves passes over memory: activations are never written, and
statistics are computed from registers. It reads the rows below and writes z: 2 C numbers per row. Every program works
through several tiles of rows and merges their (count, mean, sum of squared deviations) as it goes; the last program to
finish merges all of them in program order, so the result does not depend on which one is last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from convwave.data.graph import Rows

from .configs import Launch, by_tap, forward_launch, interpreting
from .primitives import ACTIVATIONS, finish_statistics, is_last, load_counts, merge_statistics, norm, operand

if TYPE_CHECKING:
    from convwave.ops.level import Level


@triton.jit(do_not_specialize=["N"])
def conv_forward_kernel(
    x_ptr,  # (M, C) pre-activations or activations of the level below
    w_ptr,  # (K, H, C)
    z_ptr,  # (N, H)
    taps_ptr,  # (K, N) int64, -1: a row of zeros
    counts_ptr,  # (N,) or None: 1 each
    below_ptr,  # (5, C) statistics of the level below, or None: x are activations
    below_beta_ptr,  # (C,) or None
    stats_ptr,  # (5, H): written by the last program, or read for ACTIVATION
    gamma_ptr,  # (H,)
    beta_ptr,  # (H,)
    partial_ptr,  # (P, 3, H), or None: no statistics
    counter_ptr,  # (tiles of H,) int32 zeros, or None
    N,
    eps,
    stride_x: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BELOW_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,  # None: write z; else activation(batchnorm(z))
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # in the interpreter: multiply in float32 for every storage type
    BT: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    i_p, i_h = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H
    steps: tl.constexpr = (C + BC - 1) // BC
    o_wide = tl.zeros([BT], dtype=tl.int64)  # makes offsets 64 bits wide
    n = 0.0
    b_mean = tl.zeros([BH], dtype=tl.float32)
    b_m2 = tl.zeros([BH], dtype=tl.float32)
    for i_t in range(i_p, tl.cdiv(N, BT), programs):
        o_t = (o_wide + i_t) * BT + tl.arange(0, BT)
        m_t = o_t < N
        b_z = tl.zeros([BT, BH], dtype=tl.float32)
        for i in range(0, K * steps):
            j = i // steps
            o_c = (i % steps) * BC + tl.arange(0, BC)
            m_c = o_c < C
            o_x = tl.load(taps_ptr + (o_wide + j) * N + o_t, mask=m_t, other=-1)  # [BT]
            m_x = (o_x >= 0)[:, None] & m_c[None, :]
            b_x = tl.load(x_ptr + o_x[:, None] * stride_x + o_c[None, :], mask=m_x, other=0)  # [BT, BC]
            if below_ptr is not None:
                b_x = BELOW_ACTIVATION(norm(b_x.to(tl.float32), below_ptr, below_beta_ptr, o_c, m_c, C))
            p_w = w_ptr + j * (H * C) + o_c[:, None] + o_h[None, :] * C
            b_w = tl.load(p_w, mask=m_c[:, None] & m_h[None, :], other=0)  # [BC, BH]
            b_x = operand(b_x, x_ptr.dtype.element_ty, PRECISION, WIDEN)
            b_w = operand(b_w, x_ptr.dtype.element_ty, PRECISION, WIDEN)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
        m_z = m_t[:, None] & m_h[None, :]
        if ACTIVATION is not None:
            b_z = ACTIVATION(norm(b_z, stats_ptr, beta_ptr, o_h, m_h, H))
        b_z = b_z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + o_t[:, None] * H + o_h[None, :], b_z, mask=m_z)
        if partial_ptr is not None:
            b_w = load_counts(counts_ptr, o_t, m_t)  # [BT]
            # of what is stored, so that its normalised mean is 0; a row that counts 0 times may hold NaN
            b_v = tl.where(b_w[:, None] > 0, b_z.to(tl.float32), 0.0)
            n_new = tl.sum(b_w, 0)
            b_mean_new = tl.sum(b_w[:, None] * b_v, 0) / tl.maximum(n_new, 1e-30)
            b_delta = b_v - b_mean_new[None, :]
            b_m2_new = tl.sum(b_w[:, None] * b_delta * b_delta, 0)
            n, b_mean, b_m2 = merge_statistics(n, b_mean, b_m2, n_new, b_mean_new, b_m2_new)
    if partial_ptr is not None:
        p_p = partial_ptr + i_p * (3 * H) + o_h
        tl.store(p_p, tl.zeros([BH], dtype=tl.float32) + n, mask=m_h)
        tl.store(p_p + H, b_mean, mask=m_h)
        tl.store(p_p + 2 * H, b_m2, mask=m_h)
        if is_last(counter_ptr + i_h, programs):
            finish_statistics(partial_ptr, stats_ptr, gamma_ptr, o_h, m_h, H, programs, eps, UNBIASED, BH, BP)


def fixed_stats(level: Level) -> Tensor:
    """(5, H) float32 statistics from a level's running ones; the total is not used and 0."""
    assert level.running_mean is not None
    assert level.running_var is not None
    mean, var = level.running_mean.detach().float(), level.running_var.detach().float()
    rstd = torch.rsqrt(var + level.eps)
    return torch.stack([mean, rstd, rstd * level.gamma.detach().float(), var, torch.zeros_like(var)])


def conv_forward(
    x: Tensor,
    level: Level,
    rows: Rows,
    *,
    below: tuple[Level, Tensor] | None = None,
    precision: str = "ieee",
    activate: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `conv_forward_kernel`. Every tensor may be a view of any strides.

    Args:
        x: (M, C) float32, bfloat16 or float16: pre-activations when `below` is given, else activations.
        level: normalised with the statistics of its rows, or with its running ones (`Level.of_rows`).
        rows: N of them; rows of zeros (taps of -1) need ``below=None``.
        below: the level below and its statistics (5, C).
        activate: write activations instead of pre-activations; needs a level of running statistics.
        launch: overrides `forward_launch`.

    Returns:
        (N, H) of x's dtype, and the statistics (5, H) float32: mean, rstd, rstd * gamma, variance, sum of the counts.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    H, C, K = level.weight.shape
    N = rows.taps.shape[1]
    launch = launch or forward_launch(C, H, x.dtype, precision, x.device)
    tiles = triton.cdiv(H, launch.columns)
    programs = launch.programs(triton.cdiv(N, launch.rows), tiles, x.device)
    z = torch.empty(N, H, dtype=x.dtype, device=x.device)
    counts = partial = counter = None
    if level.of_rows:
        counts = rows.counts.contiguous() if rows.counts is not None else None
        partial = x.new_empty(programs, 3, H, dtype=torch.float32)
        counter = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        stats = x.new_empty(5, H, dtype=torch.float32)
    else:
        stats = fixed_stats(level)
    conv_forward_kernel[(programs, tiles)](
        x,
        by_tap(level.weight, x.dtype),
        z,
        rows.taps.contiguous(),
        counts,
        below[1] if below is not None else None,
        below[0].beta.contiguous() if below is not None else None,
        stats,
        level.gamma.contiguous(),
        level.beta.contiguous(),
        partial,
        counter,
        N,
        level.eps,
        x.stride(0),
        C=C,
        H=H,
        K=K,
        BELOW_ACTIVATION=ACTIVATIONS[below[0].activation.name].value if below is not None else None,
        ACTIVATION=ACTIVATIONS[level.activation.name].value if activate else None,
        UNBIASED=level.unbiased,
        PRECISION=precision,
        WIDEN=interpreting(),
        BT=launch.rows,
        BC=launch.depth,
        BH=launch.columns,
        BP=16,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return z, stats
