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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

import convwave as cw
from benchmarks.harness import Competitor, Results, Row, Work, compare, numeric_flags
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Stack, by_level, need

Rungs = tuple[list[Competitor], Results]
Run = Callable[[], Results]


def kernels(module: str) -> Any:
    """A module of the kernels; triton is not everywhere."""
    need("triton")
    return import_module(f"convwave.kernels.{module}")


def operands(task: Stack, training: bool = True) -> tuple[Tensor, list[Any], list[Any], str]:
    """A stack as the kernels take it: x, the levels, their rows, the precision of products."""
    levels = [block.level() for block in task.model(task.dtype).train(training).layers]
    rows = list(task.graph.rows(counted=False, consumers=True))
    precision = kernels("configs").resolve_precision("auto", task.dtype)
    return task.x.view(task.positions, -1), levels, rows, precision


def rungs(task: Stack, pytorch: Callable[[torch.dtype], Run], named: Mapping[str, Callable[[], Run]]) -> Rungs:
    """PyTorch and what the kernels are prepared to run; the results in float64."""

    def make(prepare: Callable[[], Run]) -> Work:
        run = torch.no_grad()(prepare())
        return Work(run, run)

    def make_plain() -> Work:
        run = pytorch(task.dtype)
        return Work(run, run)

    competitors = [Competitor(name, partial(make, prepare), task.dtype) for name, prepare in named.items()]
    return [Competitor("PyTorch", make_plain, task.dtype), *competitors], pytorch(torch.float64)()


def plain_forward(task: Stack, training: bool, dtype: torch.dtype) -> Run:
    model = task.model(dtype).train(training)
    x = task.x.to(dtype).view(task.positions, -1)
    return torch.no_grad()(lambda: {"h": model.features(x, task.graph)})


def level_by_level(task: Stack, training: bool = True, fused: bool = True) -> Run:
    """The product with its statistics, or the running ones, in a kernel; BatchNorm and tanh in another.

    Not `fused`: the statistics by PyTorch.
    """
    x, levels, rows, precision = operands(task, training)
    conv, norm = kernels("forward").conv_forward, kernels("activate").norm_activate_forward

    def run() -> Results:
        h = x
        for level, its in zip(levels, rows, strict=True):
            z, stats = conv(h, level if fused else level._replace(training=False), its, precision=precision)
            if not fused:
                var, mean = torch.var_mean(z.float(), 0, correction=0)
                rstd = torch.rsqrt(var + level.eps)
                total = torch.full_like(var, z.shape[0])
                stats = torch.stack([mean, rstd, rstd * level.gamma.float(), var, total])
            h = norm(z, level, stats)
        return {"h": h}

    return run


def stack_forward(task: Stack, training: bool) -> Run:
    """The library's own: BatchNorm and tanh while the next level loads, or in evaluation mode on store."""
    x, levels, rows, _ = operands(task, training)
    stack = kernels("stack")
    return lambda: {
        "h": stack.stack_forward(x, levels, rows)[0] if training else stack.stack_inference(x, levels, rows)
    }


def forward(task: Stack) -> Rungs:
    named = {
        "unfused": partial(level_by_level, task, fused=False),
        "statistics fused": partial(level_by_level, task),
        "prologue fused": partial(stack_forward, task, True),
    }
    return rungs(task, partial(plain_forward, task, True), named)


def evaluation(task: Stack) -> Rungs:
    named = {
        "unfused": partial(level_by_level, task, False),
        "BatchNorm and tanh on store": partial(stack_forward, task, False),
    }
    return rungs(task, partial(plain_forward, task, False), named)


