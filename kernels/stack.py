"""Whole stacks: launches of the kernels, level after level, as `convwave.ops.stack` defines them.

Every level obeys its own `of_rows`, `unbiased`, `eps` and `activation`; a stack may mix them.

Passes over memory, in numbers of C a row: forward 2 for each level and 2 at the top; backward 4 for each, 7 where a
separate kernel computes the weight gradient, and 3 at the top. A level of running statistics reads one C less backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from convwave.data.graph import Rows

from .activate import norm_activate_backward, norm_activate_forward
from .backward import conv_backward
from .configs import resolve_precision
from .forward import conv_forward

if TYPE_CHECKING:
    from convwave.ops.level import Level


def stack_forward(
    x: Tensor, levels: Sequence[Level], rows: Sequence[Rows], precision: str = "auto"
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `convwave.ops.stack.stack_forward`; `precision` is that of float32 products."""
    precision = resolve_precision(precision, x.dtype)
    zs: list[Tensor] = []
    stats: list[Tensor] = []
    for level, its_rows in zip(levels, rows, strict=True):
        below = (levels[len(zs) - 1], stats[-1]) if zs else None
        z, level_stats = conv_forward(zs[-1] if zs else x, level, its_rows, below=below, precision=precision)
        zs.append(z)
        stats.append(level_stats)
    return norm_activate_forward(zs[-1], levels[-1], stats[-1]), zs, stats


def stack_inference(x: Tensor, levels: Sequence[Level], rows: Sequence[Rows], precision: str = "auto") -> Tensor:
    """Running statistics without gradients: every level writes its activations, and nothing is kept.

    Raises:
        ValueError: a level is normalised with the statistics of its rows.
    """
    if any(level.of_rows for level in levels):
        raise ValueError("levels: expected running statistics and training=False at every level")
    precision = resolve_precision(precision, x.dtype)
    for level, its_rows in zip(levels, rows, strict=True):
        x, _ = conv_forward(x, level, its_rows, precision=precision, activate=True)
    return x


def stack_backward(
    dh: Tensor,
    x: Tensor,
    levels: Sequence[Level],
    zs: Sequence[Tensor],
    stats: Sequence[Tensor],
    rows: Sequence[Rows],
    precision: str = "auto",
    needs_dx: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """See `convwave.ops.stack.stack_backward`; needs_dx: False leaves dx empty."""
    precision = resolve_precision(precision, x.dtype)
    dweights: list[Tensor] = []
    dgammas: list[Tensor] = []
    dbetas: list[Tensor] = []
    dx = x.new_empty(0)
    g, sums = norm_activate_backward(dh, zs[-1], levels[-1], stats[-1])
    for i in reversed(range(len(levels))):
        result = conv_backward(
            g,
            zs[i],
            levels[i],
            stats[i],
            sums,
            zs[i - 1] if i else x,
            rows[i],
            below=(levels[i - 1], stats[i - 1]) if i else None,
            precision=precision,
            needs_dx=i > 0 or needs_dx,
        )
        dbetas.insert(0, sums[0])
        dgammas.insert(0, sums[1])
        dweights.insert(0, result.dweight)
        if i:
            assert result.dx is not None
            assert result.sums is not None
            g, sums = result.dx, result.sums
        elif result.dx is not None:
            dx = result.dx
    return dx, dweights, dgammas, dbetas
