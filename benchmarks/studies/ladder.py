"""What each idea of the kernels is worth: the same levels, with one idea more at every step. Only a GPU can tell.

Forward, in training mode:

    unfused             gather and product in a kernel; statistics by PyTorch; BatchNorm and tanh in a kernel
    statistics fused    the product's kernel takes the statistics from registers
    prologue fused      BatchNorm and tanh happen while the next level loads: activations are never written

Evaluation: BatchNorm and tanh in a kernel of their own, or on the way out of the product's. Backward: the gradients of
the matrices in a pass of their own, or in the one that computes those of the rows. Last, the product's kernel with
other tiles than `convwave.kernels.configs` chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

import convwave as cw
from benchmarks.harness import Competitor, Point, Results, Row, Work, compare, numeric_flags
from benchmarks.studies import Picture, Plan, Step, Study
from benchmarks.tasks import Stack, need
from convwave.data.graph import Rows
from convwave.ops.level import Level

Rungs = tuple[list[Competitor], Results]


class Operands(NamedTuple):
    """A stack as the kernels take it."""

    x: Tensor
    gradient: Tensor
    levels: list[Level]
    rows: list[Rows]


def operands(task: Stack, training: bool = True) -> Operands:
    blocks = [(block.conv.weight.detach(), block.norm) for block in task.model(task.dtype).layers]
    levels = [
        Level(w, n.weight.detach(), n.bias.detach(), n.running_mean, n.running_var, n.eps, n.momentum, training, False)
        for w, n in blocks
    ]
    rows = [Rows(taps, consumers=c) for taps, c in zip(task.graph.taps, task.graph.consumers, strict=True)]
    return Operands(*(t.view(task.positions, -1) for t in (task.x, task.gradient)), levels, rows)


def plain(task: Stack, dtype: torch.dtype, training: bool = True) -> tuple[cw.ConvWave, Tensor, Callable[[], Tensor]]:
    """The network in plain PyTorch, its input, and a forward pass."""
    model = task.model(dtype).train(training)
    x = task.x.to(dtype).view(task.positions, -1)
    return model, x, lambda: model.features(x, task.graph)


def _rungs(
    task: Stack, pytorch: Callable[[torch.dtype], Callable[[], Results]], kernels: Mapping[str, Callable[[], Results]]
) -> Rungs:
    def make(run: Callable[[], Results]) -> Work:
        need("triton")
        inference = torch.no_grad()(run)
        return Work(inference, inference)

    def make_plain() -> Work:
        run = pytorch(task.dtype)
        return Work(run, run)

    competitors = [Competitor(name, functools.partial(make, run), task.dtype) for name, run in kernels.items()]
    return [Competitor("PyTorch", make_plain, task.dtype), *competitors], pytorch(torch.float64)()


def _forward_only(task: Stack, training: bool) -> Callable[[torch.dtype], Callable[[], Results]]:
    def pytorch(dtype: torch.dtype) -> Callable[[], Results]:
        run = torch.no_grad()(plain(task, dtype, training)[2])
        return lambda: {"h": run()}

    return pytorch


def forward(task: Stack) -> Rungs:
    """Rungs of the forward pass in training mode, and the activations in float64."""
    x, _, levels, rows = operands(task)

    def unfused() -> Results:
        from convwave.kernels.activate import norm_activate_forward
        from convwave.kernels.forward import conv_forward

        h = x
        for level, its in zip(levels, rows, strict=True):
            z, _ = conv_forward(h, level._replace(training=False), its, precision=_precision(task))
            var, mean = torch.var_mean(z.float(), 0, correction=0)
            rstd = torch.rsqrt(var + level.eps)
            total = torch.full_like(var, z.shape[0])
            h = norm_activate_forward(z, level, torch.stack([mean, rstd, rstd * level.gamma.float(), var, total]))
        return {"h": h}

    def statistics_fused() -> Results:
        from convwave.kernels.activate import norm_activate_forward
        from convwave.kernels.forward import conv_forward

        h = x
        for level, its in zip(levels, rows, strict=True):
            h = norm_activate_forward(*_regrouped(level, conv_forward(h, level, its, precision=_precision(task))))
        return {"h": h}

    def prologue_fused() -> Results:
        from convwave.kernels.stack import stack_forward

        return {"h": stack_forward(x, levels, rows)[0]}

    named = {"unfused": unfused, "statistics fused": statistics_fused, "prologue fused": prologue_fused}
    return _rungs(task, _forward_only(task, True), named)


def _regrouped(level: Level, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Level, Tensor]:
    return found[0], level, found[1]


def evaluation(task: Stack) -> Rungs:
    """Rungs of the forward pass in evaluation mode, and the activations in float64."""
    x, _, levels, rows = operands(task, training=False)

    def unfused() -> Results:
        from convwave.kernels.activate import norm_activate_forward
        from convwave.kernels.forward import conv_forward

        h = x
        for level, its in zip(levels, rows, strict=True):
            h = norm_activate_forward(*_regrouped(level, conv_forward(h, level, its, precision=_precision(task))))
        return {"h": h}

    def fused() -> Results:
        from convwave.kernels.stack import stack_inference

        return {"h": stack_inference(x, levels, rows)}

    return _rungs(task, _forward_only(task, False), {"unfused": unfused, "BatchNorm and tanh on store": fused})


def backward(task: Stack) -> Rungs:
    """Rungs of the backward pass, and the gradients in float64."""
    x, gradient, levels, rows = operands(task)

    @functools.cache
    def kept() -> tuple[list[Tensor], list[Tensor]]:
        from convwave.kernels.stack import stack_forward

        return stack_forward(x, levels, rows)[1:]

    def separate() -> Results:
        from convwave.kernels.activate import norm_activate_backward
        from convwave.kernels.backward import conv_backward
        from convwave.kernels.configs import backward_launch

        zs, stats = kept()
        last = len(levels) - 1
        g, sums = norm_activate_backward(gradient, zs[last], levels[last], stats[last])
        dweights: list[Tensor] = []
        for i in range(last, -1, -1):
            H, C, K = levels[i].weight.shape
            launch = backward_launch(C, H, K, x.dtype, _precision(task), x.device)
            result = conv_backward(
                *(g, zs[i], levels[i], stats[i], sums, zs[i - 1] if i else x, rows[i]),
                below=(levels[i - 1], stats[i - 1]) if i else None,
                precision=_precision(task),
                launch=replace(launch, fused=False),
            )
            dweights.insert(0, result.dweight)
            g, sums = result.dx, result.sums
        return _gradients(g, *dweights)

    def fused() -> Results:
        from convwave.kernels.stack import stack_backward

        dx, dweights, *_ = stack_backward(gradient, x, levels, *kept(), rows)
        return _gradients(dx, *dweights)

    def pytorch(dtype: torch.dtype) -> Callable[[], Results]:
        model, leaf, run = plain(task, dtype)
        h, g = (leaf.requires_grad_(), run())[1], gradient.to(dtype)
        wanted = [leaf, *(block.conv.weight for block in model.layers)]
        return lambda: _gradients(*torch.autograd.grad(h, wanted, g, retain_graph=True))

    named = {"gradients of the matrices in a pass of their own": separate, "in the same pass": fused}
    return _rungs(task, pytorch, named)


def _gradients(dx: Tensor, *dweights: Tensor) -> Results:
    return {"x": dx, **{f"level {i}": dw for i, dw in enumerate(dweights)}}


def tiles(task: Stack) -> Rungs:
    """One level, forward in training mode, by tiles of other sizes; the first kernel is the one that is chosen."""
    x, _, (level,), (rows,) = operands(task)

    def pytorch(dtype: torch.dtype) -> Callable[[], Results]:
        _, h, _ = plain(task, dtype)
        weight = level.weight.to(dtype)

        def run() -> Results:
            z = sum((h[tap] @ weight[:, :, j].T for j, tap in enumerate(rows.taps)), torch.zeros((), dtype=dtype))
            return {"z": z, "var": z.to(torch.promote_types(dtype, torch.float32)).var(0, correction=0)}

        return run

    def with_launch(launch: object) -> Results:
        from convwave.kernels.forward import conv_forward

        z, stats = conv_forward(x, level, rows, precision=_precision(task), launch=launch)
        return {"z": z, "var": stats[3]}

    named: dict[str, Callable[[], Results]] = {"kernels": dict}
    if "triton" in cw.available_backends():
        from convwave.kernels.configs import forward_launch

        H, C, _ = level.weight.shape
        chosen = forward_launch(C, H, task.dtype, _precision(task), x.device)
        grid = product((32, 64, 128), (4, 8), (2, 3))
        others = [replace(chosen, rows=r, warps=warps, stages=stages) for r, warps, stages in grid]
        named = {}
        for launch in dict.fromkeys([chosen, *others]):
            name = f"{launch.rows} x {launch.depth} x {launch.columns}, {launch.warps} warps, {launch.stages} stages"
            named[name + ", the choice" * (launch == chosen)] = functools.partial(with_launch, launch)
    return _rungs(task, pytorch, named)


def _precision(task: Stack) -> str:
    from convwave.kernels.configs import resolve_precision

    return str(resolve_precision("auto", task.dtype))


RUNGS = {"forward": forward, "eval": evaluation, "backward": backward, "tiles": tiles}


def steps(plan: Plan) -> Iterator[Step]:
    for precision in ("float32",) if plan.quick else ("float32", "tf32", "bfloat16"):
        for name in RUNGS:
            yield Step((f"{name}, {precision}", None, None), functools.partial(_measure, plan, name, precision))


def _measure(plan: Plan, name: str, precision: str, point: Point) -> list[Row]:
    if not plan.cuda:
        return [point.absent("kernels", "needs a CUDA device")]
    batch, length, channels = (4, 64, 32) if plan.quick else (64, 1024, 128)
    with numeric_flags(precision) as dtype:
        task = Stack(batch, length, channels, 1 if name == "tiles" else 3, dtype, True, plan.device)
        competitors, expected = RUNGS[name](task)
        return compare(competitors, expected, point, plan.settings, positions=task.positions, baseline="PyTorch")


TIMES = "times faster than PyTorch, eager"
STUDY = Study(
    "ladder",
    "What is each idea of the kernels worth?",
    steps,
    (
        Picture("Forward, training mode, float32", "speedup", "forward, float32", TIMES, "bars"),
        Picture("Backward, float32", "speedup", "backward, float32", TIMES, "bars"),
        Picture("Evaluation, float32", "speedup", "eval, float32", TIMES, "bars"),
        Picture("Tiles of the forward kernel, float32", "speedup", "tiles, float32", TIMES, "bars"),
        Picture("Forward, training mode, bfloat16", "speedup", "forward, bfloat16", TIMES, "bars"),
        Picture("Backward, bfloat16", "speedup", "backward, bfloat16", TIMES, "bars"),
    ),
)
