"""Compiled loops for a CPU: the closed form of a training step, exact statistics and losses, in float32.

numba compiles them, once on every machine, into files beside this one or in its cache folder. Matrix products are
SciPy's BLAS, called from inside the loops. All loops lie in one file because numba compiles anew only where the file of
the called function has changed. The module needs numba, SciPy and threadpoolctl: ``pip install 'convwave[fast]'``.

Shapes: L levels of two taps, N rows of a level, R rows that a tap can read, C channels below, H channels, E channels of
the embedding, V tokens. `M` is the most rows that a buffer holds, of any level.

A level computes, with W_j the matrix of tap j, t_j its rows below, w the rows' counts, n their sum, m the divisor of
the variance, and c_j[r] the sum of w over the rows that read row r by tap j::

    P_j = x W_j                                            products first, gathered afterwards
    mean = (sum_r c_0 P_0 + sum_r c_1 P_1) / n             which equals sum w z / n
    z = P_0[t_0] + P_1[t_1] - mean,   var = sum w z^2 / m
    h = tanh(beta + s z),             s = gamma r,   r = (var + eps) ** -0.5

and backward, with dh the gradient of h::

    g = dh (1 - h^2),       dbeta = sum g,       dgamma = r sum g z
    dz = s (g - w (dbeta / n + z dgamma r / m))
    Q_j[i] = sum of dz / s over the rows that read row i by tap j
    dW_j = (x^T Q_j) s,     dx = sum_j Q_j (W_j s)^T
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import get_cython_function_address, intrinsic
from numpy.typing import NDArray

BLOCK = 256  # rows of the top level that are finished at a time: 70 KB of 68 channels
CHUNK = 64  # rows that are summed by themselves first: a sum's error grows with N / CHUNK + CHUNK, not with N

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]

# A product and a sum may be rounded once, and sums may be split over the lanes of a vector, but not inside `_exact`.
_COMPILER = {"error_model": "numpy", "nogil": True}
_exact = numba.njit(**_COMPILER, fastmath={"contract"})
_inner = numba.njit(**_COMPILER, fastmath={"contract", "nsz", "reassoc"})
_entry = numba.njit(**_COMPILER, fastmath={"contract", "nsz", "reassoc"}, cache=True)


class Network(NamedTuple):
    """Parameters, or their gradients, or the running means of those.

    Attributes:
        embedding: (V, E).
        norms: (L, 2, H) gamma and beta of every level.
        head: (V, H).
        bias: (V,) of the head.
        first: (2, E, H) matrices of level 0, the older tap first.
        rest: (L - 1, 2, H, H) of the levels above.
    """

    embedding: Floats
    norms: Floats
    head: Floats
    bias: Floats
    first: Floats
    rest: Floats


class Part(NamedTuple):
    """What a step reads of a graph, in arrays that are larger than it; `rows` says how much of them is used.

    Attributes:
        rows: (L + 1,) int64, rows of every level, and the number of targets.
        taps: (L, 2, M) what each row reads, counted from the first row of the tap's range.
        ranges: (L, 2, 2) int64, the first row below that a tap reads, and one past the last; at level 0 of tokens.
        weights: (L, M) counts of the rows.
        totals: (L,) their sums.
        target_rows, target_ids, target_counts: which top row predicts which token, and how often; in any order.
    """

    rows: NDArray[np.int64]
    taps: Ints
    ranges: NDArray[np.int64]
    weights: Floats
    totals: Doubles
    target_rows: Ints
    target_ids: Ints
    target_counts: Floats


class Work(NamedTuple):
    """Memory that is overwritten in every step.

    Attributes:
        z, h: (L, M, H) deviations and activations; the top level's activations are not kept.
        dh: (2, M, H) gradients, of odd and even levels in turn.
        products: (2, M, H), of each tap.
    """

    z: Floats
    h: Floats
    dh: Floats
    products: Floats


def _fortran(name: str) -> Callable[[Any], None]:
    """A BLAS routine as a function of one tuple: addresses are passed, those of an array's numbers or of a copy.

    Whole numbers are passed as int64: on a little-endian machine that is right for BLAS of 32 and of 64 bits.
    """
    symbol = f"convwave_{name}"
    llvmlite.binding.add_symbol(symbol, get_cython_function_address("scipy.linalg.cython_blas", name))

    @intrinsic
    def call(context: Any, arguments: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, values: Any) -> Any:
            byte = ir.IntType(8).as_pointer()
            addresses = []
            for i, kind in enumerate(signature.args[0].types):
                value = builder.extract_value(values[0], i)
                if isinstance(kind, types.Array):
                    address = target.make_array(kind)(target, builder, value).data
                else:
                    address = cgutils.alloca_once_value(builder, value)
                addresses.append(builder.bitcast(address, byte))
            kind = ir.FunctionType(ir.VoidType(), [byte] * len(addresses))
            builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol), addresses)

        return types.void(arguments), generate

    return call


_sgemm = _fortran("sgemm")
_PLAIN, _TRANSPOSED = np.int8(ord("N")), np.int8(ord("T"))


@_inner
def product(a: Floats, a_transposed: bool, b: Floats, b_transposed: bool, beta: float, out: Floats) -> None:
    """``out = a b + beta out`` for matrices whose rows are contiguous. BLAS reads them as transposed."""
    size = np.int64(a.itemsize)
    _sgemm(
        (
            _TRANSPOSED if b_transposed else _PLAIN,
            _TRANSPOSED if a_transposed else _PLAIN,
            np.int64(out.shape[1]),
            np.int64(out.shape[0]),
            np.int64(a.shape[0] if a_transposed else a.shape[1]),
            np.float32(1),
            b,
            b.strides[0] // size,
            a,
            a.strides[0] // size,
            np.float32(beta),
            out,
            out.strides[0] // size,
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Functions of one number

# x P(x^2) / Q(x^2) nearest to tanh(x) in relative error, 2^-25.4, on 0 to 9.01, by iterated weighted least squares in
# float64; coefficients were rounded one after the other, each followed by another fit of the rest. All are positive, so
# that nothing cancels: rounding adds 11 units of 2^-24 at most (8 for two polynomials of 4 multiply-adds, 1 for the
# product with x, 1 for the quotient, 1/2 for x^2); measured on every float32, the error is 5.1 units.
_TANH_END = np.float32(9.01)  # from here on tanh(x) is 1 in float32
_P1, _P2, _P3, _P4 = (np.float32(c) for c in (0.13383327, 0.0034982606, 2.0650958e-5, 1.3408862e-8))
_Q1, _Q2, _Q3, _Q4 = (np.float32(c) for c in (0.4671665, 0.0258873012, 0.000328991213, 7.79955428e-7))
_ONE = np.float32(1)


@_exact
def tanh(x: np.float32) -> np.float32:
    """tanh of a float32 within 6 units of 2^-24, relative; x itself near 0, exactly 1 from 9.01 on, NaN of NaN."""
    x = -_TANH_END if x < -_TANH_END else x
    x = _TANH_END if x > _TANH_END else x
    y = x * x
    p = _ONE + y * (_P1 + y * (_P2 + y * (_P3 + y * _P4)))
    q = _ONE + y * (_Q1 + y * (_Q2 + y * (_Q3 + y * _Q4)))
    t = x * p / q
    t = -_ONE if t < -_ONE else t
    return _ONE if t > _ONE else t


_LOWEST = np.float32(-87)  # e^-87 is a normal number
_PER_LN2 = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # the first has 9 bits: k times it is exact
_E2, _E3, _E4, _E5, _E6, _E7 = (np.float32(1 / d) for d in (2, 6, 24, 120, 720, 5040))
_HALF = np.float32(0.5)


@_exact
def exp_of_negative(x: np.float32) -> np.float32:
    """e^x of a float32 x <= 0 within 4 units of 2^-24, relative; e^-87 below -87, NaN of NaN.

    ``x = k ln 2 + f`` with ``|f| <= 0.35``, where Taylor's next term, f^8 / 40320, is below 2^-26 of e^f.
    """
    x = _LOWEST if x < _LOWEST else x
    k = np.floor(x * _PER_LN2 + _HALF)
    f = x - k * _LN2_HIGH - k * _LN2_LOW
    e = _ONE + f * (_ONE + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * (_E6 + f * _E7))))))
    return e * np.int32((np.int32(k) + 127) << 23).view(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# A level


@_inner
def _add_rows(counts: Doubles, p: Floats, out: Floats) -> None:
    """``out += sum_r counts[r] p[r]``, (H,)."""
    rows, width = p.shape
    part = np.empty(width, np.float32)
    for start in range(0, rows, CHUNK):
        part[:] = 0
        for r in range(start, min(start + CHUNK, rows)):
            c = np.float32(counts[r])
            for h in range(width):
                part[h] += c * p[r, h]
        for h in range(width):
            out[h] += part[h]


@_inner
def _gather(p: Floats, taps: Ints, weights: Floats, mean: Floats, z: Floats, squares: Floats) -> None:
    """``z = p_0[t_0] + p_1[t_1] - mean`` (n, H), and ``squares += sum weights z^2``, for at most CHUNK rows."""
    rows, width = z.shape
    older, newer = p[0], p[1]
    part = np.zeros(width, np.float32)
    for n in range(rows):
        i, j, w = taps[0, n], taps[1, n], weights[n]
        for h in range(width):
            v = older[i, h] + newer[j, h] - mean[h]
            z[n, h] = v
            part[h] += w * v * v
    for h in range(width):
        squares[h] += part[h]


@_inner
def _normalise(
    x: Floats, matrices: Floats, part: Part, level: int, products: Floats, z: Floats, mean: Floats, var: Floats
) -> None:
    """Deviations, mean and unbiased variance of a level.

    Args:
        x: activations below.
        matrices: (2, C, H).
        products: (2, M, H) to be written.
        z: (N, H) to be written, or (CHUNK, H) where it need not be kept.
        mean, var: (H,) to be written.
    """
    rows, total = part.rows[level], part.totals[level]
    width = mean.size
    weights = part.weights[level]
    counts = np.empty(products.shape[1])
    mean[:] = 0
    var[:] = 0
    for j in range(2):
        begin, end = part.ranges[level, j]
        p, c = products[j, : end - begin], counts[: end - begin]
        product(x[begin:end], False, matrices[j], False, 0, p)
        c[:] = 0
        for n in range(rows):
            c[part.taps[level, j, n]] += weights[n]
        _add_rows(c, p, mean)
    for h in range(width):
        mean[h] /= np.float32(total)
    for start in range(0, rows, CHUNK):
        stop = min(start + CHUNK, rows)
        kept = z[start:stop] if z.shape[0] >= rows else z[: stop - start]
        _gather(products, part.taps[level, :, start:stop], weights[start:stop], mean, kept, var)
    for h in range(width):
        var[h] /= np.float32(total - 1)


@_inner
def _scales(norm: Floats, var: Floats, eps: float, rstd: Floats, scale: Floats) -> None:
    """``rstd = (var + eps) ** -0.5`` and ``scale = gamma rstd``, (H,)."""
    for h in range(var.size):
        rstd[h] = _ONE / np.sqrt(var[h] + np.float32(eps))
        scale[h] = norm[0, h] * rstd[h]


@_inner
def _activate(z: Floats, shift: Floats, scale: Floats, h: Floats) -> None:
    """``h = tanh(shift + scale z)``, (n, H)."""
    rows, width = z.shape
    for n in range(rows):
        for c in range(width):
            h[n, c] = tanh(shift[c] + scale[c] * z[n, c])


@_inner
def _before_tanh(dh: Floats, h: Floats, z: Floats, dbeta: Floats, dgamma: Floats) -> None:
    """``dh *= 1 - h^2`` (n, H), and its sums: ``dbeta += sum dh``, ``dgamma += sum dh z``."""
    rows, width = h.shape
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    for start in range(0, rows, CHUNK):
        first[:] = 0
        second[:] = 0
        for n in range(start, min(start + CHUNK, rows)):
            for c in range(width):
                g = dh[n, c] * (_ONE - h[n, c] * h[n, c])
                dh[n, c] = g
                first[c] += g
                second[c] += g * z[n, c]
        for c in range(width):
            dbeta[c] += first[c]
            dgamma[c] += second[c]


@_inner
def _scatter(g: Floats, z: Floats, weights: Floats, taps: Ints, a: Floats, b: Floats, q: Floats) -> None:
    """Add ``g - weights (a + b z)`` of every row (N, H) to the rows of q (2, R, H) that it reads."""
    rows, width = g.shape
    older, newer = q[0], q[1]
    for n in range(rows):
        i, j, w = taps[0, n], taps[1, n], weights[n]
        for h in range(width):
            v = g[n, h] - w * (a[h] + b[h] * z[n, h])
            older[i, h] += v
            newer[j, h] += v


# ---------------------------------------------------------------------------------------------------------------------
# The head


@_inner
def _logits(h: Floats, head: Floats, bias: Floats, out: Floats, highest: Floats) -> None:
    """Logits (V, n) of activations (n, H), and the highest of each column, (n,)."""
    columns = h.shape[0]
    product(head, False, h, True, 0, out[:, :columns])
    highest[:columns] = -np.inf
    for v in range(out.shape[0]):
        for n in range(columns):
            x = out[v, n] + bias[v]
            out[v, n] = x
            highest[n] = max(highest[n], x)


@_inner
def _exponentials(logits: Floats, columns: int, highest: Floats, sums: Floats) -> None:
    """``logits = e^(logits - highest)`` (V, n), and their sums, (n,)."""
    sums[:columns] = 0
    for v in range(logits.shape[0]):
        for n in range(columns):
            e = exp_of_negative(logits[v, n] - highest[n])
            logits[v, n] = e
            sums[n] += e


@_inner
def _top(net: Network, grad: Network, part: Part, z: Floats, scale: Floats, dh: Floats, dgamma: Floats) -> float:
    """The loss, the gradients of the head, and of the top level before its tanh, in blocks that stay in the cache.

    Args:
        z: (N, H) deviations.
        scale: (H,).
        dh: (N, H) to be written: the gradients before the tanh.
        dgamma: (H,) to be written: sum of those times z; the sum of those themselves goes to `grad`.
    """
    levels, _, width = net.norms.shape
    tokens, rows, targets = net.bias.size, part.rows[levels - 1], part.rows[levels]
    weights, total = part.weights[levels - 1], part.totals[levels - 1]
    dbeta = grad.norms[levels - 1, 1]
    h = np.empty((BLOCK, width), np.float32)
    logits = np.empty((tokens, BLOCK), np.float32)
    highest, sums = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    per_total = np.float32(1 / total)
    loss, next_target = 0.0, 0
    grad.bias[:] = 0
    dbeta[:] = 0
    dgamma[:] = 0
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        count = stop - start
        _activate(z[start:stop], net.norms[levels - 1, 1], scale, h[:count])
        _logits(h[:count], net.head, net.bias, logits, highest)
        last_target = next_target
        while last_target < targets and part.target_rows[last_target] < stop:
            n = part.target_rows[last_target] - start
            loss += part.target_counts[last_target] * (highest[n] - logits[part.target_ids[last_target], n])
            last_target += 1
        _exponentials(logits, count, highest, sums)
        for n in range(count):
            loss += weights[start + n] * np.log(sums[n])
            sums[n] = weights[start + n] * per_total / sums[n]
        for v in range(tokens):
            for n in range(count):
                logits[v, n] *= sums[n]
        for k in range(next_target, last_target):
            logits[part.target_ids[k], part.target_rows[k] - start] -= part.target_counts[k] * per_total
        next_target = last_target
        for v in range(tokens):
            grad.bias[v] += np.sum(logits[v, :count])
        dlogits = logits[:, :count]
        product(dlogits, False, h[:count], False, 0 if start == 0 else 1, grad.head)
        product(dlogits, True, net.head, False, 0, dh[start:stop])
        _before_tanh(dh[start:stop], h[:count], z[start:stop], dbeta, dgamma)
    return loss / total


# ---------------------------------------------------------------------------------------------------------------------
# A step


@_inner
def _below(net: Network, work: Work, level: int) -> tuple[Floats, Floats]:
    """The activations below a level, and its matrices (2, C, H)."""
    if level == 0:
        return net.embedding, net.first
    return work.h[level - 1], net.rest[level - 1]


@_entry
def gradients(net: Network, grad: Network, part: Part, work: Work, eps: float) -> float:
    """The loss of a part, in nats; its gradients are written to `grad`."""
    levels, _, width = net.norms.shape
    mean, var = np.empty(width, np.float32), np.empty(width, np.float32)
    rstd, scale = np.empty((levels, width), np.float32), np.empty((levels, width), np.float32)
    for level in range(levels):
        x, matrices = _below(net, work, level)
        z = work.z[level, : part.rows[level]]
        _normalise(x, matrices, part, level, work.products, z, mean, var)
        _scales(net.norms[level], var, eps, rstd[level], scale[level])
        if level < levels - 1:
            _activate(z, net.norms[level, 1], scale[level], work.h[level])

    dgamma, by_mean, by_var = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    back = np.empty((width, max(width, net.embedding.shape[1])), np.float32)
    loss = 0.0
    for level in range(levels - 1, -1, -1):
        x, matrices = _below(net, work, level)
        rows, total, s = part.rows[level], part.totals[level], scale[level]
        z, g, dbeta = work.z[level, :rows], work.dh[level % 2, :rows], grad.norms[level, 1]
        if level == levels - 1:
            loss = _top(net, grad, part, z, s, g, dgamma)
        else:
            dbeta[:] = 0
            dgamma[:] = 0
            _before_tanh(g, work.h[level, :rows], z, dbeta, dgamma)
        for h in range(width):
            dgamma[h] *= rstd[level, h]
            grad.norms[level, 0, h] = dgamma[h]
            by_mean[h] = dbeta[h] / np.float32(total)
            by_var[h] = dgamma[h] * rstd[level, h] / np.float32(total - 1)
        for j in range(2):
            work.products[j, : part.ranges[level, j, 1] - part.ranges[level, j, 0]] = 0
        _scatter(g, z, part.weights[level], part.taps[level], by_mean, by_var, work.products)

        dmatrices = grad.first if level == 0 else grad.rest[level - 1]
        dx = grad.embedding if level == 0 else work.dh[(level - 1) % 2, : part.rows[level - 1]]
        channels = x.shape[1]
        dx[:] = 0
        for j in range(2):
            begin, end = part.ranges[level, j]
            q = work.products[j, : end - begin]
            product(x[begin:end], True, q, False, 0, dmatrices[j])
            for c in range(channels):
                for h in range(width):
                    dmatrices[j, c, h] *= s[h]
                    back[h, c] = matrices[j, c, h] * s[h]
            product(q, False, back[:, :channels], False, 1, dx[begin:end])
    return loss


@_inner
def orthogonalize(x: Floats, y: Floats, grams: Floats, steps: int) -> Floats:
    """`optim.orthogonalize` of x (K, H), which is overwritten; the result is x or y.

    Args:
        y: (K, H), overwritten.
        grams: (2, n, n) with n = min(K, H), overwritten.
    """
    a, b, c = np.float32(3.4445), np.float32(-4.7750), np.float32(2.0315)
    wide = x.shape[0] < x.shape[1]
    gram, polynomial = grams[0], grams[1]
    square = 0.0
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            square += x[i, j] * x[i, j]
    shrink = np.float32(1 / (np.sqrt(square) + 1e-7))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] *= shrink
    for _ in range(steps):
        product(x, not wide, x, wide, 0, gram)
        product(gram, False, gram, False, 0, polynomial)
        for i in range(gram.shape[0]):
            for j in range(gram.shape[1]):
                polynomial[i, j] = c * polynomial[i, j] + b * gram[i, j]
            polynomial[i, i] += a
        if wide:
            product(polynomial, False, x, False, 0, y)
        else:
            product(x, False, polynomial, False, 0, y)
        x, y = y, x
    return x


class Muon(NamedTuple):
    """Numbers of Muon, see `optim.Muon`."""

    lr: float
    momentum: float
    weight_decay: float
    orthogonal_steps: int


class Adam(NamedTuple):
    """Numbers of AdamW: `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    step: int


@_inner
def _muon(w: Floats, g: Floats, m: Floats, muon: Muon, scratch: Floats) -> None:
    """One step of Muon for a matrix (K, H), whose weight is (H, K).

    Args:
        g, m: its gradient and momentum.
        scratch: (4, size) with size at least that of the matrix, overwritten.
    """
    rows, width = w.shape
    size, least = rows * width, min(rows, width)
    x, y = scratch[0, :size].reshape(rows, width), scratch[1, :size].reshape(rows, width)
    grams = np.empty((2, least, least), np.float32)
    for i in range(rows):
        for h in range(width):
            m[i, h] += np.float32(1 - muon.momentum) * (g[i, h] - m[i, h])
            x[i, h] = g[i, h] + np.float32(muon.momentum) * (m[i, h] - g[i, h])
    update = orthogonalize(x, y, grams, muon.orthogonal_steps)
    keep = np.float32(1 - muon.lr * muon.weight_decay)
    rate = np.float32(muon.lr * np.sqrt(max(1.0, width / rows)))
    for i in range(rows):
        for h in range(width):
            w[i, h] = keep * w[i, h] - rate * update[i, h]


@_inner
def _adam(p: Floats, g: Floats, mean: Floats, square: Floats, adam: Adam) -> None:
    """One step of AdamW for a vector of parameters."""
    keep = np.float32(1 - adam.lr * adam.weight_decay)
    rate = np.float32(adam.lr / (1 - adam.beta1**adam.step))
    root = np.float32(1 / np.sqrt(1 - adam.beta2**adam.step))
    for i in range(p.size):
        mean[i] += np.float32(1 - adam.beta1) * (g[i] - mean[i])
        square[i] = np.float32(adam.beta2) * square[i] + np.float32(1 - adam.beta2) * g[i] * g[i]
        p[i] = keep * p[i] - rate * mean[i] / (np.sqrt(square[i]) * root + np.float32(adam.eps))


@_entry
def update(
    net: Network, grad: Network, momenta: Network, muon: Muon, adam: Adam, vectors: Floats, scratch: Floats
) -> None:
    """Muon on the matrices, AdamW on all else.

    Args:
        vectors: (4, n) parameters, gradients, Adam's mean and mean square of all that is no matrix.
        scratch: (2, n) with n numbers at least that of a level's matrices, overwritten.
    """
    width = net.norms.shape[2]
    rows = net.first.shape[0] * net.first.shape[1]
    _muon(
        net.first.reshape(rows, width),
        grad.first.reshape(rows, width),
        momenta.first.reshape(rows, width),
        muon,
        scratch,
    )
    for i in range(net.rest.shape[0]):
        _muon(
            net.rest[i].reshape(2 * width, width),
            grad.rest[i].reshape(2 * width, width),
            momenta.rest[i].reshape(2 * width, width),
            muon,
            scratch,
        )
    _adam(vectors[0], vectors[1], vectors[2], vectors[3], adam)


# ---------------------------------------------------------------------------------------------------------------------
# What a step reads


class Text(NamedTuple):
    """The distinct graph of a whole text, and memory for cutting parts out of it. `M` is the most rows of a level.

    Attributes:
        taps: (L, M, 2) rows below; at level 0 tokens.
        begins: (N_L + 1,) where the targets of each top row begin, and their number.
        targets: (T, 2) a token and how often it follows, in the order of the top rows.
        kept: (L, M) rows of each level that a part has, in its order.
        local: (L, M) the number in the part of each row that it has.
        marks: (L, 8 * ceil(M / 8)) uint8, 0 between two parts.
    """

    taps: Ints
    begins: Ints
    targets: Ints
    kept: Ints
    local: Ints
    marks: NDArray[np.uint8]


@_inner
def _marked(marks: NDArray[np.uint8], kept: Ints, places: NDArray[np.int64]) -> None:
    """Write the rows with mark c, ascending, to `kept` from ``places[c]`` on, which moves on; unmark all."""
    words = marks.view(np.uint64)
    for i in range(words.size):
        if words[i]:
            for row in range(8 * i, 8 * i + 8):
                mark = marks[row]
                if mark:
                    kept[places[mark]] = row
                    places[mark] += 1
            words[i] = 0


@_inner
def _read_taps(text: Text, part: Part, level: int) -> None:
    """The rows below, by their numbers in the text, that the kept rows of a level read."""
    for n in range(part.rows[level]):
        for j in range(2):
            part.taps[level, j, n] = text.taps[level, text.kept[level, n], j]


@_inner
def _cut(text: Text, part: Part) -> None:
    """All of a part that follows from the rows, weights and total of its top level.

    The rows of a level that only the older tap reads come first, then those that both read, then the rest: so each tap
    reads one range.
    """
    places = np.empty(4, np.int64)
    for level in range(part.totals.size - 1, 0, -1):
        _read_taps(text, part, level)
        rows, older, newer = part.rows[level], part.taps[level, 0], part.taps[level, 1]
        kept, local, marks = text.kept[level - 1], text.local[level - 1], text.marks[level - 1]
        only_older = both = only_newer = 0
        for n in range(rows):
            only_older += marks[older[n]] == 0
            marks[older[n]] = 1
        for n in range(rows):
            only_newer += marks[newer[n]] == 0
            both += marks[newer[n]] == 1
            marks[newer[n]] |= 2
        only_older -= both
        below = only_older + both + only_newer
        places[1], places[3], places[2] = 0, only_older, only_older + both
        _marked(marks, kept, places)
        weights = np.zeros(below)
        for n in range(below):
            local[kept[n]] = n
        for n in range(rows):
            older[n], newer[n] = local[older[n]], local[newer[n]]
            weights[older[n]] += part.weights[level, n]
            weights[newer[n]] += part.weights[level, n]
            newer[n] -= only_older
        for n in range(below):
            part.weights[level - 1, n] = weights[n]
        part.ranges[level, 0] = 0, only_older + both
        part.ranges[level, 1] = only_older, below
        part.rows[level - 1] = below
        part.totals[level - 1] = 2 * part.totals[level]
    _read_taps(text, part, 0)


@_inner
def _take(text: Text, part: Part, targets: int, scale: float) -> int:
    """Append the targets of the last top row, times `scale`, and weigh the row by them; returns their number so far."""
    top = part.totals.size - 1
    n = part.rows[top] - 1
    row = text.kept[top, n]
    windows = 0
    for k in range(text.begins[row], text.begins[row + 1]):
        part.target_rows[targets] = n
        part.target_ids[targets] = text.targets[k, 0]
        part.target_counts[targets] = text.targets[k, 1] * np.float32(scale)
        windows += text.targets[k, 1]
        targets += 1
    part.weights[top, n] = windows * np.float32(scale)
    part.totals[top] += part.weights[top, n]
    return targets


@_entry
def take_contexts(text: Text, part: Part, positions: Doubles, probabilities: Doubles, steps: int) -> None:
    """The part of a step of `batches.ContextSampler`: the contexts whose position, moved on by `steps` times their
    probability, has just passed a whole number; each weighs 1 / p.
    """
    top = part.totals.size - 1
    marks, kept = text.marks[top], text.kept[top]
    for row in range(positions.size):
        position = positions[row] + probabilities[row] * steps
        marks[row] = position - np.floor(position) < probabilities[row]
    places = np.zeros(2, np.int64)
    _marked(marks, kept, places)
    part.totals[top] = 0
    targets = 0
    for n in range(places[1]):
        part.rows[top] = n + 1
        targets = _take(text, part, targets, 1 / probabilities[kept[n]])
    part.rows[top + 1] = targets
    _cut(text, part)


@_entry
def take_names(
    text: Text, part: Part, rows: Ints, targets: Ints, starts: NDArray[np.int64], names: NDArray[np.int64]
) -> None:
    """The part that whole names need, each position counted once.

    Args:
        rows: (P,) the top row of every position of the packed text.
        targets: (P,) what it predicts.
        starts: (B + 1,) where each name begins.
        names: (n,) the names.
    """
    top = part.totals.size - 1
    marks, kept, local, weights = text.marks[top], text.kept[top], text.local[top], part.weights[top]
    for name in names:
        for position in range(starts[name], starts[name + 1]):
            marks[rows[position]] = 1
    places = np.zeros(2, np.int64)
    _marked(marks, kept, places)
    number = places[1]
    for n in range(number):
        local[kept[n]] = n
        weights[n] = 0
    for name in names:
        for position in range(starts[name], starts[name + 1]):
            weights[local[rows[position]]] += 1
    begins = np.empty(number, np.int64)
    total = 0
    for n in range(number):
        begins[n] = total
        total += int(weights[n])
    for name in names:
        for position in range(starts[name], starts[name + 1]):
            n = local[rows[position]]
            k = begins[n]
            begins[n] += 1
            part.target_rows[k] = n
            part.target_ids[k] = targets[position]
            part.target_counts[k] = 1
    part.rows[top], part.rows[top + 1], part.totals[top] = number, total, total
    _cut(text, part)


@_entry
def take_everything(text: Text, part: Part) -> None:
    """The whole text as a part."""
    top = part.totals.size - 1
    part.totals[top] = 0
    targets = 0
    for row in range(text.begins.size - 1):
        text.kept[top, row] = row
        part.rows[top] = row + 1
        targets = _take(text, part, targets, 1.0)
    part.rows[top + 1] = targets
    _cut(text, part)


# ---------------------------------------------------------------------------------------------------------------------
# A trained network


@_entry
def statistics(
    net: Network, part: Part, products: Floats, h: Floats, eps: float, means: Floats, variances: Floats
) -> None:
    """Mean and unbiased variance of every level over a part, in training mode.

    Args:
        products: (2, M, H) overwritten.
        h: (2, M', H) overwritten, with M' the most rows below the top level, CHUNK at least.
        means, variances: (L, H) to be written.
    """
    levels, _, width = net.norms.shape
    rstd, scale = np.empty(width, np.float32), np.empty(width, np.float32)
    x, matrices = net.embedding, net.first
    for level in range(levels):
        rows = part.rows[level]
        top = level == levels - 1
        z = h[level % 2, : CHUNK if top else rows]
        _normalise(x, matrices, part, level, products, z, means[level], variances[level])
        if not top:
            _scales(net.norms[level], variances[level], eps, rstd, scale)
            _activate(z, net.norms[level, 1], scale, z)
            x, matrices = z, net.rest[level]


@_inner
def _activate_sums(products: Floats, taps: Ints, h: Floats) -> None:
    """``h = tanh(products_0[t_0] + products_1[t_1])``, (n, H)."""
    rows, width = h.shape
    older, newer = products[0], products[1]
    for n in range(rows):
        i, j = taps[0, n], taps[1, n]
        for c in range(width):
            h[n, c] = tanh(older[i, c] + newer[j, c])


@_entry
def losses(net: Network, part: Part, products: Floats, h: Floats, out: Floats) -> None:
    """The negative log-likelihood of every target of a part, (T,), in evaluation mode.

    Args:
        net: with BatchNorm's scale in its matrices and its shift in beta.
        products: (2, M, H) overwritten.
        h: (2, M', H) overwritten, with M' the most rows below the top level, BLOCK at least.
    """
    levels = net.norms.shape[0]
    logits = np.empty((net.bias.size, BLOCK), np.float32)
    highest, sums = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    x, matrices, k = net.embedding, net.first, 0
    for level in range(levels):
        rows = part.rows[level]
        for j in range(2):
            begin, end = part.ranges[level, j]
            p = products[j, : end - begin]
            product(x[begin:end], False, matrices[j], False, 0, p)
            if j == 0:
                for n in range(end - begin):
                    for c in range(p.shape[1]):
                        p[n, c] += net.norms[level, 1, c]
        here = h[level % 2]
        if level < levels - 1:
            _activate_sums(products, part.taps[level, :, :rows], here[:rows])
            x, matrices = here, net.rest[level]
            continue
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            count = stop - start
            _activate_sums(products, part.taps[level, :, start:stop], here[:count])
            _logits(here[:count], net.head, net.bias, logits, highest)
            first = k
            while k < out.size and part.target_rows[k] < stop:
                n = part.target_rows[k] - start
                out[k] = highest[n] - logits[part.target_ids[k], n]
                k += 1
            _exponentials(logits, count, highest, sums)
            for n in range(count):
                sums[n] = np.log(sums[n])
            for target in range(first, k):
                out[target] += sums[part.target_rows[target] - start]
