"""One level: weighted statistics of its rows, and how running statistics follow them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Statistics of a level as the kernels keep them: rows of a (5, H) tensor."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor  # rstd * gamma
    var: Tensor
    total: Tensor  # sum of the weights, the same in every channel


def variance_divisor(total: float, unbiased: bool) -> float:
    """What a sum of squared deviations is divided by.

    Raises:
        ValueError: too few rows for a variance.
    """
    divisor = total - 1 if unbiased else total
    if divisor <= 0:
        raise ValueError(
            f"weights: {'an unbiased' if unbiased else 'a'} variance needs a total count above "
            f"{1 if unbiased else 0}, got {total:g}"
        )
    return divisor


def center(z: Tensor, weights: Tensor | None, total: float, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and deviations of rows of which row n stands for ``weights[n]`` equal ones.

    Args:
        z: (N, H).
        weights: (N,) >= 0, any dtype; None means 1 each.
        total: sum of the weights.
        unbiased: divide the variance by ``total - 1`` (torch.var's default, the post's) instead of ``total``.

    Returns:
        mean (H,), variance (H,), ``z - mean`` (N, H).

    Raises:
        ValueError: too few rows for a variance.
    """
    divisor = variance_divisor(total, unbiased)
    if weights is None:
        mean = z.mean(0)
        deviation = z - mean
        return mean, deviation.square().sum(0) / divisor, deviation
    # .sum adds pairwise; a matrix-vector product adds one by one, and errs 100 times more over 50,000 float32 rows
    w = weights.to(z.dtype)[:, None]
    mean = (w * z).sum(0) / total
    deviation = z - mean
    return mean, (w * deviation.square()).sum(0) / divisor, deviation


@torch.no_grad()
def track(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    total: float | Tensor,
    unbiased: bool,
    momentum: float,
) -> None:
    """Move the running statistics towards a batch's, in place; the variance that is tracked is the unbiased one.

    Args:
        total: sum of the weights, or (H,) that sum in every channel.
    """
    tracked = var
    if not unbiased:
        # one row has no unbiased variance; its biased one is 0
        if isinstance(total, Tensor):
            tracked = torch.where(total <= 1, var, var * (total / (total - 1)))
        elif total > 1:
            tracked = var * (total / (total - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(tracked.to(running_var.dtype), momentum)


def _wide(tensor: Tensor) -> Tensor:
    """float64 as it is, anything narrower as float32: what statistics and sums are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _total(z: Tensor, weights: Tensor | None, total: float | None) -> float:
    if total is not None:
        return total
    return float(z.shape[0]) if weights is None else float(weights.sum())
