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

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import PRECISIONS, Results, Work
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Stack, need, numbered

QUESTION = "What is each idea of the kernels worth?"
TITLES = {"forward": "Forward, training mode", "backward": "Backward", "eval": "Evaluation", "tiles": "Tiles"}
SHOWN = [(mode, "float32") for mode in TITLES] + [("forward", "bfloat16"), ("backward", "bfloat16")]
FASTER = "times faster than PyTorch, eager"
PICTURES = [Picture(f"{TITLES[m]}, {p}", "speedup", f"{m}, {p}", FASTER, "bars") for m, p in SHOWN]
Run = Callable[[], Results]


def kernels(module: str) -> Any:
    """A module of the kernels; triton is not everywhere."""
    need("triton")
    return import_module(f"convwave.kernels.{module}")


def operands(task: Stack, training: bool = True) -> tuple[Tensor, list[Any], list[Any]]:
    """A stack as the kernels take it: x, the levels, their rows."""
    levels = [block.level() for block in task.model(task.dtype).train(training).layers]
    return task.x.view(task.positions, -1), levels, list(task.graph.rows(counted=False, consumers=True))


def plain_forward(task: Stack, dtype: torch.dtype, training: bool = True) -> Run:
    model, x = task.model(dtype).train(training), task.x.to(dtype).view(task.positions, -1)
    return torch.no_grad()(lambda: {"h": model.features(x, task.graph)})


def plain_backward(task: Stack, dtype: torch.dtype) -> Run:
    model, gradient = task.model(dtype), task.gradient.to(dtype).view(task.positions, -1)
    leaf = task.x.to(dtype).view(task.positions, -1).requires_grad_()
    h, wanted = model.features(leaf, task.graph), [leaf, *(block.conv.weight for block in model.layers)]
    return lambda: numbered(torch.autograd.grad(h, wanted, gradient, retain_graph=True))


def level_by_level(task: Stack, training: bool = True, fused: bool = True) -> Run:
    """The product with its statistics, or the running ones, in a kernel; BatchNorm and tanh in another.

    Not `fused`: the statistics by PyTorch.
    """
    x, levels, rows = operands(task, training)
    conv, norm = kernels("forward").conv_forward, kernels("activate").norm_activate_forward
    precision = kernels("configs").resolve_precision("auto", task.dtype)

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

    return torch.no_grad()(run)


def stack_forward(task: Stack, training: bool = True) -> Run:
    """The library's own: BatchNorm and tanh while the next level loads, or in evaluation mode on store."""
    x, levels, rows = operands(task, training)
    stack = kernels("stack")
    if training:
        return torch.no_grad()(lambda: {"h": stack.stack_forward(x, levels, rows)[0]})
    return torch.no_grad()(lambda: {"h": stack.stack_inference(x, levels, rows)})


def stack_backward(task: Stack) -> Run:
    x, levels, rows = operands(task)
    stack, gradient = kernels("stack"), task.gradient.view(task.positions, -1)
    _, zs, stats = stack.stack_forward(x, levels, rows)

    def run() -> Results:
        dx, dweights, *_ = stack.stack_backward(gradient, x, levels, zs, stats, rows)
        return numbered([dx, *dweights])

    return torch.no_grad()(run)


def launched(task: Stack, prepare: Callable[[Stack], Run], module: str, **changes: Any) -> Run:
    """The library's own, with other launch parameters than it chooses for the product's kernel."""
    run, kernel, name = prepare(task), kernels(module), f"{module}_launch"

    def changed() -> Results:
        choose = getattr(kernel, name)
        setattr(kernel, name, lambda *shape: replace(choose(*shape), **changes))
        try:
            return run()
        finally:
            setattr(kernel, name, choose)

    return changed


def tiles() -> Iterator[tuple[str, Callable[[Stack], Run]]]:
    for rows, warps, stages in product((32, 64, 128), (4, 8), (2, 3)):
        changes: dict[str, Any] = {"rows": rows, "warps": warps, "stages": stages}
        yield (
            f"{rows} rows, {warps} warps, {stages} stages",
            partial(launched, prepare=stack_forward, module="forward", **changes),
        )


RUNGS: dict[str, tuple[Callable[[Stack, torch.dtype], Run], dict[str, Callable[[Stack], Run]]]] = {
    "forward": (
        plain_forward,
        {
            "unfused": partial(level_by_level, fused=False),
            "statistics fused": level_by_level,
            "prologue fused": stack_forward,
        },
    ),
    "backward": (
        plain_backward,
        {
            "gradients of the matrices in a pass of their own": partial(
                launched, prepare=stack_backward, module="backward", fused=False
            ),
            "in the same": stack_backward,
        },
    ),
    "eval": (
        partial(plain_forward, training=False),
        {
            "unfused": partial(level_by_level, training=False),
            "BatchNorm and tanh on store": partial(stack_forward, training=False),
        },
    ),
    "tiles": (plain_forward, {"the library's choice": stack_forward, **dict(tiles())}),
}


class Ladder(Stack):
    """The task: PyTorch, and the rungs of the ladder of this name, over a stack."""

    def __init__(self, name: str, *stack: Any) -> None:
        super().__init__(*stack)
        self.plain, self.rungs = RUNGS[name]

    def expected(self) -> Results:
        return self.plain(self, torch.float64)()

    def make(self, provider: str) -> Work:
        run = self.plain(self, self.dtype) if provider == "PyTorch" else self.rungs[provider](self)
        return Work(run, run, dtype=self.dtype)


def steps(plan: Plan) -> Iterator[Step]:
    batch, length, channels = plan.pick((4, 64, 32), (64, 1024, 128))
    for precision in plan.pick(("float32",), ("float32", "tf32", "bfloat16")):
        for name, (_, rungs) in RUNGS.items():
            shape = (batch, length, channels, 1 if name == "tiles" else 3, PRECISIONS[precision][0])
            task = partial(Ladder, name, *shape, True, plan.device)
            point = (f"{name}, {precision}", None, None)
            if plan.cuda:
                yield plan.step(point, task, ("PyTorch", *rungs), "PyTorch", precision)
            else:
                yield Step(point, lambda point: [point.absent("kernels", "needs a CUDA device")])
