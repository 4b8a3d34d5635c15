"""One level backward: gradients of the rows below and of the matrices, and the sums that BatchNorm's gradient needs.

With g the gradient in front of the level's activation, zhat = (z - mean) rstd, w the counts of the rows:

    dz[n] = gamma rstd (g[n] - w[n] (center + (z[n] - mean) spread))
            center = sum g / n, spread = rstd sum g zhat / (n - 1); neither where the statistics are fixed
    G_j[r] = sum of dz[n] over all n that read row r as tap j
    dx[r] = sum_j W_j^T G_j[r],   dW_j = sum_r G_j[r] act(x[r])^T

Both gradients are sums over the rows *below*, and both come from G_j: so a program takes a tile of rows below, collects
G_j for it, and has all it needs. In one pass it reads g, z and x and writes the gradient in front of the activation
below, 4 C numbers a row, together with that level's sums for the next kernel down. Who reads row r is a range of
entries per tap (`consumers`), so nothing is scattered and no float is added atomically: the result does not depend on
scheduling.

The gradients of the matrices stay in registers across all tiles of a program; if C or H is too wide for that (see
`Launch.fused`), `conv_weight_kernel` computes them in a separate pass, and a level costs 7 C. Rows that very many
rows read (the empty context of a distinct graph) would be a long sum for one program: `block_sums_kernel` first adds up
every 64 neighbouring entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from convwave.data.graph import Rows, find_consumers

from .configs import Launch, backward_launch, by_tap, has_wgmma, interpreting, weight_launch
from .primitives import (
    ACTIVATIONS,
    CENTER,
    MEAN,
    RSTD,
    SCALE,
    SPREAD,
    finish_sums,
    is_last,
    load_counts,
    norm,
    operand,
)

if TYPE_CHECKING:
    from convwave.ops.level import Level

BLOCK = 64  # entries added up by `block_sums_kernel`


@triton.jit
def gradient_of_z(
    g_ptr,  # (N, H)
    z_ptr,  # (N, H)
    counts_ptr,  # (N,) or None: 1 each
    stats_ptr,  # (5, H)
    sums_ptr,  # (4, H), or None where the statistics are fixed
    o_n,  # [B] rows
    m_n,
    o_h,  # [BH] channels
    m_h,
    H,
):
    """[B, BH] float32 dz / (gamma rstd)."""
    m_z = m_n[:, None] & m_h[None, :]
    o_z = o_n[:, None] * H + o_h[None, :]
    b_d = tl.load(g_ptr + o_z, mask=m_z, other=0).to(tl.float32)
    if sums_ptr is not None:
        b_mean = tl.load(stats_ptr + MEAN * H + o_h, mask=m_h, other=0)
        b_center = tl.load(sums_ptr + CENTER * H + o_h, mask=m_h, other=0)
        b_spread = tl.load(sums_ptr + SPREAD * H + o_h, mask=m_h, other=0)
        b_z = tl.load(z_ptr + o_z, mask=m_z, other=0).to(tl.float32)
        b_w = load_counts(counts_ptr, o_n, m_n)[:, None]
        b_back = b_w * (b_center[None, :] + (b_z - b_mean[None, :]) * b_spread[None, :])
        b_d -= tl.where(b_w > 0, b_back, 0.0)  # a row that counts 0 times may hold NaN
    return b_d


@triton.jit(do_not_specialize=["N"])
def block_sums_kernel(
    g_ptr,
    z_ptr,
    counts_ptr,
    stats_ptr,
    sums_ptr,
    order_ptr,  # (K, N), or None: entry n is row n
    blocks_ptr,  # (K, ceil(N / BLOCK), H) float32
    N,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    BH: tl.constexpr,
):
    """Sums of `gradient_of_z` over every BLOCK neighbouring entries of a tap."""
    i_b, j, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_wide = tl.zeros([BLOCK], dtype=tl.int64)
    o_e = (o_wide + i_b) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < N
    if order_ptr is not None:
        o_n = tl.load(order_ptr + (o_wide + j) * N + o_e, mask=m_e, other=0)
    else:
        o_n = o_e
    o_h = i_h * BH + tl.arange(0, BH)
    m_h = o_h < H
    b_d = gradient_of_z(g_ptr, z_ptr, counts_ptr, stats_ptr, sums_ptr, o_n, m_e, o_h, m_h, H)
    o_b = ((tl.zeros([BH], dtype=tl.int64) + j) * tl.num_programs(0) + i_b) * H + o_h
    tl.store(blocks_ptr + o_b, tl.sum(b_d, 0), mask=m_h)


@triton.jit
def collect(
    g_ptr,
    z_ptr,
    counts_ptr,
    stats_ptr,
    sums_ptr,
    ranges_ptr,  # (2, K, M)
    order_ptr,
    blocks_ptr,  # None: every range is short
    j,
    o_r,  # [BR] rows below
    m_r,
    o_h,
    m_h,
    M,
    N,
    H,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """[BR, BH] float32 G_j of a tile of rows below."""
    o_wide = tl.zeros([BR], dtype=tl.int64)
    b_begin = tl.load(ranges_ptr + (o_wide + j) * M + o_r, mask=m_r, other=0)
    b_end = tl.load(ranges_ptr + (o_wide + (K + j)) * M + o_r, mask=m_r, other=0)
    b_sum = tl.zeros([BR, BH], dtype=tl.float32)
    if blocks_ptr is not None:  # entries before the first whole block, whole blocks, entries after the last
        b_first = tl.minimum((b_begin + (BLOCK - 1)) // BLOCK * BLOCK, b_end)
        b_last = tl.maximum(b_end // BLOCK * BLOCK, b_first)
        b_blocks = (b_last - b_first) // BLOCK
        num_blocks = tl.cdiv(N, BLOCK)
        for i in range(0, tl.max(b_blocks, 0).to(tl.int32)):
            m_b = (i < b_blocks)[:, None] & m_h[None, :]
            o_b = ((o_wide + j) * num_blocks + b_first // BLOCK + i) * H
            b_sum += tl.load(blocks_ptr + o_b[:, None] + o_h[None, :], mask=m_b, other=0)
    else:
        b_first = b_end
        b_last = b_end
    b_head = b_first - b_begin
    b_entries = b_head + (b_end - b_last)
    for i in range(0, tl.max(b_entries, 0).to(tl.int32)):
        m_e = i < b_entries
        # a tl.where would read better, but fails to compile: triton 3.7.1 loses the layout of its condition
        o_e = b_begin + i + (i >= b_head).to(tl.int64) * (b_last - b_first)
        if order_ptr is not None:
            # not masked, which fails to compile: triton 3.6.0 takes the mask's type for the pointer's
            o_n = tl.load(order_ptr + (o_wide + j) * N + tl.minimum(o_e, N - 1))
        else:
            o_n = o_e
        b_sum += gradient_of_z(g_ptr, z_ptr, counts_ptr, stats_ptr, sums_ptr, o_n, m_e, o_h, m_h, H)
    b_scale = tl.load(stats_ptr + SCALE * H + o_h, mask=m_h, other=0)
    return b_sum * b_scale[None, :]


@triton.jit(do_not_specialize=["M", "N"])
def conv_backward_kernel(
    g_ptr,  # (N, H) gradient in front of the level's activation
    z_ptr,  # (N, H)
    counts_ptr,  # (N,) or None
    stats_ptr,  # (5, H)
    sums_ptr,  # (4, H) or None
    w_ptr,  # (K, H, C), or (K, C, H): see stride_h
    x_ptr,  # (M, C) pre-activations or, without below, activations
    below_ptr,  # (5, C) or None
    below_beta_ptr,  # (C,) or None
    ranges_ptr,  # (2, K, M) int64
    order_ptr,  # (K, N) int64 or None
    blocks_ptr,  # (K, ceil(N / BLOCK), H) or None
    dx_ptr,  # (M, C): gradient in front of the activation below, or of x itself
    below_sums_ptr,  # (4, C), or (2, C) without TRAINING; None without below, as the next two
    partial_ptr,  # (P, 2, C)
    counter_ptr,  # (tiles of C,) int32 zeros
    dw_ptr,  # (P, 2, H, C) float32: the matrices' gradients too, where K = 2, BH >= H and one tile holds C; or None
    M,
    N,
    stride_x: tl.constexpr,
    stride_h: tl.constexpr,  # of the matrices: 1 where numbers that are summed lie side by side
    stride_c: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BELOW_ACTIVATION: tl.constexpr,
    BELOW_GRADIENT: tl.constexpr,
    TRAINING: tl.constexpr,  # of the level below, as UNBIASED
    UNBIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    i_p, i_c = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    store: tl.constexpr = x_ptr.dtype.element_ty
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    o_wide = tl.zeros([BR], dtype=tl.int64)
    b_dbeta = tl.zeros([BC], dtype=tl.float32)
    b_dgamma = tl.zeros([BC], dtype=tl.float32)
    if dw_ptr is not None:
        b_dw0 = tl.zeros([BH, BC], dtype=tl.float32)
        b_dw1 = tl.zeros([BH, BC], dtype=tl.float32)
    for i_r in range(i_p, tl.cdiv(M, BR), programs):
        o_r = (o_wide + i_r) * BR + tl.arange(0, BR)
        m_r = o_r < M
        m_x = m_r[:, None] & m_c[None, :]
        b_dx = tl.zeros([BR, BC], dtype=tl.float32)
        if dw_ptr is not None:
            b_x = tl.load(x_ptr + o_r[:, None] * stride_x + o_c[None, :], mask=m_x, other=0).to(tl.float32)
            if below_ptr is not None:
                b_h = BELOW_ACTIVATION(norm(b_x, below_ptr, below_beta_ptr, o_c, m_c, C))
            else:
                b_h = b_x
            b_h = operand(b_h, store, PRECISION, WIDEN)
        for j in tl.static_range(K):
            for i_h in range(0, H, BH):
                o_h = i_h + tl.arange(0, BH)
                m_h = o_h < H
                b_g = collect(
                    g_ptr, z_ptr, counts_ptr, stats_ptr, sums_ptr, ranges_ptr, order_ptr, blocks_ptr, j, o_r, m_r,
                    o_h, m_h, M, N, H, K, BLOCK, BR, BH,
                )  # [BR, BH]  # fmt: skip
                b_g = operand(b_g, store, PRECISION, WIDEN)
                p_w = w_ptr + j * (H * C) + o_h[:, None] * stride_h + o_c[None, :] * stride_c
                b_w = tl.load(p_w, mask=m_h[:, None] & m_c[None, :], other=0)  # [BH, BC]
                b_w = operand(b_w, store, PRECISION, WIDEN)
                b_dx = tl.dot(b_g, b_w, b_dx, input_precision=PRECISION)
                if dw_ptr is not None:
                    if j == 0:
                        b_dw0 = tl.dot(tl.trans(b_g), b_h, b_dw0, input_precision=PRECISION)
                    else:
                        b_dw1 = tl.dot(tl.trans(b_g), b_h, b_dw1, input_precision=PRECISION)
        if below_ptr is not None:
            b_x = tl.load(x_ptr + o_r[:, None] * stride_x + o_c[None, :], mask=m_x, other=0).to(tl.float32)
            b_y = norm(b_x, below_ptr, below_beta_ptr, o_c, m_c, C)
            b_dx = BELOW_GRADIENT(b_dx, b_y, BELOW_ACTIVATION(b_y))
            b_mean = tl.load(below_ptr + MEAN * C + o_c, mask=m_c, other=0)
            b_rstd = tl.load(below_ptr + RSTD * C + o_c, mask=m_c, other=0)
            b_v = b_dx.to(dx_ptr.dtype.element_ty).to(tl.float32)
            b_dbeta += tl.sum(b_v, 0)
            b_dgamma += tl.sum(b_v * ((b_x - b_mean[None, :]) * b_rstd[None, :]), 0)
        tl.store(dx_ptr + o_r[:, None] * C + o_c[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    if dw_ptr is not None:
        o_h = tl.arange(0, BH)
        m_w = (o_h < H)[:, None] & m_c[None, :]
        p_w = dw_ptr + i_p * (2 * H * C) + o_h[:, None] * C + o_c[None, :]
        tl.store(p_w, b_dw0, mask=m_w)
        tl.store(p_w + H * C, b_dw1, mask=m_w)
    if below_ptr is not None:
        p_p = partial_ptr + i_p * (2 * C) + o_c
        tl.store(p_p, b_dbeta, mask=m_c)
        tl.store(p_p + C, b_dgamma, mask=m_c)
        if is_last(counter_ptr + i_c, programs):
            finish_sums(
                partial_ptr, below_sums_ptr, below_ptr, o_c, m_c, C, programs, TRAINING, UNBIASED, BC, BP
            )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def conv_weight_kernel(
    g_ptr,
    z_ptr,
    counts_ptr,
    stats_ptr,
    sums_ptr,
    x_ptr,  # (M, C)
    below_ptr,  # (5, C) or None
    below_beta_ptr,  # (C,) or None
    taps_ptr,  # (K, N)
    dw_ptr,  # (P, K, H, C) float32
    N,
    stride_x: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    BELOW_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
):
    """dW_j[h, c] = sum_n dz[n, h] act(x[taps[j, n], c]), one partial sum per program."""
    i_p, j, i_w = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles_c: tl.constexpr = (C + BC - 1) // BC
    o_h = i_w // tiles_c * BH + tl.arange(0, BH)
    o_c = i_w % tiles_c * BC + tl.arange(0, BC)
    m_h, m_c = o_h < H, o_c < C
    store: tl.constexpr = x_ptr.dtype.element_ty
    o_wide = tl.zeros([BT], dtype=tl.int64)
    b_scale = tl.load(stats_ptr + SCALE * H + o_h, mask=m_h, other=0)
    b_dw = tl.zeros([BH, BC], dtype=tl.float32)
    for i_t in range(i_p, tl.cdiv(N, BT), tl.num_programs(0)):
        o_t = (o_wide + i_t) * BT + tl.arange(0, BT)
        m_t = o_t < N
        o_x = tl.load(taps_ptr + (o_wide + j) * N + o_t, mask=m_t, other=-1)
        m_x = (o_x >= 0)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + o_x[:, None] * stride_x + o_c[None, :], mask=m_x, other=0)  # [BT, BC]
        if below_ptr is not None:
            b_x = BELOW_ACTIVATION(norm(b_x.to(tl.float32), below_ptr, below_beta_ptr, o_c, m_c, C))
        b_d = gradient_of_z(g_ptr, z_ptr, counts_ptr, stats_ptr, sums_ptr, o_t, m_t, o_h, m_h, H)
        b_d = operand(b_d * b_scale[None, :], store, PRECISION, WIDEN)  # [BT, BH]
        b_dw = tl.dot(tl.trans(b_d), operand(b_x, store, PRECISION, WIDEN), b_dw, input_precision=PRECISION)
    p_w = dw_ptr + (i_p * tl.num_programs(1) + j) * (H * C) + o_h[:, None] * C + o_c[None, :]
    tl.store(p_w, b_dw, mask=m_h[:, None] & m_c[None, :])


class BackwardResult(NamedTuple):
    """Gradients of one level.

    Attributes:
        dx: (M, C) in front of the activation below, or of x itself; None where it was not asked for.
        sums: of the level below, as `norm_activate_backward` returns them; None without one.
        dweight: (H, C, K) float32.
    """

    dx: Tensor | None
    sums: Tensor | None
    dweight: Tensor


def conv_backward(
    g: Tensor,
    z: Tensor,
    level: Level,
    stats: Tensor,
    sums: Tensor,
    x: Tensor,
    rows: Rows,
    *,
    below: tuple[Level, Tensor] | None = None,
    precision: str = "ieee",
    needs_dx: bool = True,
    launch: Launch | None = None,
) -> BackwardResult:
    """Launch the kernels of one level's backward pass. Every tensor may be a view of any strides.

    Args:
        g: (N, H) gradient in front of the level's activation.
        z: (N, H) its pre-activations.
        stats, sums: (5, H) of `conv_forward`, and what the kernel above returned.
        level, x, rows, below, precision: as for `conv_forward`; consumers are found where the rows have none.
        needs_dx: False if x is the bottom and its gradient is not needed.
        launch: tile sizes other than `backward_launch` chooses.
    """
    g, z = g.contiguous(), z.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    H, C, K = level.weight.shape
    M, N = x.shape[0], z.shape[0]
    device = x.device
    launch = launch or backward_launch(C, H, K, x.dtype, precision, device)
    rows = rows._replace(counts=rows.counts.contiguous() if level.of_rows and rows.counts is not None else None)
    through = sums if level.of_rows else None
    fused = launch.fused and needs_dx
    dw = None if fused else _weight(g, z, level, stats, through, x, rows, below, precision)
    if not needs_dx:
        assert dw is not None
        return BackwardResult(None, None, dw)
    consumers = rows.consumers if rows.consumers is not None else find_consumers(rows.taps, M)
    order = consumers.order.contiguous() if consumers.order.numel() else None
    blocks = None
    if not 0 < consumers.most <= BLOCK:
        blocks = x.new_empty(K, triton.cdiv(N, BLOCK), H, dtype=torch.float32)
        columns = 64
        block_sums_kernel[(blocks.shape[1], K, triton.cdiv(H, columns))](
            g,
            z,
            rows.counts,
            stats,
            through,
            order,
            blocks,
            N,
            H=H,
            BLOCK=BLOCK,
            BH=columns,
        )
    tiles = triton.cdiv(C, launch.columns)
    programs = launch.programs(triton.cdiv(M, launch.rows), tiles, device)
    # side by side for matrix units, but for bfloat16 and float16 elsewhere than on Hopper: some of it spills 24 bytes
    along_h = has_wgmma(device) if x.dtype != torch.float32 else precision != "ieee"
    dx = torch.empty(M, C, dtype=x.dtype, device=device)
    below_sums = None
    if below is not None:
        below_sums = x.new_empty(4 if below[0].of_rows else 2, C, dtype=torch.float32)
    partial_dw = x.new_empty(programs, K, H, C, dtype=torch.float32) if fused else None
    activation = ACTIVATIONS[below[0].activation.name] if below is not None else None
    conv_backward_kernel[(programs, tiles)](
        g,
        z,
        rows.counts,
        stats,
        through,
        by_tap(level.weight.transpose(0, 1) if along_h else level.weight, x.dtype),
        x,
        below[1] if below is not None else None,
        below[0].beta.contiguous() if below is not None else None,
        consumers.ranges.contiguous(),
        order,
        blocks,
        dx,
        below_sums,
        x.new_empty(programs, 2, C, dtype=torch.float32) if below is not None else None,
        torch.zeros(tiles, dtype=torch.int32, device=device) if below is not None else None,
        partial_dw,
        M,
        N,
        x.stride(0),
        stride_h=1 if along_h else C,
        stride_c=H if along_h else 1,
        C=C,
        H=H,
        K=K,
        BELOW_ACTIVATION=activation.value if activation is not None else None,
        BELOW_GRADIENT=activation.gradient if activation is not None else None,
        TRAINING=below is not None and below[0].of_rows,
        UNBIASED=below is not None and below[0].unbiased,
        PRECISION=precision,
        WIDEN=interpreting(),
        BLOCK=BLOCK,
        BR=launch.rows,
        BH=launch.depth,
        BC=launch.columns,
        BP=16,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if partial_dw is not None:
        dw = partial_dw.sum(0).permute(1, 2, 0)
    assert dw is not None
    return BackwardResult(dx, below_sums, dw)


def _weight(
    g: Tensor,
    z: Tensor,
    level: Level,
    stats: Tensor,
    sums: Tensor | None,
    x: Tensor,
    rows: Rows,
    below: tuple[Level, Tensor] | None,
    precision: str,
) -> Tensor:
    """Launch `conv_weight_kernel`: (H, C, K) float32."""
    H, C, K = level.weight.shape
    N = z.shape[0]
    launch = weight_launch(C, H, x.dtype, precision, x.device)
    tiles = triton.cdiv(H, launch.depth) * triton.cdiv(C, launch.columns)
    programs = launch.programs(triton.cdiv(N, launch.rows), K * tiles, x.device)
    dw = x.new_empty(programs, K, H, C, dtype=torch.float32)
    conv_weight_kernel[(programs, K, tiles)](
        g,
        z,
        rows.counts,
        stats,
        sums,
        x,
        below[1] if below is not None else None,
        below[0].beta.contiguous() if below is not None else None,
        rows.taps.contiguous(),
        dw,
        N,
        x.stride(0),
        C=C,
        H=H,
        BELOW_ACTIVATION=ACTIVATIONS[below[0].activation.name].value if below is not None else None,
        PRECISION=precision,
        WIDEN=interpreting(),
        BT=launch.rows,
        BH=launch.depth,
        BC=launch.columns,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return dw.sum(0).permute(1, 2, 0)
