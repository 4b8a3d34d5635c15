"""What the hardware allows: bytes and FLOP counted from the shapes, ceilings measured in the same run.

Bytes are the least that any implementation has to move: every operand read once, every result written once. FLOP are
those of the products; BatchNorm and tanh are a few per element, and count as nothing. The limit of a piece of work is
the longer of the two times, and its fraction of the limit is limit over time. A fraction above 1 means that the data
stayed in a cache, whose bandwidth is not the ceiling that was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import (
    PRECISIONS,
    Row,
    Unavailable,
    Work,
    compare,
    kernel_launches,
    numeric_flags,
    statistics,
)
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Stack

QUESTION = "How close to the hardware's limit is each piece of work?"
PICTURES = (Picture("Fraction of the limit, float32", "fraction", "float32", "limit / time", "bars"),)


class Cost(NamedTuple):
    """Of one call."""

    bytes: float
    flop: float

    def fraction(self, seconds: float, bandwidth: float, rate: float) -> tuple[float, str]:
        """The least time over the time taken, at these bytes and FLOP per second, and what sets it."""
        moving, computing = self.bytes / bandwidth, self.flop / rate
        return max(moving, computing) / seconds, "set by bytes" if moving >= computing else "set by FLOP"


def level_eval(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """A level in evaluation mode: read (N, C) once and the taps' indices, write (N, H); the norm is folded in."""
    weight = taps * channels * width * itemsize
    moved = rows * (channels + width) * itemsize + taps * rows * 8 + weight
    return Cost(moved, 2.0 * rows * taps * channels * width)


def level_train(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """Forward and backward of a level in training mode: 6 rows of C where C = H.

    Forward reads the level below and writes z. Backward reads the gradient, z and the level below, and writes two
    gradients.
    """
    forward = level_eval(rows, channels, width, taps, itemsize)
    weight = 2 * taps * channels * width * itemsize
    backward = rows * (2 * width + 2 * channels) * itemsize + 2 * taps * rows * 8 + weight
    return Cost(forward.bytes + backward, 3 * forward.flop)


def kernels(rows: int, channels: int, width: int, taps: int, itemsize: int, separate: bool) -> dict[str, Cost]:
    """Least costs of the library's kernels in a training step of one level, by the names that the profiler shows.

    Backward reads the gradient in front of the tanh, z and the rows below, and writes the gradient of the rows below; a
    separate kernel for the gradients of the matrices reads the first three again.
    """
    weight, index = taps * channels * width, 2 * taps * rows * 8
    flop, operands = 2.0 * rows * weight, rows * (2 * width + channels) * itemsize
    below = Cost(operands + rows * channels * itemsize + index + weight * itemsize, flop)
    found = {
        "conv_forward_kernel": level_eval(rows, channels, width, taps, itemsize),
        "norm_activate_forward_kernel": Cost(2.0 * rows * width * itemsize, 0.0),
        "norm_activate_backward_kernel": Cost(3.0 * rows * width * itemsize, 0.0),
        "conv_backward_kernel": below if separate else Cost(below.bytes + 4.0 * weight, 2 * flop),
    }
    return found | ({"conv_weight_kernel": Cost(operands + index / 2 + 4.0 * weight, flop)} if separate else {})


def steps(plan: Plan) -> Iterator[Step]:
    for precision in plan.pick(("float32",), ("float32",), ("float32", "tf32", "bfloat16")):
        for channels in plan.pick((32,), (128, 512)):
            yield Step((precision, "channels", channels), partial(_measure, plan, channels, precision))


def _measure(plan: Plan, channels: int, precision: str, point: Row) -> list[Row]:
    batch, length = plan.pick((8, 64), (64, 512), (128, 1024))
    size, megabytes = plan.pick((256, 16), (1024, 256), (8192, 1024))
    dtype, device = PRECISIONS[precision][0], plan.device
    shape = (batch * length, channels, channels, 2, torch.finfo(dtype).bits // 8)
    source = torch.ones(megabytes * 2**18, device=device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    target, out = torch.empty_like(source), torch.empty_like(left)
    ceilings = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=out)}
    competitors = [(name, partial(Work, run, dict, expected={}, group=name)) for name, run in ceilings.items()]
    costs = {}
    train, evaluate = (Stack(batch, length, channels, 1, dtype, mode, device) for mode in (True, False))
    for mode, task, cost in (("train", train, level_train(*shape)), ("eval", evaluate, level_eval(*shape))):
        for who in ("eager", *["triton"] * plan.cuda, *["two shifted matmuls"] * (mode == "eval")):
            provider = f"level, {mode}, {who}"
            competitors.append((provider, partial(_alone, task, who if "matmul" in who else f"convwave, {who}")))
            costs[provider] = cost
    with numeric_flags(precision):
        rows = compare(competitors, {}, point, plan, memory=False)
        seconds = {row["provider"]: row["median"] for row in rows if row["metric"] == "seconds" and row["median"]}
        bandwidth, rate = 8.0 * source.numel() / seconds["copy"], 2.0 * size**3 / seconds["product"]
        rows.append(point.row("copy", "bandwidth", "B/s", median=bandwidth, note=f"{megabytes} MiB"))
        rows.append(point.row("product", "rate", "FLOP/s", median=rate, note=f"{size} x {size} x {size}"))
        found = [(provider, seconds[provider], cost) for provider, cost in costs.items() if provider in seconds]
        if plan.cuda:
            found += _kernels(point, train, shape, rows)
    for provider, taken, cost in found:
        fraction, note = cost.fraction(taken, bandwidth, rate)
        rows.append(point.row(provider, "fraction", "of limit", median=fraction, note=note))
    return rows


def _alone(task: Stack, provider: str) -> Work:
    """With an error bound of its own: the tasks differ."""
    return replace(task.make(provider), expected=task.expected(), group=f"{provider}, {task.training}")


def _kernels(
    point: Row, task: Stack, shape: tuple[int, int, int, int, int], rows: list[Row]
) -> Iterator[tuple[str, float, Cost]]:
    """The library's kernels one by one, as the profiler times them within a training step; adds their times to rows."""
    try:
        launched = kernel_launches(task.make("convwave, triton").run, 20)
    except Unavailable as reason:
        rows.append(point.absent("kernels", reason))
        return
    for name, cost in kernels(*shape, any("conv_weight_kernel" in kernel for kernel, _ in launched)).items():
        if each := [seconds for kernel, seconds in launched if name in kernel]:
            rows.append(point.row(name, "kernel_seconds", **statistics(each)))
            yield name, rows[-1]["median"], cost
        else:
            rows.append(point.absent(name, "no kernel of this name ran"))
