"""What the hardware allows: bytes and FLOP counted from the shapes, ceilings measured in the same run.

Bytes are the least that any implementation has to move: every operand read once, every result written once. FLOP are
those of the products; BatchNorm and tanh are a few per element, and count as nothing. The limit of a piece of work is
the longer of the two times, and its fraction of the limit is limit over time. A fraction above 1 means that the data
stayed in a cache, whose bandwidth is not the ceiling that was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """Of one call."""

    bytes: float
    flop: float

    def limit(self, bandwidth: float, rate: float) -> float:
        """The least seconds that it can take at so many bytes and FLOP per second."""
        return max(self.bytes / bandwidth, self.flop / rate)


def product(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """Convolution of gathered rows: read (N, C) once and the taps' indices, write (N, H)."""
    weight = taps * channels * width * itemsize
    moved = rows * (channels + width) * itemsize + taps * rows * 8 + weight
    return Cost(moved, 2.0 * rows * taps * channels * width)


def norm_tanh(rows: int, width: int, itemsize: int) -> Cost:
    """BatchNorm and tanh: read (N, H), write (N, H)."""
    return Cost(2.0 * rows * width * itemsize, 0.0)


def product_backward(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """Data and weight gradient: read (N, H) and (N, C), write (N, C) and the weights."""
    weight = 2 * taps * channels * width * itemsize
    moved = rows * (width + 2 * channels) * itemsize + 2 * taps * rows * 8 + weight
    return Cost(moved, 4.0 * rows * taps * channels * width)


def level_eval(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """A whole level in evaluation mode: its norm is folded into the product, its tanh needs no pass of its own."""
    return product(rows, channels, width, taps, itemsize)


def level_train(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """Forward and backward of a level in training mode.

    Forward reads the level below and writes z. Backward reads the gradient, z and the level below, and writes two
    gradients. That is 6 rows of C where C = H.
    """
    forward = product(rows, channels, width, taps, itemsize)
    backward = product_backward(rows, channels, width, taps, itemsize)
    return Cost(forward.bytes + backward.bytes + rows * width * itemsize, forward.flop + backward.flop)


def kernels(rows: int, channels: int, width: int, taps: int, itemsize: int, separate: bool) -> dict[str, Cost]:
    """Least costs of the library's kernels in a training step of one level, by the names that the profiler shows.

    Backward reads the gradient in front of the tanh, z and the rows below, and writes the gradient of the rows below; a
    separate kernel for the gradients of the matrices reads the first three again.
    """
    weight = taps * channels * width
    index = 2 * taps * rows * 8
    flop = 2.0 * rows * weight
    operands = rows * (2 * width + channels) * itemsize
    rows_below = Cost(operands + rows * channels * itemsize + index + weight * itemsize, flop)
    matrices = Cost(operands + index / 2 + 4.0 * weight, flop)
    fused = Cost(rows_below.bytes + 4.0 * weight, 2 * flop)
    return {
        "conv_forward_kernel": product(rows, channels, width, taps, itemsize),
        "norm_tanh_forward_kernel": norm_tanh(rows, width, itemsize),
        "norm_tanh_backward_kernel": Cost(3.0 * rows * width * itemsize, 0.0),
        "conv_backward_kernel": rows_below if separate else fused,
        **({"conv_weight_kernel": matrices} if separate else {}),
    }


def copy_work(device: str, megabytes: int) -> tuple[Callable[[], object], float]:
    """A copy too large for any cache, and the bytes that it moves."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * source.element_size()


def product_work(device: str, size: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square matrix product, and its FLOP."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), 2.0 * size**3
