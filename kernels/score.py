"""Whole names in one launch: every level, the head, and log-probabilities or losses; nothing else reaches memory.

    level 0     a table of the activations of all runs of K0 tokens, computed beforehand by `conv_forward`
    level l     a[n] = activation(shift + sum_j W_j a_below[n - min((K - 1 - j) dilation, age[n])])
    head        log_softmax(bias + W a[n]), or minus its number for the target of row n

BatchNorm's running statistics are folded into W and shift. age[n] is row n's position in its name: a tap that reaches
before the name reads its first row. The definition is `convwave.ops.naive` on a dense graph. Levels above the first
have equal taps; networks of other shapes go through `stack.stack_inference`.

A program takes BT rows through all levels. It hands them on in a tile of scratch memory, the same for every level and
all its rows, so that it stays in the cache: a barrier between reading and writing, another between writing and reading.
The first `halo` of the BT rows are also the last of the tile before. They are computed again, because the others read
them, and not written. So names may have any length and begin anywhere in a tile.

Columns are padded with zeros to BH + BE, 68 to 64 + 16: 80 instead of 128. Weights are read once for BT rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .configs import Launch, by_tap, interpreting, score_launch
from .primitives import ACTIVATIONS, operand


@triton.jit
def context_rows(tokens_ptr, o_n, b_age, m_n, V: tl.constexpr, K0: tl.constexpr):
    """[BT] row of the table of the last K0 tokens at rows o_n."""
    b_row = tl.zeros_like(b_age)
    for j in tl.static_range(K0):
        o_token = o_n - tl.minimum(b_age, K0 - 1 - j)
        b_row = b_row * V + tl.load(tokens_ptr + o_token, mask=m_n, other=0).to(tl.int32)
    return b_row


@triton.jit(do_not_specialize=["N", "levels", "halo"])
def score_names_kernel(
    tokens_ptr,  # (N,)
    age_ptr,  # (N,) int32
    table_ptr,  # (V ** K0, W)
    scratch_ptr,  # (P, BT, W): a tile for each of P programs
    w_ptr,  # (levels, K, W, W)
    shift_ptr,  # (levels, W) float32
    head_ptr,  # (BV, W)
    bias_ptr,  # (BV,) float32, -inf from V on
    targets_ptr,  # (N,), or None: log-probabilities
    out_ptr,  # float32, (N, V) log-probabilities or (N,) losses
    N,
    levels,  # without the table's
    halo,
    V: tl.constexpr,
    K0: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # in the interpreter: multiply in float32 for every storage type
    BT: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,  # 0: no columns beyond BH
    BV: tl.constexpr,
):
    i_p = tl.program_id(0)
    W: tl.constexpr = BH + BE
    store: tl.constexpr = table_ptr.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_h = tl.arange(0, BH)
    o_e = BH + tl.arange(0, max(BE, 1))
    o_v = tl.arange(0, BV)
    p_tile = scratch_ptr + i_p * (BT * W)
    start = i_p.to(tl.int64) * (BT - halo) - halo  # first row of the tile, below 0 in the first one
    for _ in range(i_p, tl.cdiv(N, BT - halo), tl.num_programs(0)):
        o_n = start + o_t
        m_n = (o_n >= 0) & (o_n < N)
        b_age = tl.load(age_ptr + o_n, mask=m_n, other=0)
        dilation = K0
        for level in range(0, levels):
            b_z = tl.zeros([BT, BH], dtype=tl.float32)
            if BE > 0:
                b_ze = tl.zeros([BT, BE], dtype=tl.float32)
            for j in range(0, K):
                b_back = tl.minimum(b_age, (K - 1 - j) * dilation)
                b_table = context_rows(tokens_ptr, o_n - b_back, b_age - b_back, m_n & (level == 0), V, K0)
                # a row of the halo may reach before the tile: whatever it reads there, no row that is written reads it
                o_x = tl.maximum(o_t - b_back, 0)
                p_x = tl.where(level == 0, table_ptr + b_table * W, p_tile + o_x * W)  # [BT]
                p_w = w_ptr + (level * K + j) * (W * W)
                for i in range(0, W // BC):
                    o_c = i * BC + tl.arange(0, BC)
                    b_x = operand(tl.load(p_x[:, None] + o_c[None, :]), store, PRECISION, WIDEN)  # [BT, BC]
                    b_w = operand(tl.load(p_w + o_c[:, None] + o_h[None, :] * W), store, PRECISION, WIDEN)  # [BC, BH]
                    b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
                    if BE > 0:
                        b_w = operand(tl.load(p_w + o_c[:, None] + o_e[None, :] * W), store, PRECISION, WIDEN)
                        b_ze = tl.dot(b_x, b_w, b_ze, input_precision=PRECISION)
            p_out = p_tile + o_t[:, None] * W
            p_shift = shift_ptr + level * W
            b_z = ACTIVATION(b_z + tl.load(p_shift + o_h)[None, :])
            tl.debug_barrier()  # every thread has read
            tl.store(p_out + o_h[None, :], b_z.to(store))
            if BE > 0:
                b_ze = ACTIVATION(b_ze + tl.load(p_shift + o_e)[None, :])
                tl.store(p_out + o_e[None, :], b_ze.to(store))
            tl.debug_barrier()  # every thread has written
            dilation *= K
        b_table = context_rows(tokens_ptr, o_n, b_age, m_n & (levels == 0), V, K0)
        p_x = tl.where(levels == 0, table_ptr + b_table * W, p_tile + o_t * W)
        b_y = tl.zeros([BT, BV], dtype=tl.float32)
        for i in range(0, W // BC):
            o_c = i * BC + tl.arange(0, BC)
            b_x = operand(tl.load(p_x[:, None] + o_c[None, :]), store, PRECISION, WIDEN)
            b_w = operand(tl.load(head_ptr + o_c[:, None] + o_v[None, :] * W), store, PRECISION, WIDEN)  # [BC, BV]
            b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
        b_y += tl.load(bias_ptr + o_v)[None, :]
        b_max = tl.max(b_y, 1)
        b_log = tl.log(tl.sum(tl.exp(b_y - b_max[:, None]), 1))
        m_n &= o_t >= halo
        if targets_ptr is not None:
            b_target = tl.load(targets_ptr + o_n, mask=m_n, other=0)
            b_hit = tl.sum(tl.where(o_v[None, :] == b_target[:, None], b_y, 0.0), 1)
            tl.store(out_ptr + o_n, (b_max - b_hit) + b_log, mask=m_n)
        else:
            b_y = (b_y - b_max[:, None]) - b_log[:, None]
            p_y = (out_ptr + o_n * V)[:, None] + o_v[None, :]
            tl.store(p_y, b_y, mask=m_n[:, None] & (o_v < V)[None, :])
        start += tl.num_programs(0) * (BT - halo)


def score_names(
    tokens: Tensor,
    age: Tensor,
    table: Tensor,
    weights: Sequence[Tensor],
    shifts: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    factors: Sequence[int],
    activation: str,
    precision: str,
    longest: int | None = None,
    targets: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Launch `score_names_kernel`. What it can take is checked by `convwave.ops.library.why_not_score_names`.

    Args:
        tokens: (N,) int64 or int32, each below V.
        age: (N,) int32 position of each row in its name.
        table: (V ** factors[0], H_1) activations of level 0, in the order of their tokens, the oldest counting most.
        weights, shifts: (H, C, K) and (H,) of each level above it, BatchNorm folded in.
        head_weight, head_bias: (V, H_L), (V,).
        factors: taps of every level; level l has dilation ``prod(factors[:l])``.
        activation: of the levels above the first.
        precision: of float32 products, resolved.
        longest: positions of the longest name, where known.
        targets: (N,) int64 or int32.
        launch: overrides `score_launch`.

    Returns:
        float32, (N, V) log-probabilities, or with targets (N,) minus those of the targets.
    """
    N, V = tokens.numel(), head_bias.numel()
    width = max(table.shape[1], *(shift.numel() for shift in shifts), 1)
    launch = launch or score_launch(width, table.dtype, precision, table.device)
    extra = 0 if width <= launch.columns else max(16, triton.next_power_of_2(width - launch.columns))
    W, BV = launch.columns + extra, max(16, triton.next_power_of_2(V))
    halo = min(math.prod(factors), longest or N, N) - 1
    programs = launch.programs(triton.cdiv(N, launch.rows - halo), 1, table.device)
    table = F.pad(table, (0, W - table.shape[1]))
    taps = [F.pad(by_tap(w, table.dtype), (0, W - w.shape[1], 0, W - w.shape[0])) for w in weights]
    shift = [F.pad(s.float(), (0, W - s.numel())) for s in shifts]
    out = torch.empty((N, V) if targets is None else (N,), dtype=torch.float32, device=table.device)
    score_names_kernel[(programs,)](
        tokens.contiguous(),
        age.contiguous(),
        table,
        table.new_empty(programs, launch.rows, W),
        torch.cat(taps) if taps else table,
        torch.cat(shift) if shift else table,
        F.pad(head_weight.to(table.dtype), (0, W - head_weight.shape[1], 0, BV - V)),
        F.pad(head_bias.float(), (0, BV - V), value=-math.inf),
        None if targets is None else targets.contiguous(),
        out,
        N,
        len(weights),
        halo,
        V=V,
        K0=factors[0],
        K=factors[-1],
        ACTIVATION=ACTIVATIONS[activation].value,
        PRECISION=precision,
        WIDEN=interpreting(),
        BT=launch.rows,
        BC=launch.depth,
        BH=launch.columns,
        BE=extra,
        BV=BV,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out
