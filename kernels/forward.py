"""One level forward: gather, BatchNorm + tanh of the level below on load, product, weighted statistics.

    z[n] = sum_j W_j act(x[taps[j, n]]),   act = tanh(batchnorm(.)) or nothing

The definition is `convwave.ops.naive`. What the kernel saves is passes over memory: activations are never written, and
the statistics are taken from registers: it reads the rows below and writes z, 2 C numbers a row. Every program works
through several tiles of rows and merges their (count, mean, sum of squared deviations) as it goes; the last program to
finish merges those of all, in program order, so the result does not depend on who is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Launch, by_tap, forward_launch, interpreting
from .primitives import (
    finish_statistics,
    is_last,
    load_weights,
    merge_statistics,
    norm_tanh,
)


@triton.jit(do_not_specialize=["N"])
def conv_forward_kernel(
    x_ptr,  # (M, C) pre-activations or activations of the level below
    w_ptr,  # (K, H, C)
    z_ptr,  # (N, H)
    taps_ptr,  # (K, N) int64, -1: a row of zeros
    counts_ptr,  # (N,)
    below_ptr,  # (5, C) statistics of the level below
    below_beta_ptr,  # (C,)
    stats_ptr,  # (5, H), written by the last program or, with ACTIVATE, read
    gamma_ptr,  # (H,)
    beta_ptr,  # (H,)
    partial_ptr,  # (P, 3, H)
    counter_ptr,  # (tiles of H,) int32 zeros
    N,
    eps,
    stride_x: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,  # x are pre-activations
    STATISTICS: tl.constexpr,
    ACTIVATE: tl.constexpr,  # write tanh(batchnorm(z)) instead of z
    COUNTS: tl.constexpr,
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32 whatever the storage
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
            if PROLOGUE:
                b_x = norm_tanh(b_x.to(tl.float32), below_ptr, below_beta_ptr, o_c, m_c, C)
            p_w = w_ptr + j * (H * C) + o_c[:, None] + o_h[None, :] * C
            b_w = tl.load(p_w, mask=m_c[:, None] & m_h[None, :], other=0)  # [BC, BH]
            dtype: tl.constexpr = tl.float32 if WIDEN else x_ptr.dtype.element_ty
            b_x = b_x.to(x_ptr.dtype.element_ty).to(dtype)
            b_w = b_w.to(x_ptr.dtype.element_ty).to(dtype)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
        m_z = m_t[:, None] & m_h[None, :]
        if ACTIVATE:
            b_z = norm_tanh(b_z, stats_ptr, beta_ptr, o_h, m_h, H)
        b_z = b_z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + o_t[:, None] * H + o_h[None, :], b_z, mask=m_z)
        if STATISTICS:
            b_v = b_z.to(tl.float32)  # of what is stored, so that its normalised mean is 0
            b_w = load_weights(counts_ptr, o_t, m_t, COUNTS)  # [BT]
            n_new = tl.sum(b_w, 0)
            b_mean_new = tl.sum(b_w[:, None] * b_v, 0) / tl.maximum(n_new, 1e-30)
            b_delta = b_v - b_mean_new[None, :]
            b_m2_new = tl.sum(b_w[:, None] * b_delta * b_delta, 0)
            n, b_mean, b_m2 = merge_statistics(n, b_mean, b_m2, n_new, b_mean_new, b_m2_new)
    if STATISTICS:
        p_p = partial_ptr + i_p * (3 * H) + o_h
        tl.store(p_p, tl.zeros([BH], dtype=tl.float32) + n, mask=m_h)
        tl.store(p_p + H, b_mean, mask=m_h)
        tl.store(p_p + 2 * H, b_m2, mask=m_h)
        if is_last(counter_ptr + i_h, programs):
            finish_statistics(partial_ptr, stats_ptr, gamma_ptr, o_h, m_h, H, programs, eps, UNBIASED, BH, BP)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    *,
    gamma: Tensor,
    beta: Tensor,
    below: tuple[Tensor, Tensor] | None = None,
    counts: Tensor | None = None,
    stats: Tensor | None = None,
    unbiased: bool = True,
    eps: float = 1e-5,
    precision: str = "ieee",
    activate: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch `conv_forward_kernel`.

    Args:
        x: (M, C) float32, bfloat16 or float16: pre-activations when `below` is given, else activations.
        weight: (H, C, K), oldest tap first.
        taps: (K, N) int64 rows of `x`; -1 stands for a row of zeros and needs ``below=None``.
        gamma, beta: (H,) of this level's BatchNorm.
        below: statistics (5, C) and beta (C,) of the level below.
        counts: (N,) weights of the rows in the statistics, any dtype; None means 1 each.
        stats: (5, H) to use in evaluation mode; None takes them from the rows.
        activate: write activations instead of pre-activations; needs `stats`.
        launch: tile sizes other than `forward_launch` chooses.

    Returns:
        (N, H) of x's dtype, and the statistics (5, H) float32: mean, rstd, rstd * gamma, variance, sum of the weights.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    taps = taps.contiguous()
    H, C, K = weight.shape
    N = taps.shape[1]
    launch = launch or forward_launch(C, H, x.dtype, precision, x.device)
    tiles = triton.cdiv(H, launch.columns)
    programs = launch.programs(triton.cdiv(N, launch.rows), tiles, x.device)
    z = torch.empty(N, H, dtype=x.dtype, device=x.device)
    training = stats is None
    partial = x.new_empty((programs, 3, H) if training else (1,), dtype=torch.float32)
    counter = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    stats = x.new_empty((5, H), dtype=torch.float32) if stats is None else stats
    conv_forward_kernel[(programs, tiles)](
        x,
        by_tap(weight, x.dtype),
        z,
        taps,
        counts.contiguous() if counts is not None else x,
        below[0] if below is not None else stats,
        below[1] if below is not None else stats,
        stats,
        gamma,
        beta,
        partial,
        counter,
        N,
        eps,
        x.stride(0),
        C=C,
        H=H,
        K=K,
        PROLOGUE=below is not None,
        STATISTICS=training,
        ACTIVATE=activate,
        COUNTS=counts is not None,
        UNBIASED=unbiased,
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
