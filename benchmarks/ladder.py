"""What each idea of the kernels is worth: the same levels, with one idea more at every step.

Forward, in training mode:

    unfused             gather and product in a kernel; statistics by PyTorch; BatchNorm and tanh in a kernel
    statistics fused    the product's kernel takes the statistics from registers
    prologue fused      BatchNorm and tanh happen while the next level loads: activations are never written

Evaluation: BatchNorm and tanh in a kernel of their own, or on the way out of the product's. Backward: the gradients of
the matrices in a pass of their own, or in the one that computes those of the rows. Last, the product's kernel with
other tiles than `convwave.kernels.configs` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.competitors import Stack
from benchmarks.harness import Competitor, Unavailable, Work
from convwave.data.graph import Consumers
from convwave.ops import fold, naive
from convwave.ops import stack as twin
from convwave.ops.library import available_backends

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Levels:
    """Operands of L levels of width C over N rows, see `convwave.ops.stack.stack_forward`."""

    x: Tensor
    gradient: Tensor
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    fixed: list[Tensor]
    taps: list[Tensor]
    consumers: tuple[Consumers, ...]
    eps: list[float]

    @classmethod
    def of(cls, task: Stack, dtype: torch.dtype | None = None) -> Levels:
        """Those of a task, in its dtype or another."""
        dtype = dtype or task.dtype
        layers = task.weights(dtype).layers
        norms = [block.norm for block in layers]
        graph = task.graph.to(task.device)
        rows = (task.positions, task.shape[2])
        return cls(
            task.x.to(dtype).view(rows),
            task.gradient.to(dtype).view(rows),
            [block.conv.weight.detach() for block in layers],
            [norm.weight.detach() for norm in norms],
            [norm.bias.detach() for norm in norms],
            [fold.fixed_stats(n.running_mean, n.running_var, n.weight.detach(), n.eps) for n in norms],
            list(graph.taps),
            graph.consumers,
            [norm.eps for norm in norms],
        )

    def forward(self, training: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """In plain PyTorch."""
        fixed = [] if training else self.fixed
        operands = (self.x, self.weights, self.gammas, self.betas, fixed, self.taps)
        return twin.stack_forward(*operands, [], self.eps, False)

    def backward(self, zs: list[Tensor], stats: list[Tensor]) -> Results:
        """In plain PyTorch."""
        operands = (self.gradient, self.x, self.weights, self.betas, zs, stats, self.taps)
        dx, dweights, _, _ = twin.stack_backward(*operands, [], True, False)
        return _gradients(dx, dweights)


def _gradients(dx: Tensor, dweights: list[Tensor]) -> Results:
    return {"x": dx, **{f"level {i}": dw for i, dw in enumerate(dweights)}}


def _competitor(name: str, run: Callable[[], Results], dtype: torch.dtype, kernels: bool = True) -> Competitor:
    def make() -> Work:
        if kernels and "triton" not in available_backends():
            raise Unavailable("backend 'triton' is not available here")
        inference = torch.no_grad()(run)
        return Work(inference, inference)

    return Competitor(name, make, dtype)


def forward(task: Stack) -> tuple[list[Competitor], Results]:
    """Rungs of the forward pass in training mode, and the activations in float64."""
    levels = Levels.of(task)

    def unfused() -> Results:
        from convwave.kernels.activate import norm_tanh_forward

        h = levels.x
        for level in range(len(levels.weights)):
            z = _product(levels, level, h)
            mean, var, _ = level.center(z.float(), None, float(z.shape[0]), False)
            rstd = torch.rsqrt(var + levels.eps[level])
            total = torch.full_like(var, z.shape[0])
            stats = torch.stack([mean, rstd, rstd * levels.gammas[level].float(), var, total])
            h = norm_tanh_forward(z, stats, levels.betas[level])
        return {"h": h}

    def statistics_fused() -> Results:
        from convwave.kernels.activate import norm_tanh_forward
        from convwave.kernels.forward import conv_forward

        h = levels.x
        for level, weight in enumerate(levels.weights):
            z, stats = conv_forward(h, weight, levels.taps[level], **_options(levels, level), unbiased=False)
            h = norm_tanh_forward(z, stats, levels.betas[level])
        return {"h": h}

    def prologue_fused() -> Results:
        from convwave.kernels.stack import stack_forward

        operands = (levels.x, levels.weights, levels.gammas, levels.betas)
        return {"h": stack_forward(*operands, [], levels.taps, [], levels.eps, False)[0]}

    rungs = [
        _competitor("PyTorch", lambda: {"h": levels.forward(True)[0]}, task.dtype, kernels=False),
        _competitor("unfused", unfused, task.dtype),
        _competitor("statistics fused", statistics_fused, task.dtype),
        _competitor("prologue fused", prologue_fused, task.dtype),
    ]
    return rungs, {"h": Levels.of(task, torch.float64).forward(True)[0]}


def evaluation(task: Stack) -> tuple[list[Competitor], Results]:
    """Rungs of the forward pass in evaluation mode, and the activations in float64."""
    levels = Levels.of(task)

    def unfused() -> Results:
        from convwave.kernels.activate import norm_tanh_forward

        h = levels.x
        for level, stats in enumerate(levels.fixed):
            h = norm_tanh_forward(_product(levels, level, h), stats, levels.betas[level])
        return {"h": h}

    def fused() -> Results:
        from convwave.kernels.stack import stack_inference

        operands = (levels.x, levels.weights, levels.gammas, levels.betas, levels.fixed, levels.taps)
        return {"h": stack_inference(*operands, levels.eps)}

    rungs = [
        _competitor("PyTorch", lambda: {"h": levels.forward(False)[0]}, task.dtype, kernels=False),
        _competitor("unfused", unfused, task.dtype),
        _competitor("BatchNorm and tanh on store", fused, task.dtype),
    ]
    return rungs, {"h": Levels.of(task, torch.float64).forward(False)[0]}


def backward(task: Stack) -> tuple[list[Competitor], Results]:
    """Rungs of the backward pass, and the gradients in float64."""
    levels, exact = Levels.of(task), Levels.of(task, torch.float64)
    with torch.no_grad():
        _, zs, stats = levels.forward(True)
        _, exact_zs, exact_stats = exact.forward(True)

    def separate() -> Results:
        from convwave.kernels.activate import norm_tanh_backward
        from convwave.kernels.backward import conv_backward
        from convwave.kernels.configs import backward_launch, resolve_precision

        precision = resolve_precision("auto", levels.x.dtype)
        last = len(zs) - 1
        options = {"training": True, "unbiased": False}
        g, sums = norm_tanh_backward(levels.gradient, zs[last], stats[last], levels.betas[last], **options)
        dweights: list[Tensor] = []
        for level in range(last, -1, -1):
            weight = levels.weights[level]
            H, C, K = weight.shape
            result = conv_backward(
                g,
                zs[level],
                stats[level],
                sums,
                weight,
                zs[level - 1] if level else levels.x,
                levels.taps[level],
                levels.consumers[level],
                below=(stats[level - 1], levels.betas[level - 1]) if level else None,
                precision=precision,
                launch=replace(backward_launch(C, H, K, levels.x.dtype, precision, levels.x.device), fused=False),
                **options,
            )
            dweights.insert(0, result.dweight)
            g, sums = result.dx, result.sums
        return _gradients(g, dweights)

    def fused() -> Results:
        from convwave.kernels.stack import stack_backward

        operands = (levels.gradient, levels.x, levels.weights, levels.betas, zs, stats, levels.taps)
        dx, dweights, _, _ = stack_backward(*operands, [], True, False, consumers=levels.consumers)
        return _gradients(dx, dweights)

    rungs = [
        _competitor("PyTorch", lambda: levels.backward(zs, stats), task.dtype, kernels=False),
        _competitor("matrices' gradients in a pass of their own", separate, task.dtype),
        _competitor("matrices' gradients in the same pass", fused, task.dtype),
    ]
    return rungs, exact.backward(exact_zs, exact_stats)


def tiles(task: Stack) -> tuple[list[Competitor], Results]:
    """One level, forward in training mode, by tiles of other sizes; the first kernel is the one that is chosen."""
    levels = Levels.of(task)
    H, C, _ = levels.weights[0].shape

    def with_launch(launch: object) -> Callable[[], Results]:
        def run() -> Results:
            from convwave.kernels.forward import conv_forward

            options = _options(levels, 0)
            z, stats = conv_forward(
                levels.x, levels.weights[0], levels.taps[0], **options, unbiased=False, launch=launch
            )
            return {"z": z, "var": stats[3]}

        return run

    def plain(here: Levels) -> Results:
        z = naive.gather_conv(here.x, here.weights[0], here.taps[0])
        var = z.to(torch.promote_types(z.dtype, torch.float32)).var(0, unbiased=False)
        return {"z": z, "var": var}

    rungs = [_competitor("PyTorch", lambda: plain(levels), task.dtype, kernels=False)]
    if "triton" in available_backends():
        from convwave.kernels.configs import forward_launch, resolve_precision

        chosen = forward_launch(C, H, task.dtype, resolve_precision("auto", task.dtype), levels.x.device)
        others = [
            replace(chosen, rows=rows, warps=warps, stages=stages)
            for rows in (32, 64, 128)
            for warps in (4, 8)
            for stages in (2, 3)
        ]
        for launch in dict.fromkeys([chosen, *others]):
            name = f"{launch.rows} x {launch.depth} x {launch.columns}, {launch.warps} warps, {launch.stages} stages"
            rungs.append(_competitor(name + ", the choice" * (launch == chosen), with_launch(launch), task.dtype))
    else:
        rungs.append(_competitor("kernels", dict, task.dtype))
    return rungs, plain(Levels.of(task, torch.float64))


RUNGS: dict[str, Callable[[Stack], tuple[list[Competitor], Results]]] = {
    "forward": forward,
    "eval": evaluation,
    "backward": backward,
    "tiles": tiles,
}


def _options(levels: Levels, level: int) -> dict[str, object]:
    """What `conv_forward` is told of a level."""
    from convwave.kernels.configs import resolve_precision

    return {
        "gamma": levels.gammas[level],
        "beta": levels.betas[level],
        "eps": levels.eps[level],
        "precision": resolve_precision("auto", levels.x.dtype),
    }


def _product(levels: Levels, level: int, h: Tensor) -> Tensor:
    """The product alone: given statistics are not taken, and without `activate` not used."""
    from convwave.kernels.forward import conv_forward

    options = _options(levels, level)
    return conv_forward(h, levels.weights[level], levels.taps[level], **options, stats=levels.fixed[level])[0]
