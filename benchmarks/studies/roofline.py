"""What the hardware allows: bytes and FLOP counted from the shapes, ceilings measured in the same run.

Bytes are the least that any implementation has to move: every operand read once, every result written once. FLOP are
those of the products; BatchNorm and tanh are a few per element, and count as nothing. The limit of a piece of work is
the longer of the two times, and its fraction of the limit is limit over time. A fraction above 1 means that the data
stayed in a cache, whose bandwidth is not the ceiling that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import harness
from benchmarks.harness import Competitor, Row, Unavailable, Work, compare, numeric_flags
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Stack


class Cost(NamedTuple):
    """Of one call."""

    bytes: float
    flop: float

    def limit(self, bandwidth: float, rate: float) -> float:
        """The least seconds that it can take at these bytes and FLOP per second."""
        return max(self.bytes / bandwidth, self.flop / rate)


def level_eval(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """A level in evaluation mode: read (N, C) once and the taps' indices, write (N, H); the norm is folded in."""
    weight = taps * channels * width * itemsize
    moved = rows * (channels + width) * itemsize + taps * rows * 8 + weight
    return Cost(moved, 2.0 * rows * taps * channels * width)


def level_train(rows: int, channels: int, width: int, taps: int, itemsize: int) -> Cost:
    """Forward and backward of a level in training mode.

    Forward reads the level below and writes z. Backward reads the gradient, z and the level below, and writes two
    gradients. That is 6 rows of C where C = H.
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
    weight = taps * channels * width
    index = 2 * taps * rows * 8
    flop = 2.0 * rows * weight
    operands = rows * (2 * width + channels) * itemsize
    rows_below = Cost(operands + rows * channels * itemsize + index + weight * itemsize, flop)
    fused = Cost(rows_below.bytes + 4.0 * weight, 2 * flop)
    return {
        "conv_forward_kernel": level_eval(rows, channels, width, taps, itemsize),
        "norm_activate_forward_kernel": Cost(2.0 * rows * width * itemsize, 0.0),
        "norm_activate_backward_kernel": Cost(3.0 * rows * width * itemsize, 0.0),
        "conv_backward_kernel": rows_below if separate else fused,
        **({"conv_weight_kernel": Cost(operands + index / 2 + 4.0 * weight, flop)} if separate else {}),
    }


def steps(plan: Plan) -> Iterator[Step]:
    for precision in ("float32", "tf32", "bfloat16") if plan.cuda else ("float32",):
        for channels in (32,) if plan.quick else (128, 512):
            yield Step((precision, "channels", channels), _measure, (plan, channels, precision))


def _measure(plan: Plan, channels: int, precision: str, point: Row) -> list[Row]:
    batch, length = (128, 1024) if plan.cuda else (8, 64) if plan.quick else (64, 512)
    size, megabytes = (8192, 1024) if plan.cuda else (256, 16) if plan.quick else (1024, 256)
    with numeric_flags(precision) as dtype:
        shape = (batch * length, channels, channels, 2, torch.finfo(dtype).bits // 8)
        source = torch.ones(megabytes * 2**18, device=plan.device)
        left, right = (torch.randn(size, size, device=plan.device).to(dtype) for _ in range(2))
        target, out = torch.empty_like(source), torch.empty_like(left)
        train, evaluate = (Stack(batch, length, channels, 1, dtype, mode, plan.device) for mode in (True, False))
        items: list[tuple[Competitor, Cost, Stack]] = []
        for backend in ("eager", "triton") if plan.cuda else ("eager",):
            items.append((train.convwave(f"level, train, {backend}", backend), level_train(*shape), train))
            items.append((evaluate.convwave(f"level, eval, {backend}", backend), level_eval(*shape), evaluate))
        items.append((evaluate.matmul("level, eval, two shifted matmuls"), level_eval(*shape), evaluate))
        work = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=out)}
        ceilings = [Competitor(name, partial(Work, run, dict), expected={}, group=name) for name, run in work.items()]
        competitors = [replace(c, expected=task.expected(), group=c.provider) for c, _, task in items]
        rows = compare([*ceilings, *competitors], {}, point, plan, memory=False)
        seconds = {row.provider: row.median for row in rows if row.metric == "seconds" and row.median}
        bandwidth, rate = 8.0 * source.numel() / seconds["copy"], 2.0 * size**3 / seconds["product"]
        rows.append(point.row("copy", "bandwidth", "B/s", median=bandwidth, note=f"{megabytes} MiB"))
        rows.append(point.row("product", "rate", "FLOP/s", median=rate, note=f"{size} x {size} x {size}"))
        limits = partial(_limits, point, bandwidth, rate)
        for competitor, cost, _ in items:
            if competitor.provider in seconds:
                rows += limits(competitor.provider, seconds[competitor.provider], cost)
        return rows + (_kernel_limits(point, train, limits, shape) if plan.cuda else [])


def _limits(
    point: Row, bandwidth: float, rate: float, provider: str, seconds: float, cost: Cost, note: str = ""
) -> list[Row]:
    limit = cost.limit(bandwidth, rate)
    by = "set by " + ("bytes" if cost.bytes / bandwidth >= cost.flop / rate else "FLOP")
    return [
        point.row(provider, "bytes", "B", median=cost.bytes, note="counted"),
        point.row(provider, "flop", "FLOP", median=cost.flop, note="counted"),
        point.row(provider, "limit_seconds", "s", median=limit, note=by),
        point.row(provider, "fraction", "of limit", median=limit / seconds, note=note or by),
    ]


def _kernel_limits(
    point: Row, task: Stack, limits: Callable[..., list[Row]], shape: tuple[int, int, int, int, int]
) -> list[Row]:
    """The library's kernels one by one, as the profiler times them within a training step."""
    try:
        launched = harness.kernel_launches(task.convwave("triton", "triton").make().run, 20)
    except Unavailable as reason:
        return [point.absent("kernels", reason)]
    rows = []
    separate = any("conv_weight_kernel" in kernel for kernel, _ in launched)
    for name, cost in kernels(*shape, separate).items():
        launches = [seconds for kernel, seconds in launched if name in kernel]
        if not launches:
            rows.append(point.absent(name, "no kernel of this name ran"))
            continue
        row = point.row(name, "kernel_seconds", "s", **harness.statistics(launches))
        rows += [row, *limits(name, float(row.median or 0), cost, "one launch")]
    return rows


QUESTION = "How close to the hardware's limit is each piece of work?"
PICTURES = (Picture("Fraction of the limit, float32", "fraction", "float32", "limit / time", "bars"),)
