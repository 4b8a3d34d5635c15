"""Levels over sequences of one length on a CPU: shifted views instead of gathered rows, gradients in closed form.

The same function as `naive.stack` over `dilated_taps`, by the formulas of `stack`, with less work:

- what the taps read is joined by copying shifted views; a level keeps its input and its deviations, nothing else;
- products are oneDNN's where torch has it and where there is enough to multiply: on the AVX-512 machine that this was
  measured on (AMD EPYC) it does twice as many a second as MKL;
- tanh is oneDNN's, which applies scale and shift in the same pass, or a quotient of exponentials (`_tanh_`): 1.3 and
  2.5 units in the last place away from the true value at most, torch.tanh 0.52 in four and two times as much time
  (tests/test_sequences.py tries float32 numbers of every exponent);
- elementwise work goes part by part, so that intermediates are small.

Shapes: B sequences, T positions, N = B * T, C channels below, H channels, P parts of the activation, k taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from convwave.data.graph import Padding, Rows, dilated_consumers, dilated_taps
from convwave.ops.fold import fixed_stats, folded
from convwave.ops.level import TANH, Level, track, wide
from convwave.ops.stack import normalised

_BUILT = torch.backends.mkldnn.is_available()
_LEAST_PRODUCT = 1 << 20  # multiplications; a call of oneDNN's takes 20 us longer than one of MKL's
_LEAST_TANH = 1 << 18  # numbers
_TILE = 1 << 18  # numbers of an elementwise step: 1 MB of float32, of the size of a second-level cache


@dataclass(frozen=True)
class Shift:
    """What the rows of one level over sequences read: themselves, and k - 1 rows before them, `dilation` apart.

    Attributes:
        kernel_size, dilation: k taps, and the distance between them.
        padding: what precedes a sequence: its first row repeated, or zeros.
        counts: (N,) how often each row counts in the statistics; None means once.
        total: their sum where it is known; this module needs it.
        cu_seqlens: (B + 1,) where sequences of different lengths begin; None: all have the same.
    """

    kernel_size: int
    dilation: int = 1
    padding: Padding = "replicate"
    counts: Tensor | None = None
    total: float | None = None
    cu_seqlens: Tensor | None = None

    def rows(self, shape: Sequence[int], device: torch.device, consumers: bool = False) -> Rows:
        """The same as rows to be gathered, of sequences (B, T), or (N,) for one or those that `cu_seqlens` marks."""
        first, end = _spans(shape, self.cu_seqlens, device)
        options = (self.kernel_size, self.dilation, self.padding)
        read_by = dilated_consumers(first, end, *options) if consumers else None
        return Rows(dilated_taps(first, *options), self.counts, self.total, read_by)


def _spans(shape: Sequence[int], cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,), (N,) the row at which each row's sequence begins, and one past its last."""
    if cu_seqlens is not None:
        bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]])
        first, end = bounds.repeat_interleave(cu_seqlens.diff(), dim=1, output_size=shape[0])
        return first, end
    B, T = shape if len(shape) == 2 else (1, shape[0])
    first = (torch.arange(B, device=device) * T).repeat_interleave(T, output_size=B * T)
    return first, first + T


class Kept(NamedTuple):
    """What a level's forward pass leaves for its backward pass.

    Attributes:
        below: (B, T, C) what it read.
        deviation: (B, T, P * H) pre-activations less their mean.
        rstd, scale: (P * H,) one over the standard deviation, and that times gamma.
    """

    below: Tensor
    deviation: Tensor
    rstd: Tensor
    scale: Tensor


def _onednn(x: Tensor, work: int, least: int) -> bool:
    """Whether to call oneDNN's operators: torch has them for tensors like this one, and there is enough work."""
    narrow = x.dtype == torch.float32 or x.dtype == torch.bfloat16
    return work >= least and narrow and _BUILT and torch._C._get_mkldnn_enabled()