def backward(task: Stack) -> Rungs:
    gradient = task.gradient.view(task.positions, -1)

    def prepare(separate: bool) -> Run:
        x, levels, rows, precision = operands(task)
        stack, activate, configs = (kernels(module) for module in ("stack", "activate", "configs"))
        _, zs, stats = stack.stack_forward(x, levels, rows)

        def run() -> Results:
            if not separate:
                dx, dweights, *_ = stack.stack_backward(gradient, x, levels, zs, stats, rows)
                return {"x": dx, **by_level(dweights)}
            g, sums = activate.norm_activate_backward(gradient, zs[-1], levels[-1], stats[-1])
            dweights = []
            for i in reversed(range(len(levels))):
                H, C, k = levels[i].weight.shape
                launch = replace(configs.backward_launch(C, H, k, x.dtype, precision, x.device), fused=False)
                operand = (g, zs[i], levels[i], stats[i], sums, zs[i - 1] if i else x, rows[i])
                options = {"below": (levels[i - 1], stats[i - 1]) if i else None, "precision": precision}
                g, sums, dweight = kernels("backward").conv_backward(*operand, launch=launch, **options)
                dweights.insert(0, dweight)
            return {"x": g, **by_level(dweights)}

        return run

    def pytorch(dtype: torch.dtype) -> Run:
        model = task.model(dtype)
        leaf = task.x.to(dtype).view(task.positions, -1).requires_grad_()
        h, wanted = model.features(leaf, task.graph), [leaf, *(block.conv.weight for block in model.layers)]

        def run() -> Results:
            dx, *dweights = torch.autograd.grad(h, wanted, gradient.to(dtype), retain_graph=True)
            return {"x": dx, **by_level(dweights)}

        return run

    apart, together = (partial(prepare, separate) for separate in (True, False))
    return rungs(task, pytorch, {"gradients of the matrices in a pass of their own": apart, "in the same": together})


def tiles(task: Stack) -> Rungs:
    """One level, forward in training mode, by tiles of other sizes; the first kernel is the one that is chosen."""

    def pytorch(dtype: torch.dtype) -> Run:
        x, weight = task.x.to(dtype).view(task.positions, -1), task.model(dtype).layers[0].conv.weight

        def run() -> Results:
            z = torch.stack([x[tap] @ weight[:, :, j].T for j, tap in enumerate(task.graph.taps[0])]).sum(0)
            return {"z": z, "var": z.to(torch.promote_types(dtype, torch.float32)).var(0, correction=0)}

        return torch.no_grad()(run)

    def prepare(launch: Any) -> Run:
        x, (level,), (rows,), precision = operands(task)

        def run() -> Results:
            z, stats = kernels("forward").conv_forward(x, level, rows, precision=precision, launch=launch)
            return {"z": z, "var": stats[3]}

        return run

    if "triton" not in cw.available_backends():
        return rungs(task, pytorch, {"kernels": partial(prepare, None)})
    x, (level,), _, precision = operands(task)
    H, C, _ = level.weight.shape
    chosen = kernels("configs").forward_launch(C, H, task.dtype, precision, x.device)
    grid = product((32, 64, 128), (4, 8), (2, 3))
    others = [replace(chosen, rows=r, warps=warps, stages=stages) for r, warps, stages in grid]
    named = {}
    for launch in dict.fromkeys([chosen, *others]):
        name = f"{launch.rows} x {launch.depth} x {launch.columns}, {launch.warps} warps, {launch.stages} stages"
        named[name + ", the choice" * (launch == chosen)] = partial(prepare, launch)
    return rungs(task, pytorch, named)


RUNGS = {"forward": forward, "backward": backward, "eval": evaluation, "tiles": tiles}


def steps(plan: Plan) -> Iterator[Step]:
    for precision in ("float32",) if plan.quick else ("float32", "tf32", "bfloat16"):
        for name in RUNGS:
            yield Step((f"{name}, {precision}", None, None), _measure, (plan, name, precision))


def _measure(plan: Plan, name: str, precision: str, point: Row) -> list[Row]:
    if not plan.cuda:
        return [point.absent("kernels", "needs a CUDA device")]
    batch, length, channels = (4, 64, 32) if plan.quick else (64, 1024, 128)
    with numeric_flags(precision) as dtype:
        task = Stack(batch, length, channels, 1 if name == "tiles" else 3, dtype, True, plan.device)
        competitors, expected = RUNGS[name](task)
        return compare(competitors, expected, point, plan, positions=task.positions, baseline="PyTorch")


QUESTION = "What is each idea of the kernels worth?"
TITLES = {"forward": "Forward, training mode", "backward": "Backward", "eval": "Evaluation", "tiles": "Tiles"}
SHOWN = [(mode, "float32") for mode in TITLES] + [("forward", "bfloat16"), ("backward", "bfloat16")]
PICTURES = [
    Picture(
        f"{TITLES[mode]}, {precision}", "speedup", f"{mode}, {precision}", "times faster than PyTorch, eager", "bars"
    )
    for mode, precision in SHOWN
]
