"""The top of a stack: BatchNorm + activation by itself, and where the gradient enters.

    forward:   h = act(y),   y = batchnorm(z)
    backward:  g = dh act'(y),   sum g,   sum g zhat

Every other level's BatchNorm + activation happens while the level above loads it, and its sums while that level's
backward stores g: see forward.py and backward.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import elementwise_launch
from .primitives import ACTIVATIONS, MEAN, RSTD, finish_sums, is_last, norm

if TYPE_CHECKING:
    from convwave.ops.level import Level


@triton.jit(do_not_specialize=["N"])
def norm_activate_forward_kernel(
    z_ptr,  # (N, C)
    stats_ptr,  # (5, C)
    beta_ptr,  # (C,)
    h_ptr,  # (N, C)
    N,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    o_t = (tl.zeros([BT], dtype=tl.int64) + tl.program_id(0)) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_z = (o_t < N)[:, None] & m_c[None, :]
    o_z = o_t[:, None] * C + o_c[None, :]
    b_z = tl.load(z_ptr + o_z, mask=m_z, other=0).to(tl.float32)  # [BT, BC]
    b_h = ACTIVATION(norm(b_z, stats_ptr, beta_ptr, o_c, m_c, C))
    tl.store(h_ptr + o_z, b_h.to(h_ptr.dtype.element_ty), mask=m_z)


@triton.jit(do_not_specialize=["N", "stride_dh"])
def norm_activate_backward_kernel(
    dh_ptr,  # (N, C), row stride stride_dh
    z_ptr,  # (N, C)
    stats_ptr,  # (5, C)
    beta_ptr,  # (C,)
    g_ptr,  # (N, C)
    sums_ptr,  # (4, C), or (2, C) without TRAINING
    partial_ptr,  # (P, 2, C)
    counter_ptr,  # (tiles of C,) int32 zeros
    N,
    stride_dh,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    TRAINING: tl.constexpr,
    UNBIASED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    i_p, i_c = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_mean = tl.load(stats_ptr + MEAN * C + o_c, mask=m_c, other=0)
    b_rstd = tl.load(stats_ptr + RSTD * C + o_c, mask=m_c, other=0)
    b_dbeta = tl.zeros([BC], dtype=tl.float32)
    b_dgamma = tl.zeros([BC], dtype=tl.float32)
    o_wide = tl.zeros([BT], dtype=tl.int64)
    for i_t in range(i_p, tl.cdiv(N, BT), programs):
        o_t = (o_wide + i_t) * BT + tl.arange(0, BT)
        m_z = (o_t < N)[:, None] & m_c[None, :]
        o_z = o_t[:, None] * C + o_c[None, :]
        b_z = tl.load(z_ptr + o_z, mask=m_z, other=0).to(tl.float32)  # [BT, BC]
        b_y = norm(b_z, stats_ptr, beta_ptr, o_c, m_c, C)
        b_dh = tl.load(dh_ptr + o_t[:, None] * stride_dh + o_c[None, :], mask=m_z, other=0).to(tl.float32)
        b_g = GRADIENT(b_dh, b_y, ACTIVATION(b_y)).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + o_z, b_g, mask=m_z)
        b_g = b_g.to(tl.float32)
        b_dbeta += tl.sum(b_g, 0)
        b_dgamma += tl.sum(b_g * ((b_z - b_mean[None, :]) * b_rstd[None, :]), 0)
    p_p = partial_ptr + i_p * (2 * C) + o_c
    tl.store(p_p, b_dbeta, mask=m_c)
    tl.store(p_p + C, b_dgamma, mask=m_c)
    if is_last(counter_ptr + i_c, programs):
        finish_sums(partial_ptr, sums_ptr, stats_ptr, o_c, m_c, C, programs, TRAINING, UNBIASED, BC, BP)


def norm_activate_forward(z: Tensor, level: Level, stats: Tensor) -> Tensor:
    """Launch `norm_activate_forward_kernel`: (N, C) pre-activations and statistics (5, C) -> (N, C) of z's dtype."""
    z = z.contiguous()
    N, C = z.shape
    launch = elementwise_launch(C)
    h = torch.empty_like(z)
    norm_activate_forward_kernel[(triton.cdiv(N, launch.rows), triton.cdiv(C, launch.columns))](
        z,
        stats,
        level.beta.contiguous(),
        h,
        N,
        C=C,
        ACTIVATION=ACTIVATIONS[level.activation.name].value,
        BT=launch.rows,
        BC=launch.columns,
        num_warps=launch.warps,
    )
    return h


def norm_activate_backward(dh: Tensor, z: Tensor, level: Level, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `norm_activate_backward_kernel`.

    Args:
        dh: (N, C) gradient of the activations, of any strides.
        z: (N, C) pre-activations.
        level: theirs.
        stats: (5, C) of the level.

    Returns:
        g: (N, C) gradient in front of the activation, of z's dtype.
        sums: (4, C) float32: gradients of beta and gamma, and what of them goes back through the mean and the variance;
            (2, C) where the statistics are fixed and nothing does.
    """
    dh = dh if dh.stride(-1) == 1 else dh.contiguous()
    z = z.contiguous()
    N, C = z.shape
    launch = elementwise_launch(C)
    tiles = triton.cdiv(C, launch.columns)
    programs = launch.programs(triton.cdiv(N, launch.rows), tiles, z.device)
    g = torch.empty_like(z)
    sums = z.new_empty(4 if level.of_rows else 2, C, dtype=torch.float32)
    activation = ACTIVATIONS[level.activation.name]
    norm_activate_backward_kernel[(programs, tiles)](
        dh,
        z,
        stats,
        level.beta.contiguous(),
        g,
        sums,
        z.new_empty(programs, 2, C, dtype=torch.float32),
        torch.zeros(tiles, dtype=torch.int32, device=z.device),
        N,
        dh.stride(0),
        C=C,
        ACTIVATION=activation.value,
        GRADIENT=activation.gradient,
        TRAINING=level.of_rows,
        UNBIASED=level.unbiased,
        BT=launch.rows,
        BC=launch.columns,
        BP=16,
        num_warps=launch.warps,
    )
    return g, sums
