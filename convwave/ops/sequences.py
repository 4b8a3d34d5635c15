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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.graph import Padding, Rows, dilated_consumers, dilated_taps
from convwave.ops.fold import fixed_stats, folded
from convwave.ops.level import TANH, Level, track, wide
from convwave.ops.stack import normalised

_TILE = 1 << 18  # numbers of an elementwise step: 1 MB of float32, of the size of a second-level cache
_CONVOLVED = 1 << 15  # above so many numbers of a matrix, oneDNN multiplies for its gradient faster than it convolves
_PLAIN = ([0, 0], [1, 1], [1, 1])  # padding, stride, dilation of a product


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


class Kept(NamedTuple):
    """What a level's forward pass leaves for its backward pass.

    Attributes:
        below: (B, p + T, C) what it read: x, or the activations of the level below, behind what precedes them.
        deviation: (B, T, P * H) pre-activations less their mean.
        rstd, scale: (P * H,) one over the standard deviation, and that times gamma.
    """

    below: Tensor
    deviation: Tensor
    rstd: Tensor
    scale: Tensor


def _onednn(x: Tensor) -> bool:
    """Whether torch has oneDNN's operators for tensors like this one."""
    narrow = x.dtype in (torch.float32, torch.bfloat16)
    return narrow and torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def _image(rows: Tensor) -> Tensor:
    """(B, T, C) as (B, C, 1, T), an image of one line with its channels last: what oneDNN convolves without a copy."""
    return rows.unsqueeze(1).permute(0, 3, 1, 2)


def _from_image(image: Tensor) -> Tensor:
    """(B, C, 1, T) -> (B, T, C)."""
    return image.squeeze(2).transpose(1, 2)


def _apart(kernel_size: int, dilation: int) -> int:
    """The dilation that a product is called with: one tap without any would be multiplied by MKL."""
    return dilation if kernel_size > 1 else 2


def _room(like: Tensor, width: int, shift: Shift) -> tuple[Tensor, Tensor]:
    """(B, p + T, width) memory for sequences with room in front, and its last T positions; `like` is (B, T, C)."""
    B, T, _ = like.shape
    p = (shift.kernel_size - 1) * shift.within(T)
    padded = like.new_empty(B, p + T, width)
    return padded, padded[:, p:]


def _precede(padded: Tensor, inside: Tensor, shift: Shift) -> None:
    """Write what precedes sequences that are inside."""
    p = padded.shape[1] - inside.shape[1]
    if p and shift.padding == "zeros":
        padded[:, :p].zero_()
    elif p:
        padded[:, :p].copy_(inside[:, :1])


def _tap(below: Tensor, j: int, dilation: int, length: int) -> Tensor:
    """(B, T, C) what tap j reads of (B, p + T, C)."""
    return below[:, j * dilation : j * dilation + length]


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


def conv(below: Tensor, weight: Tensor, dilation: int, shift: Tensor | None = None) -> Tensor:
    """(B, T, H) convolution of (B, p + T, C) rows with a matrix (H, C, k), and a shift (H,) where given."""
    H, _, k = weight.shape
    if _onednn(below):
        return _from_image(F.conv2d(_image(below), weight.unsqueeze(2), shift, dilation=(1, _apart(k, dilation))))
    B, length = below.shape[0], below.shape[1] - (k - 1) * dilation
    z = below.new_zeros(B, length, H) if shift is None else shift.expand(B, length, H).contiguous()
    for j in range(k):
        z.baddbmm_(_tap(below, j, dilation, length), weight[:, :, j].T.expand(B, -1, -1))
    return z


