"""Muon in float32, for the convolution matrices.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix, found by a few
Newton-Schulz steps. `torch.optim.Muon` runs those in bfloat16, which is slow on a CPU, and takes 2-D parameters only;
this one works in the parameter's own precision and sees a convolution weight (H, C, k) as the matrix (H, C * k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic's coefficients, as published with Muon: steep at 0, and close to 1 on (0.7, 1.2) after five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """An approximation of U V^T, where U S V^T is the singular value decomposition of `matrix` (m, n)."""
    a, b, c = _QUINTIC
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; Nesterov; decoupled weight decay.

    Args:
        params: parameters of two or more dimensions, seen as (first, rest).
        lr: learning rate, multiplied by ``sqrt(max(1, rows / columns))``.
        momentum: of the running mean of gradients.
        weight_decay: decoupled: every step multiplies the weights by ``1 - lr * weight_decay``.
        steps: Newton-Schulz steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"params: Muon needs matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.flatten(1)
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - momentum)
                update = orthogonalize(grad.lerp(state["momentum"], momentum), group["steps"])
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"]).sub_(update.reshape(p.shape), alpha=lr * scale)
        return result
