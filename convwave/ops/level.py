"""The noun of this library: a level of a stack, as one value that every engine reads.

A level is ``activation(batchnorm(convolution(x)))``, and, where there are matrices for it, a residual and a skip. Here
stand its parts, the activations with their derivatives, and what running statistics do; how rows are computed stands in
`naive` (the definition), `stack` (closed form) and the kernels.

Shapes: N rows of a level, N' rows of the level below, C channels below, H channels, P parts of the activation, k taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """A function from P * H normalised channels to H, and its derivative.

    Attributes:
        name: in configurations and kernels.
        parts: P, channels in for one channel out.
        value: (N, P * H) -> (N, H).
        gradient: (da (N, H), y, a (N, H) = value(y())) -> dy (N, P * H); y is a function that computes (N, P * H), for
            those that cannot do without.
    """

    name: str
    parts: int
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Callable[[], Tensor], Tensor], Tensor]


def _tanh_gradient(da: Tensor, y: Callable[[], Tensor], a: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward(da, a)


TANH = Activation("tanh", 1, torch.tanh, _tanh_gradient)
ACTIVATIONS = {activation.name: activation for activation in (TANH,)}


class Level(NamedTuple):
    """Everything that one level of a stack needs, apart from its rows.

    Attributes:
        weight: (P * H, C, k), torch's Conv1d layout, oldest tap first.
        gamma, beta: (P * H,) BatchNorm's scale and shift.
        running_mean, running_var: (P * H,), moved in place in training mode; None where none are tracked.
        eps: added to the variance.
        momentum: share of a new batch in the running statistics.
        training: normalise with the rows' statistics and track them, else with the running ones.
        unbiased: normalise with the variance over the sum of the counts less 1 (torch.var's default, the post's).
        activation: applied after the BatchNorm.
    """

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    eps: float = 1e-5
    momentum: float = 0.1
    training: bool = False
    unbiased: bool = True
    activation: Activation = TANH

    @property
    def of_rows(self) -> bool:
        """Whether the statistics are those of the rows: in training mode, and where none are tracked."""
        return self.training or self.running_mean is None


class Stats(NamedTuple):
    """Statistics of a level as the kernels keep them: rows of a (5, P * H) tensor in float32 or float64."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor  # rstd * gamma
    var: Tensor
    total: Tensor  # sum of the counts, the same in every channel; 0 and not used where the running ones are taken


class Moments(NamedTuple):
    """Sum of the counts, mean, and sum of squared deviations of some rows, in float64."""

    total: Tensor  # ()
    mean: Tensor  # (P * H,)
    squares: Tensor  # (P * H,)

    @classmethod
    def of(cls, z: Tensor, counts: Tensor | None) -> Moments:
        """Those of rows (N, P * H) with counts (N,), None for 1 each."""
        z = z.double()
        w = torch.ones_like(z[:, :1]) if counts is None else counts.double()[:, None]
        total = w.sum()
        mean = (w * z).sum(0) / total.clamp(min=1e-300)
        return cls(total, mean, (w * (z - mean).square()).sum(0))

    def merged(self, other: Moments) -> Moments:
        """Those of both sets of rows together (Chan, Golub and LeVeque, 1979)."""
        total = self.total + other.total
        share = other.total / total.clamp(min=1e-300)
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * self.total * share
        return Moments(total, self.mean + apart * share, squares)


def wide(tensor: Tensor) -> Tensor:
    """float64 as it is, anything narrower as float32: what statistics and sums are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_total(total: float, unbiased: bool) -> None:
    """Raise ValueError where a sum of counts is too small for a variance."""
    least = 1 if unbiased else 0
    if not total > least:
        raise ValueError(
            f"counts: {'an unbiased' if unbiased else 'a'} variance needs a total count above {least}, got {total:g}"
        )


@torch.no_grad()
def track(level: Level, mean: Tensor, var: Tensor, total: float | Tensor) -> None:
    """Move a level's running statistics towards a batch's, in place; the tracked variance is the unbiased one.

    Args:
        mean, var: (P * H,) of the batch, the variance as it normalised.
        total: sum of the counts, also as a tensor.
    """
    if level.running_mean is None or level.running_var is None:
        return
    if not level.unbiased:
        # one row has no unbiased variance; its biased one is 0
        if isinstance(total, Tensor):
            var = torch.where(total <= 1, var, var * (total / (total - 1)))
        elif total > 1:
            var = var * (total / (total - 1))
    level.running_mean.lerp_(mean.to(level.running_mean.dtype), level.momentum)
    level.running_var.lerp_(var.to(level.running_var.dtype), level.momentum)