def _conv_backward(
    dz: Tensor, below: Tensor, weight: Tensor, dilation: int, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `conv` for dz (B, T, H), where asked for: (B, p + T, C), (H, C, k)."""
    H, C, k = weight.shape
    B, length, _ = dz.shape
    if not _onednn(below):
        dbelow = torch.zeros_like(below) if needs_dx else None
        for j in range(k) if dbelow is not None else ():
            _tap(dbelow, j, dilation, length).baddbmm_(dz, weight[:, :, j].expand(B, -1, -1))
        dws = [dz.reshape(-1, H).T @ _tap(below, j, dilation, length).reshape(-1, C) for j in range(k * needs_dw)]
        return dbelow, torch.stack(dws, 2) if needs_dw else None
    convolved = needs_dw and weight.numel() <= _CONVOLVED
    dbelow, dweight = None, None
    if needs_dx or convolved:
        apart = [1, _apart(k, dilation)]
        dbelow, dweight, _ = torch.ops.aten.convolution_backward(
            _image(dz), _image(below), weight.unsqueeze(2), None, [1, 1], [0, 0], apart, False, [0, 0], 1,
            [needs_dx, convolved, False],
        )  # fmt: skip
    if needs_dw and not convolved:
        dweight = weight.new_empty(weight.shape)
        columns = dz.reshape(-1, H).T
        for j in range(k):
            read = _tap(below, j, dilation, length).reshape(-1, C)
            dweight[:, :, j] = torch.ops.mkldnn._linear_pointwise(columns, read.T, None, "none", [], "")
    elif dweight is not None:
        dweight = dweight.squeeze(2)
    return None if dbelow is None else _from_image(dbelow), dweight


def _activate(deviation: Tensor, scale: Tensor, level: Level, out: Tensor) -> None:
    """Scale, shift and activate (B, T, P * H) deviations into (B, T, H)."""
    beta = wide(level.beta)
    fused = level.activation is TANH and deviation.dtype == torch.float32 and _onednn(deviation)
    for y, h in _parts(deviation, out):
        if fused:  # every channel is convolved with one number
            kernel, H = scale.view(-1, 1, 1, 1), len(scale)
            y = _from_image(
                torch.ops.mkldnn._convolution_pointwise(_image(y), kernel, beta, *_PLAIN, H, "tanh", [], "")
            )
        else:
            y = level.activation.value(normalised(y, scale, beta))
        h.copy_(y)


def _normalise(z: Tensor, level: Level, shift: Shift) -> tuple[Tensor, Tensor]:
    """rstd and scale (P * H,) of pre-activations (B, T, P * H).

    z becomes its deviation from the mean; running statistics move.
    """
    if not level.of_rows:
        mean, rstd, scale, _, _ = fixed_stats(level)
        z.sub_(mean)
        return rstd, scale
    assert shift.total is not None
    counts = _counts(shift, z)
    mean = z.sum((0, 1)) if not counts else _sum(part * w for part, w in _parts(z, *counts))
    mean /= shift.total
    squares = _sum(
        part.sub_(mean).square() if not w else part.sub_(mean).square().mul_(w[0]) for part, *w in _parts(z, *counts)
    )
    var = squares / (shift.total - 1 if level.unbiased else shift.total)
    rstd = torch.rsqrt(var + level.eps)
    if level.training:
        track(level, mean, var, shift.total)
    return rstd, level.gamma * rstd


def _counts(shift: Shift, like: Tensor) -> list[Tensor]:
    """(B, T, 1) counts, as a list of one or none."""
    return [] if shift.counts is None else [shift.counts.to(like.dtype).view(*like.shape[:2], 1)]


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """(H,) sum over sequences and positions, of which torch adds up those of a part pairwise."""
    sums = [part.sum((0, 1)) for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def forward(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> tuple[Tensor, list[Kept]]:
    """`naive.stack` over sequences x (B, T, C); running statistics move.

    Returns:
        (B, T, H_L); what each level leaves for `backward`.
    """
    kept = []
    below, h = _room(x, x.shape[2], shifts[0])
    h.copy_(x)
    for i, (level, shift) in enumerate(zip(levels, shifts, strict=True)):
        _precede(below, h, shift)
        deviation = wide(conv(below, level.weight.to(x.dtype), shift.within(x.shape[1])))
        kept.append(Kept(below, deviation, *_normalise(deviation, level, shift)))
        width = deviation.shape[2] // level.activation.parts
        if i + 1 < len(levels):
            below, h = _room(x, width, shifts[i + 1])
        else:
            h = x.new_empty(*x.shape[:2], width)
        _activate(deviation, kept[i].scale, level, h)
    return h, kept


def inference(x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift]) -> Tensor:
    """`naive.stack` over sequences x (B, T, C) in evaluation mode without gradients."""
    h = x
    for level, shift in zip(levels, shifts, strict=True):
        below, inside = _room(h, h.shape[2], shift)
        inside.copy_(h)
        _precede(below, inside, shift)
        weight, beta = folded(level)
        weight, beta, dilation = weight.to(x.dtype), beta.to(x.dtype), shift.within(x.shape[1])
        if level.activation is TANH and _onednn(x):
            apart = [1, _apart(shift.kernel_size, dilation)]
            h = _from_image(
                torch.ops.mkldnn._convolution_pointwise(
                    _image(below), weight.unsqueeze(2), beta, [0, 0], [1, 1], apart, 1, "tanh", [], ""
                )
            )
        else:
            h = level.activation.value(wide(conv(below, weight, dilation, beta))).to(x.dtype)
    return h


def backward(
    dh: Tensor,
    h: Tensor,
    levels: Sequence[Level],
    kept: Sequence[Kept],
    shifts: Sequence[Shift],
    lowest: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of `forward` in closed form; the formulas are those of `stack`.

    Args:
        dh, h: (B, T, H_L) gradient and activations of the top level.
        kept: what `forward` returned.
        lowest: the lowest level of which a gradient is wanted; -1 for x.
        wanted: of which weights a gradient is wanted.

    Returns:
        dx (B, T, C) or None; dweight (P * H, C, k) or None, dgamma (P * H,) and dbeta (P * H,) of level after level.
    """
    gradients: list[Tensor | None] = []
    B, T, _ = dh.shape
    for i in reversed(range(len(levels))):
        level, shift, (below, deviation, rstd, scale) = levels[i], shifts[i], kept[i]
        g = torch.empty_like(deviation)
        sums = []
        for dy, y, da, a in _parts(g, deviation, dh, h):
            if level.activation is TANH and dh.dtype == g.dtype:
                torch.ops.aten.tanh_backward.grad_input(da, a, grad_input=dy)
            else:
                dy.copy_(level.activation.gradient(wide(da), partial(normalised, y, scale, level.beta), wide(a)))
            sums.append((dy.sum((0, 1)), (dy * y).sum((0, 1))))
        dbeta, dgamma = sums[0] if len(sums) == 1 else (torch.stack(part).sum(0) for part in zip(*sums, strict=True))
        dgamma *= rstd
        if level.of_rows:
            assert shift.total is not None
            offset = dbeta * scale / -shift.total
            slope = dgamma * scale * rstd / ((1 if level.unbiased else 0) - shift.total)
            for dy, y, *w in _parts(g, deviation, *_counts(shift, g)):
                correction = torch.addcmul(offset, y, slope)
                torch.addcmul(correction.mul_(w[0]) if w else correction, dy, scale, out=dy)
        else:
            g.mul_(scale)
        dilation = shift.within(T)
        down, dweight = _conv_backward(
            g.to(dh.dtype), below, level.weight.to(dh.dtype), dilation, i > lowest, wanted[i]
        )
        gradients = [dweight, dgamma, dbeta, *gradients]
        if down is None:
            return None, [None] * (3 * i) + gradients
        dh, p = down[:, down.shape[1] - T :], down.shape[1] - T
        if p and shift.padding == "replicate":
            dh[:, 0] += down[:, :p].sum(1)
        h = below[:, below.shape[1] - T :]
    return dh, gradients
