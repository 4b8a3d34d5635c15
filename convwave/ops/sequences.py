"""Levels over sequences of one length on a CPU: shifted views instead of gathered rows, gradients in closed form.

The same function as `naive.stack` over `dilated_taps`, and the formulas of `stack`, with less memory traffic:

- what precedes a sequence is written in front of it once, so that a level is one convolution over a view;
- products are oneDNN's where torch has it: on AVX-512 machines that are not Intel's, twice as fast as MKL's;
- oneDNN's operators also apply scale, shift and tanh in one pass. Its tanh is off by at most 1.3 units in the last
  place (every float32 was tried, tests/test_sequences.py), torch's by 0.52, which takes 4 times as long;
- elementwise work goes tile by tile, so that intermediates are small and stay in the cache.

Shapes: B sequences, T positions, N = B * T, C channels below, H channels, P parts of the activation, k taps, and
p = (k - 1) * dilation rows in front of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.graph import Padding, Rows, dilated_consumers, dilated_taps
from convwave.ops.fold import fixed_stats, folded
from convwave.ops.level import TANH, Level, Stats, wide
from convwave.ops.stack import counted, normalised

_TILE = 1 << 18  # numbers of an elementwise step: 1 MB of float32, of the size of a second-level cache
_CONVOLVED = 1 << 15  # above so many numbers of a matrix, oneDNN multiplies for its gradient faster than it convolves
_NO_STRIDE = ([0, 0], [1, 1], [1, 1])  # padding, stride, dilation of a product


@dataclass(frozen=True)
class Shift:
    """What the rows of one level over sequences read: themselves, and k - 1 rows before them, `dilation` apart.

    Attributes:
        kernel_size, dilation: k taps, and the distance between them.
        padding: what precedes a sequence: its first row repeated, or zeros.
        counts: (N,) how often each row counts in the statistics; None means once.
        total: their sum where it is known.
        cu_seqlens: (B + 1,) where sequences of different lengths begin; None: all have the same.
    """

    kernel_size: int
    dilation: int = 1
    padding: Padding = "replicate"
    counts: Tensor | None = None
    total: float | None = None
    cu_seqlens: Tensor | None = None

    def within(self, length: int) -> int:
        """The dilation; no longer than the sequences, beyond which all that a tap reads is padding."""
        return min(self.dilation, length)

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


class Tape(NamedTuple):
    """What `forward` leaves for `backward`.

    Attributes:
        below: per level, (B, p + T, C) what it read: x, or the activations of the level below, behind their padding.
        deviation: per level, (N, P * H) pre-activations less their mean.
        stats: per level, (5, P * H), see `level.Stats`.
        h: (B, T, H_L) activations of the top level.
    """

    below: list[Tensor]
    deviation: list[Tensor]
    stats: list[Tensor]
    h: Tensor


def _onednn(x: Tensor) -> bool:
    """Whether torch has oneDNN's operators for tensors like this one."""
    narrow = x.dtype in (torch.float32, torch.bfloat16)
    return narrow and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _image(rows: Tensor) -> Tensor:
    """(B, T, C) as (B, C, 1, T), an image of one line with its channels last: what oneDNN convolves without a copy."""
    return rows.unsqueeze(1).permute(0, 3, 1, 2)