def _linear(x: Tensor, matrix: Tensor, shift: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(x @ matrix.T + shift)``; rows or columns of x (M, K) and matrix (N, K) are without gaps.

    oneDNN computes matrices with gaps in both too, a hundred times slower.
    """
    if _onednn(x, x.shape[0] * matrix.numel(), _LEAST_PRODUCT):
        return torch.ops.mkldnn._linear_pointwise.default(x, matrix, shift, activation, [], "")
    y = torch.mm(x, matrix.T) if shift is None else torch.addmm(shift, x, matrix.T)
    return _tanh_(y.mul_(2)) if activation == "tanh" else y


def _tanh_(twice: Tensor) -> Tensor:
    """tanh of half of a tensor, in its place: e / (e + 2) with e = exp(2 y) - 1, where torch.tanh is slower.

    In float32 it is off by at most 2.5 units in the last place; elsewhere it is torch.tanh.
    """
    if twice.dtype != torch.float32:
        return twice.div_(2).tanh_()
    e = twice.clamp_(max=40).expm1_()
    return e.div_(e + 2)


def _joined(x: Tensor, shift: Shift) -> Tensor:
    """(B * T, kC) what the taps read of x (B, T, C), oldest first, side by side."""
    (B, T, C), k = x.shape, shift.kernel_size
    joined = x.new_empty(B, T, k, C)
    for j, tap in enumerate(joined.unbind(2)):
        back = min((k - 1 - j) * shift.dilation, T)
        if not back:
            tap.copy_(x)
            continue
        tap.narrow(1, back, T - back).copy_(x.narrow(1, 0, T - back))
        before = tap.narrow(1, 0, back)
        before.copy_(x.narrow(1, 0, 1)) if shift.padding == "replicate" else before.zero_()
    return joined.view(B * T, k * C)


def _conv_backward(
    dz: Tensor, x: Tensor, weight: Tensor, shift: Shift, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the product of `_joined` rows for dz (B, T, H) where they are needed: (B, T, C), (H, C, k).

    Row t gets ``W_j.T @ dz[t + back_j]`` of every tap j: the gradients are joined once, and serve both products. What
    the first row gets for the rows that repeat it comes on top.
    """
    (B, T, H), C, k = dz.shape, x.shape[2], shift.kernel_size
    backs = [min((k - 1 - j) * shift.dilation, T) for j in range(k)]
    joined = dz.new_empty(B, T, k, H)
    for tap, back in zip(joined.unbind(2), backs, strict=True):
        tap.narrow(1, 0, T - back).copy_(dz.narrow(1, back, T - back))
        if back:
            tap.narrow(1, T - back, back).zero_()
    rows, dx, dweight = joined.view(B * T, k * H), None, None
    if needs_dw:
        dweight = _linear(rows.T, x.reshape(-1, C).T).view(k, H, C).permute(1, 2, 0)
    if needs_dx:
        dx = _linear(rows, weight.permute(2, 0, 1).reshape(k * H, C).T).view(B, T, C)
    for j, back in enumerate(backs if shift.padding == "replicate" else ()):
        if back:
            early = dz.narrow(1, 0, back).sum(1)  # (B, H)
            if dweight is not None:
                dweight.select(2, j).addmm_(early.T, x.select(1, 0))
            if dx is not None:
                dx.select(1, 0).addmm_(early, weight.select(2, j))
    return dx, dweight


def _matrix(weight: Tensor) -> Tensor:
    """(H, C, k) -> (H, kC)."""
    return weight.transpose(1, 2).flatten(1)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding parts of (B, T, ..) tensors, of at most `_TILE` numbers each; the first is the widest."""
    B, T, width = tensors[0].shape
    if B * T * width <= _TILE:
        yield tensors
        return
    rows = max(1, _TILE // width)
    sequences, positions = max(1, rows // T), min(rows, T)
    for b in range(0, B, sequences):
        for t in range(0, T, positions):
            yield tuple(tensor[b : b + sequences, t : t + positions] for tensor in tensors)


def _activated(deviation: Tensor, scale: Tensor, level: Level, dtype: torch.dtype) -> Tensor:
    """(B, T, H) of deviations (B, T, P * H): scaled, shifted and activated."""
    B, T, width = deviation.shape
    beta = wide(level.beta)
    fused = level.activation is TANH and _onednn(deviation, deviation.numel(), _LEAST_TANH)
    if fused:  # every channel is convolved with one number, in an image of one line
        image, kernel = deviation.unsqueeze(1).permute(0, 3, 1, 2), scale.view(-1, 1, 1, 1)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            image, kernel, beta, [0, 0], [1, 1], [1, 1], width, "tanh", [], ""
        )
        return y.squeeze(2).transpose(1, 2).to(dtype).contiguous()
    h = torch.empty(B, T, width // level.activation.parts, dtype=dtype, device=deviation.device)
    for part, out in _parts(deviation, h):
        if level.activation is TANH:
            y = _tanh_(torch.addcmul(beta * 2, part, scale * 2))
        else:
            y = level.activation.value(normalised(part, scale, beta))
        if out is h and y.dtype == dtype:
            return y
        out.copy_(y)
    return h


def _normalise(z: Tensor, level: Level, shift: Shift) -> tuple[Tensor, Tensor]:
    """rstd and scale (P * H,) of pre-activations (B, T, P * H).

    z becomes its deviation from the mean; running statistics move.
    """
    if not level.of_rows:
        mean, rstd, scale, _, _ = fixed_stats(level)
        z.sub_(mean)
        return rstd, scale
    assert shift.total is not None
    counts = _counts(shift, z)  # torch adds up the rows of a part pairwise
    sums = [z.sum((0, 1))] if not counts else [(part * w).sum((0, 1)) for part, w in _parts(z, *counts)]
    mean = _total(sums).div_(shift.total)
    sums = []
    for part, *w in _parts(z, *counts):
        squares = part.sub_(mean).square()
        sums.append((squares.mul_(w[0]) if w else squares).sum((0, 1)))
    squares = _total(sums)
    var = squares.div_(shift.total - 1 if level.unbiased else shift.total)
    rstd = (var + level.eps).rsqrt_()
    if level.training:
        track(level, mean, var, shift.total)
    return rstd, level.gamma * rstd


def _counts(shift: Shift, like: Tensor) -> list[Tensor]:
    """(B, T, 1) counts, as a list of one or none."""
    return [] if shift.counts is None else [shift.counts.to(like.dtype).view(*like.shape[:2], 1)]


def _total(sums: Sequence[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum(0)


def forward(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> tuple[Tensor, list[Kept]]:
    """`naive.stack` over sequences x (B, T, C); running statistics move.

    Returns:
        (B, T, H_L); what each level leaves for `backward`.
    """
    kept, h = [], x
    for level, shift in zip(levels, shifts, strict=True):
        deviation = wide(_linear(_joined(h, shift), _matrix(level.weight.to(x.dtype)))).view(*x.shape[:2], -1)
        kept.append(Kept(h, deviation, *_normalise(deviation, level, shift)))
        h = _activated(deviation, kept[-1].scale, level, x.dtype)
    return h, kept


def inference(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> Tensor:
    """`naive.stack` over sequences x (B, T, C) in evaluation mode without gradients."""
    h = x
    for level, shift in zip(levels, shifts, strict=True):
        h = _joined(h, shift)  # nothing else is held while it is multiplied
        weight, beta = folded(level)
        weight, beta = _matrix(weight.to(x.dtype)), beta.to(x.dtype)
        if level.activation is TANH:
            h = _linear(h, weight, beta, "tanh")
        else:
            h = level.activation.value(wide(_linear(h, weight, beta))).to(x.dtype)
        h = h.view(*x.shape[:2], -1)
    return h


def backward(
    dh: Tensor,
    h: Tensor,
    levels: Sequence[Level],
    kept: list[Kept],
    shifts: Sequence[Shift],
    lowest: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of `forward` in closed form; the formulas are those of `stack`.

    Args:
        dh, h: (B, T, H_L) gradient and activations of the top level.
        kept: what `forward` returned; it is emptied, so that memory is free again level by level.
        lowest: the lowest level of which a gradient is wanted; -1 for x.
        wanted: of which weights a gradient is wanted.

    Returns:
        dx (B, T, C) or None; dweight (P * H, C, k) or None, dgamma (P * H,) and dbeta (P * H,) of level after level.
    """
    gradients: list[Tensor | None] = []
    for i in reversed(range(len(levels))):
        level, shift, (below, deviation, rstd, scale) = levels[i], shifts[i], kept.pop()
        g = torch.empty_like(deviation)
        sums = []
        for dy, y, da, a in _parts(g, deviation, dh, h):
            if level.activation is TANH and dh.dtype == g.dtype:
                torch.ops.aten.tanh_backward.grad_input(da, a, grad_input=dy)
            else:
                dy.copy_(level.activation.gradient(wide(da), partial(normalised, y, scale, level.beta), wide(a)))
            sums += [dy.sum((0, 1)), (dy * y).sum((0, 1))]
        dbeta, dgamma = _total(sums[::2]), _total(sums[1::2]).mul_(rstd)
        if level.of_rows:
            assert shift.total is not None
            offset = (dbeta * scale).div_(-shift.total)
            slope = (dgamma * scale).mul_(rstd).div_((1 if level.unbiased else 0) - shift.total)
            for dy, y, *w in _parts(g, deviation, *_counts(shift, g)):
                correction = torch.addcmul(offset, y, slope)
                torch.addcmul(correction.mul_(w[0]) if w else correction, dy, scale, out=dy)
        else:
            g.mul_(scale)
        h, dtype = below, dh.dtype
        del deviation, dh, y, da, a, below
        dz = g.to(dtype)
        del g, dy
        down, dweight = _conv_backward(dz, h, level.weight.to(dtype), shift, i > lowest, wanted[i])
        gradients = [dweight, dgamma, dbeta, *gradients]
        if down is None:
            return None, [None] * (3 * i) + gradients
        dh = down
    return dh, gradients
