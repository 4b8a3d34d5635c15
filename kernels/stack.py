"""Whole stacks: launches of the kernels, level after level, as `twin.stack_forward` and `stack_backward` define them.

Passes over memory, in numbers of C a row: forward 2 for each level and 2 at the top; backward 4 for each, 7 where its
weight gradient is a kernel of its own, and 3 at the top.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from convwave.data.graph import Consumers, find_consumers

from .activate import norm_tanh_backward, norm_tanh_forward
from .backward import conv_backward
from .configs import resolve_precision
from .forward import conv_forward


def stack_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    fixed: Sequence[Tensor],
    taps: Sequence[Tensor],
    counts: Sequence[Tensor],
    eps: Sequence[float],
    unbiased: bool,
    precision: str = "auto",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `convwave.ops.stack.stack_forward`; `precision` is that of float32 products."""
    precision = resolve_precision(precision, x.dtype)
    zs: list[Tensor] = []
    stats: list[Tensor] = []
    below = None
    for level, weight in enumerate(weights):
        z, level_stats = conv_forward(
            zs[-1] if zs else x,
            weight,
            taps[level],
            gamma=gammas[level],
            beta=betas[level],
            below=below,
            counts=counts[level] if counts else None,
            stats=fixed[level] if fixed else None,
            unbiased=unbiased,
            eps=eps[level],
            precision=precision,
        )
        zs.append(z)
        stats.append(level_stats)
        below = (level_stats, betas[level])
    return norm_tanh_forward(zs[-1], stats[-1], betas[-1]), zs, stats


def stack_inference(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    fixed: Sequence[Tensor],
    taps: Sequence[Tensor],
    eps: Sequence[float],
    precision: str = "auto",
) -> Tensor:
    """Evaluation mode without gradients: every level writes its activations, and nothing is kept."""
    precision = resolve_precision(precision, x.dtype)
    for level, weight in enumerate(weights):
        x, _ = conv_forward(
            x,
            weight,
            taps[level],
            gamma=gammas[level],
            beta=betas[level],
            stats=fixed[level],
            eps=eps[level],
            precision=precision,
            activate=True,
        )
    return x


def stack_backward(
    dh: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    betas: Sequence[Tensor],
    zs: Sequence[Tensor],
    stats: Sequence[Tensor],
    taps: Sequence[Tensor],
    counts: Sequence[Tensor],
    training: bool,
    unbiased: bool,
    precision: str = "auto",
    consumers: Sequence[Consumers] = (),
    needs_dx: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """See `convwave.ops.stack.stack_backward`.

    Args:
        consumers: who reads each row of the level below, per level; found out from the taps where not given.
        needs_dx: False leaves dx empty.
    """
    precision = resolve_precision(precision, x.dtype)
    dweights: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    last = len(weights) - 1
    g, sums = norm_tanh_backward(dh, zs[last], stats[last], betas[last], training=training, unbiased=unbiased)
    for level in range(last, -1, -1):
        below = zs[level - 1] if level else x
        result = conv_backward(
            g,
            zs[level],
            stats[level],
            sums,
            weights[level],
            below,
            taps[level],
            consumers[level] if consumers else find_consumers(taps[level], below.shape[0]),
            below=(stats[level - 1], betas[level - 1]) if level else None,
            counts=counts[level] if counts else None,
            training=training,
            unbiased=unbiased,
            precision=precision,
            needs_dx=level > 0 or needs_dx,
        )
        dbetas.insert(0, sums[0])
        dgammas.insert(0, sums[1])
        dweights.insert(0, result.dweight)
        if level:
            assert result.dx is not None
            assert result.sums is not None
            g, sums = result.dx, result.sums
    return (result.dx if result.dx is not None else x.new_empty(0)), dweights, dgammas, dbetas