def _from_image(image: Tensor) -> Tensor:
    """(B, C, 1, T) -> (B * T, C)."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _tap(below: Tensor, j: int, dilation: int, length: int) -> Tensor:
    """(B, T, C) what tap j reads of (B, p + T, C)."""
    return below[:, j * dilation : j * dilation + length]


def _memory(like: Tensor, width: int, shift: Shift) -> tuple[Tensor, Tensor]:
    """(B, p + T, width) for sequences with room in front, and its last T positions; `like` is (B, T, C)."""
    B, T, _ = like.shape
    p = (shift.kernel_size - 1) * shift.within(T)
    padded = like.new_empty(B, p + T, width)
    return padded, padded[:, p:]


def _pad(padded: Tensor, length: int, shift: Shift) -> None:
    """Write the rows in front of sequences that are there."""
    p = padded.shape[1] - length
    padded[:, :p] = padded[:, p : p + 1] if shift.padding == "replicate" else 0


def conv(below: Tensor, weight: Tensor, dilation: int, shift: Tensor | None = None) -> Tensor:
    """(N, H) convolution of (B, p + T, C) rows with a matrix (H, C, k), and a shift (H,) where given."""
    H, _, k = weight.shape
    if _onednn(below):  # a dilation keeps torch from multiplying one tap with MKL
        apart = dilation if k > 1 else 2
        return _from_image(F.conv2d(_image(below), weight.unsqueeze(2), shift, dilation=(1, apart)))
    B, length = below.shape[0], below.shape[1] - (k - 1) * dilation
    z = below.new_zeros(B, length, H) if shift is None else shift.expand(B, length, H).contiguous()
    for j in range(k):
        z.baddbmm_(_tap(below, j, dilation, length), weight[:, :, j].T.expand(B, -1, -1))
    return z.view(-1, H)


def _conv_backward(
    dz: Tensor, below: Tensor, weight: Tensor, dilation: int, needs_dx: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `conv` for dz (N, H): (B, p + T, C) where asked for, and (H, C, k)."""
    H, C, k = weight.shape
    B, length = below.shape[0], below.shape[1] - (k - 1) * dilation
    fast = _onednn(below)
    convolved = fast and weight.numel() <= _CONVOLVED
    dbelow, dweight = None, None
    if fast and (needs_dx or convolved):
        found = torch.ops.aten.convolution_backward(
            _image(dz.view(B, length, H)), _image(below), weight.unsqueeze(2), None,
            [1, 1], [0, 0], [1, dilation if k > 1 else 2], False, [0, 0], 1, [needs_dx, convolved, False],
        )  # fmt: skip
        dbelow = _from_image(found[0]).view(below.shape) if needs_dx else None
        dweight = found[1].squeeze(2) if convolved else None
    if dweight is None:
        dweights = []
        for j in range(k):
            read = _tap(below, j, dilation, length).reshape(-1, C)
            dweights.append(product(dz.T, read))
        dweight = torch.stack(dweights, 2)
    if needs_dx and dbelow is None:
        dbelow = torch.zeros_like(below)
        for j in range(k):
            _tap(dbelow, j, dilation, length).baddbmm_(dz.view(B, length, H), weight[:, :, j].expand(B, -1, -1))
    return dbelow, dweight


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) @ (K, N), by oneDNN where torch has it."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "") if _onednn(a) else a @ b


