"""BatchNorm folded into a weight and a shift, once: for evaluation, generation, scoring and export."""

from __future__ import annotations

import torch
from torch import Tensor

from convwave.ops.level import Level, wide

_NEVER = 60.0  # how far below the mean of the tokens' logits; e ** -60 is a normal number (denormal ones are slow)


def running(level: Level) -> tuple[Tensor, Tensor]:
    """The running mean and variance of a level; raises ValueError where it tracks none."""
    if level.running_mean is None or level.running_var is None:
        raise ValueError("norm: expected running statistics, got one with track_running_stats=False")
    return level.running_mean, level.running_var


def fixed_stats(level: Level) -> Tensor:
    """(5, H) `level.Stats` of the running mean and variance; the total is unused, and 0."""
    mean, var = (wide(statistic) for statistic in running(level))
    rstd = torch.rsqrt(var + level.eps)
    return torch.stack([mean, rstd, wide(level.gamma) * rstd, var, torch.zeros_like(var)])


def folded(level: Level) -> tuple[Tensor, Tensor]:
    """A convolution that gives a level's normalised pre-activations: weight (H, C, k) and shift (H,)."""
    mean, var = running(level)
    scale = level.gamma * torch.rsqrt(var + level.eps)
    return level.weight * scale[:, None, None], level.beta - mean * scale


def fold_head(weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> None:
    """The head for inputs that are logistics, padded to V' rows; padding rows get probabilities below e^-60.

    Args:
        weight, bias: (V, H), (V,).
        out_weight, out_bias: (V', H), (V',) to be written.
    """
    V = bias.numel()
    torch.mul(weight, 2, out=out_weight[:V])
    torch.sub(bias, weight.sum(1), out=out_bias[:V])
    out_weight[V:] = out_weight[:V].mean(0)
    out_bias[V:] = out_bias[:V].mean() - _NEVER


class Buffers:
    """Named buffers, kept from step to step."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """A (rows, columns) view of the named buffer, uninitialised."""
        size = rows * columns
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size + size // 4)
        return flat[:size].view(rows, columns)
