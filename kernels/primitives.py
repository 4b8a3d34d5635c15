"""What the kernels share: activations, BatchNorm on load, merging of statistics and of sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# rows of the statistics of a level, (5, H) float32
MEAN = tl.constexpr(0)
RSTD = tl.constexpr(1)
SCALE = tl.constexpr(2)  # rstd * gamma
VAR = tl.constexpr(3)
TOTAL = tl.constexpr(4)  # sum of the counts, the same in every channel; 0 where the running ones are taken

# rows of the sums of a level, (4, H) float32; the last two are there where the statistics are those of the rows
DBETA = tl.constexpr(0)  # sum g
DGAMMA = tl.constexpr(1)  # sum g zhat
CENTER = tl.constexpr(2)  # dbeta / n
SPREAD = tl.constexpr(3)  # dgamma rstd / (n - 1 or n)


@triton.jit
def tanh(x):
    """float32 tanh within 3 units in the last place: libdevice's does not work in the interpreter."""
    a = tl.abs(x)
    s = a * a
    near = a + a * s * (-0.33332947 + s * (0.13320725 + s * (-0.05267182 + s * 0.01643758)))
    far = 1 - 2 / (tl.exp(2 * a) + 1)
    y = tl.where(a < 0.55, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def tanh_gradient(b_da, b_y, b_a):
    """Gradient of a = tanh(y) -> gradient of y."""
    return b_da * (1 - b_a * b_a)


class Functions(NamedTuple):
    """An activation of one part as jit functions of float32 tiles, which kernels take as constants.

    Attributes:
        value: y -> a.
        gradient: (da, y, a) -> dy.
    """

    value: Any
    gradient: Any


ACTIVATIONS = {"tanh": Functions(tanh, tanh_gradient)}  # by the name that `convwave.ops.level.Activation` has


@triton.jit
def norm(b_x, stats_ptr, beta_ptr, o_c, m_c, C):
    """[B, BC] float32 pre-activations -> normalised ones."""
    b_mean = tl.load(stats_ptr + MEAN * C + o_c, mask=m_c, other=0)
    b_scale = tl.load(stats_ptr + SCALE * C + o_c, mask=m_c, other=0)
    b_beta = tl.load(beta_ptr + o_c, mask=m_c, other=0).to(tl.float32)
    return (b_x - b_mean[None, :]) * b_scale[None, :] + b_beta[None, :]


@triton.jit
def load_counts(counts_ptr, o_n, m_n):
    """[B] float32: how many windows contain each row, 1 without counts; 0 for masked rows."""
    if counts_ptr is not None:
        b_w = tl.load(counts_ptr + o_n, mask=m_n, other=0).to(tl.float32)
    else:
        b_w = tl.where(m_n, 1.0, 0.0)
    return b_w


@triton.jit
def to_tf32(b_x, BITS: tl.constexpr):
    """float32 -> the nearest TF32 (10 bits of mantissa), ties away from 0; matrix units by themselves drop bits.

    BITS: by integer arithmetic, for the interpreter, which has no inline PTX: there it is one instruction instead of 4.
    """
    if BITS:
        bits = b_x.to(tl.int32, bitcast=True)
        b_near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        b_near = tl.where(tl.abs(b_x) < float("inf"), b_near, b_x)
    else:
        convert: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        b_near = tl.inline_asm_elementwise(convert, "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1)
    return b_near


@triton.jit
def operand(b_x, STORE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """A factor of a product, rounded to what is stored or, for "tf32", to TF32; for "tf32x3" triton itself rounds."""
    b_x = b_x.to(STORE)
    if PRECISION == "tf32":
        b_x = to_tf32(b_x, WIDEN)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def merge_statistics(n, b_mean, b_m2, n_new, b_mean_new, b_m2_new):
    """Chan's update: count, means and sums of squared deviations of two sets of rows -> of both."""
    total = n + n_new
    share = tl.div_rn(n_new, tl.maximum(total, 1e-30))  # exactly 1 for the first tile
    b_delta = b_mean_new - b_mean
    return total, b_mean + b_delta * share, b_m2 + b_m2_new + b_delta * b_delta * (n * share)


@triton.jit
def is_last(counter_ptr, programs):
    """True in the last of `programs` programs to get here; the others' earlier stores are then visible."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def finish_statistics(
    partial_ptr,  # (P, 3, H): count, mean, sum of squared deviations
    stats_ptr,  # (5, H)
    gamma_ptr,  # (H,)
    o_h,
    m_h,
    H,
    P,
    eps,
    UNBIASED: tl.constexpr,
    BH: tl.constexpr,
    BP: tl.constexpr,
):
    """Merge the partial statistics of P programs, always in the same order."""
    n = tl.zeros([BH], dtype=tl.float32)
    b_sum = tl.zeros([BH], dtype=tl.float32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        p_p = partial_ptr + o_p[:, None] * (3 * H) + o_h[None, :]
        m_p = (o_p < P)[:, None] & m_h[None, :]
        b_n = tl.load(p_p, mask=m_p, other=0, cache_modifier=".cg")  # [BP, BH]
        n += tl.sum(b_n, 0)
        b_sum += tl.sum(b_n * tl.load(p_p + H, mask=m_p, other=0, cache_modifier=".cg"), 0)
    b_mean = b_sum / tl.maximum(n, 1e-30)
    b_m2 = tl.zeros([BH], dtype=tl.float32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        p_p = partial_ptr + o_p[:, None] * (3 * H) + o_h[None, :]
        m_p = (o_p < P)[:, None] & m_h[None, :]
        b_n = tl.load(p_p, mask=m_p, other=0, cache_modifier=".cg")
        b_delta = tl.load(p_p + H, mask=m_p, other=0, cache_modifier=".cg") - b_mean[None, :]
        b_m2 += tl.sum(tl.load(p_p + 2 * H, mask=m_p, other=0, cache_modifier=".cg") + b_n * b_delta * b_delta, 0)
    if UNBIASED:
        b_var = b_m2 / (n - 1)
    else:
        b_var = b_m2 / n
    b_rstd = 1 / tl.sqrt_rn(b_var + eps)
    b_gamma = tl.load(gamma_ptr + o_h, mask=m_h, other=0).to(tl.float32)
    tl.store(stats_ptr + MEAN * H + o_h, b_mean, mask=m_h)
    tl.store(stats_ptr + RSTD * H + o_h, b_rstd, mask=m_h)
    tl.store(stats_ptr + SCALE * H + o_h, b_rstd * b_gamma, mask=m_h)
    tl.store(stats_ptr + VAR * H + o_h, b_var, mask=m_h)
    tl.store(stats_ptr + TOTAL * H + o_h, n, mask=m_h)


@triton.jit
def finish_sums(
    partial_ptr,  # (P, 2, C): sum g, sum g zhat
    sums_ptr,  # (4, C), or (2, C) without TRAINING
    stats_ptr,  # (5, C)
    o_c,
    m_c,
    C,
    P,
    TRAINING: tl.constexpr,
    UNBIASED: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Add the partial sums of P programs, always in the same order."""
    b_dbeta = tl.zeros([BC], dtype=tl.float32)
    b_dgamma = tl.zeros([BC], dtype=tl.float32)
    for i_p in range(0, P, BP):
        o_p = i_p + tl.arange(0, BP)
        p_p = partial_ptr + o_p[:, None] * (2 * C) + o_c[None, :]
        m_p = (o_p < P)[:, None] & m_c[None, :]
        b_dbeta += tl.sum(tl.load(p_p, mask=m_p, other=0, cache_modifier=".cg"), 0)
        b_dgamma += tl.sum(tl.load(p_p + C, mask=m_p, other=0, cache_modifier=".cg"), 0)
    tl.store(sums_ptr + DBETA * C + o_c, b_dbeta, mask=m_c)
    tl.store(sums_ptr + DGAMMA * C + o_c, b_dgamma, mask=m_c)
    if TRAINING:
        n = tl.load(stats_ptr + TOTAL * C + o_c, mask=m_c, other=2)
        b_rstd = tl.load(stats_ptr + RSTD * C + o_c, mask=m_c, other=0)
        if UNBIASED:
            divisor = n - 1
        else:
            divisor = n
        tl.store(sums_ptr + CENTER * C + o_c, b_dbeta / n, mask=m_c)
        tl.store(sums_ptr + SPREAD * C + o_c, b_dgamma * b_rstd / divisor, mask=m_c)