def _tiles(B: int, T: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of (B, T, width) numbers of at most `_TILE`: sequences, positions, and the rows of (B * T, width)."""
    rows = max(1, _TILE // max(width, 1))
    if rows >= T:
        for b in range(0, B, rows // T):
            stop = min(B, b + rows // T)
            yield slice(b, stop), slice(0, T), slice(b * T, stop * T)
        return
    for b in range(B):
        for t in range(0, T, rows):
            stop = min(T, t + rows)
            yield slice(b, b + 1), slice(t, stop), slice(b * T + t, b * T + stop)


def _activate(deviation: Tensor, scale: Tensor, level: Level, shift: Tensor, out: Tensor) -> None:
    """Scale, shift and activate (N, P * H) rows into (B, T, H)."""
    B, T, H = out.shape
    fused = level.activation is TANH and deviation.dtype == torch.float32 and _onednn(deviation)
    for b, t, rows in _tiles(B, T, deviation.shape[1]):
        if fused:  # every channel is convolved with one number
            image, kernel = _image(deviation[rows].unsqueeze(0)), scale.view(-1, 1, 1, 1)
            y = torch.ops.mkldnn._convolution_pointwise(image, kernel, shift, *_NO_STRIDE, H, "tanh", [], "")
            out[b, t] = _from_image(y).view(out[b, t].shape)
        else:
            y = normalised(deviation[rows], scale, shift)
            out[b, t] = level.activation.value(y).view(out[b, t].shape)


def _row_stats(z: Tensor, level: Level, shift: Shift) -> Tensor:
    """Statistics (5, P * H) of rows (N, P * H); z becomes its own deviation from the mean."""
    w = counted(shift.counts, z)
    total: Tensor | float = float(z.shape[0]) if shift.total is None else shift.total
    if w is not None and shift.total is None:
        total = w.sum()
    mean = z.mean(0) if w is None else (w * z).sum(0) / total
    squares = torch.zeros_like(mean)
    for _, _, rows in _tiles(1, *z.shape):
        deviation = z[rows].sub_(mean)
        square = deviation.square()
        squares += (square if w is None else square.mul_(w[rows])).sum(0)
    var = squares / (total - 1 if level.unbiased else total)
    rstd = torch.rsqrt(var + level.eps)
    sums = total.expand_as(var) if isinstance(total, Tensor) else torch.full_like(var, total)
    return torch.stack([mean, rstd, level.gamma * rstd, var, sums])


def forward(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> Tape:
    """`naive.stack` over sequences x (B, T, C), with what its backward pass needs."""
    B, T, _ = x.shape
    tape = Tape([], [], [], x)
    below, h = _memory(x, x.shape[2], shifts[0])
    h.copy_(x)
    for i, (level, shift) in enumerate(zip(levels, shifts, strict=True)):
        _pad(below, T, shift)
        z = conv(below, level.weight.to(x.dtype), shift.within(T))
        deviation = wide(z)
        if level.of_rows:
            stats = _row_stats(deviation, level, shift)
        else:
            stats = fixed_stats(level)
            deviation.sub_(stats[0])
        tape.below.append(below)
        width = z.shape[1] // level.activation.parts
        below, h = _memory(x, width, shifts[i + 1]) if i + 1 < len(levels) else (x, x.new_empty(B, T, width))
        _activate(deviation, stats[2], level, wide(level.beta), h)
        tape.deviation.append(deviation)
        tape.stats.append(stats)
    return tape._replace(h=h)


def inference(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> Tensor:
    """`naive.stack` over sequences x (B, T, C) in evaluation mode without gradients."""
    B, T, _ = x.shape
    h = x
    for level, shift in zip(levels, shifts, strict=True):
        below, inside = _memory(h, h.shape[2], shift)
        inside.copy_(h)
        _pad(below, T, shift)
        weight, beta = folded(level)
        h = x.new_empty(B, T, weight.shape[0] // level.activation.parts)
        if level.activation is TANH and _onednn(x):
            apart = shift.within(T) if shift.kernel_size > 1 else 2
            y = torch.ops.mkldnn._convolution_pointwise(
                _image(below),
                weight.to(x.dtype).unsqueeze(2),
                beta.to(x.dtype),
                [0, 0],
                [1, 1],
                [1, apart],
                1,
                "tanh",
                [],
                "",
            )
            h = _from_image(y).view(B, T, -1)
        else:
            z = conv(below, weight.to(x.dtype), shift.within(T), beta.to(x.dtype))
            h = level.activation.value(wide(z)).to(x.dtype).view(B, T, -1)
    return h


def backward(
    dh: Tensor,
    x_dtype: torch.dtype,
    levels: Sequence[Level],
    tape: Tape,
    shifts: Sequence[Shift],
    needs_dx: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `forward` in closed form; the formulas are those of `stack`.

    Args:
        dh: (B, T, H_L).
        tape: what `forward` returned.
        needs_dx: whether the gradient of x is wanted.

    Returns:
        dx (B, T, C) or None; per level dweight (P * H, C, k), dgamma (P * H,), dbeta (P * H,).
    """
    dweights: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    B, T, _ = dh.shape
    for i in reversed(range(len(levels))):
        level, shift, deviation, s = levels[i], shifts[i], tape.deviation[i], Stats(*tape.stats[i])
        h = tape.h if i + 1 == len(levels) else tape.below[i + 1][:, -T:]
        g = torch.empty_like(deviation)
        dbeta, dgamma = torch.zeros_like(s.mean), torch.zeros_like(s.mean)
        tiles = list(_tiles(B, T, g.shape[1]))
        for b, t, rows in tiles:
            y = partial(normalised, deviation[rows], s.scale, level.beta)
            da, a = (wide(part[b, t]).reshape(-1, h.shape[2]) for part in (dh, h))
            g[rows] = level.activation.gradient(da, y, a)
            dbeta += g[rows].sum(0)
            dgamma += (g[rows] * deviation[rows]).sum(0)
        dgamma *= s.rstd
        w = counted(shift.counts, g)
        total = s.total if shift.total is None else shift.total
        divisor = total - 1 if level.unbiased else total
        offset, slope = s.scale * dbeta / -total, s.scale * s.rstd * dgamma / -divisor
        for _, _, rows in tiles:
            if not level.of_rows:
                g[rows].mul_(s.scale)
                continue
            correction = torch.addcmul(offset, deviation[rows], slope)
            torch.addcmul(correction if w is None else correction.mul_(w[rows]), g[rows], s.scale, out=g[rows])
        below = tape.below[i]
        down, dweight = _conv_backward(
            g.to(x_dtype), below, level.weight.to(x_dtype), shift.within(T), i > 0 or needs_dx
        )
        if down is not None:
            p = below.shape[1] - T
            dh = down[:, p:]
            if shift.padding == "replicate" and p:
                dh[:, 0] += down[:, :p].sum(1)
        dweights.insert(0, dweight)
        dgammas.insert(0, dgamma)
        dbetas.insert(0, dbeta)
    return (dh if needs_dx else None), dweights, dgammas, dbetas
