"""Muon in float32, for the convolution matrices.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix, found by a few
Newton-Schulz steps. `torch.optim.Muon` runs those in bfloat16, which is slow on a CPU, and takes 2-D parameters only;
this one works in the parameter's own precision and sees a convolution weight (H, C, k) as the matrix (H, C * k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.nn import ConvWave
from convwave.train.recipes import Recipe

# The quintic's coefficients, as published with Muon: steep at 0, and close to 1 on (0.7, 1.2) after five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)

ADAM_BETA2 = 0.95  # of Adam's running mean of squared gradients, in every recipe


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """An approximation of U V^T, where U S V^T is the singular value decomposition of `matrix` (m, n)."""
    a, b, c = _QUINTIC
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def orthogonalize_together(matrices: Sequence[Tensor], steps: int = 5) -> list[Tensor]:
    """`orthogonalize` of several matrices in one batch: few batched products instead of many small ones. They are
    zero-padded to one shape, which does not change the result: rows and columns of zeros stay zero.
    """
    a, b, c = _QUINTIC
    flat = [m if m.shape[0] <= m.shape[1] else m.T for m in matrices]
    rows, columns = max(m.shape[0] for m in flat), max(m.shape[1] for m in flat)
    x = torch.stack([F.pad(m, (0, columns - m.shape[1], 0, rows - m.shape[0])) for m in flat])
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    results = [y[: m.shape[0], : m.shape[1]] for y, m in zip(x, flat, strict=True)]
    return [y if m.shape[0] <= m.shape[1] else y.T for y, m in zip(results, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; Nesterov; decoupled weight decay.

    Args:
        params: parameters of two or more dimensions, seen as (first, rest).
        lr: learning rate, multiplied by ``sqrt(max(1, rows / columns))``; a scalar tensor if it must change inside a
            CUDA graph.
        momentum: of the running mean of gradients.
        weight_decay: decoupled: every step multiplies the weights by ``1 - lr * weight_decay``.
        steps: Newton-Schulz steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 0.1,
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
            moved = [p for p in group["params"] if p.grad is not None]
            averages = []
            for p in moved:
                grad = p.grad.flatten(1)
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                state["momentum"].lerp_(grad, 1 - momentum)
                averages.append(grad.lerp(state["momentum"], momentum))
            if isinstance(lr, Tensor):
                updates = orthogonalize_together(averages, group["steps"])
            else:
                updates = [orthogonalize(average, group["steps"]) for average in averages]
            for p, update in zip(moved, updates, strict=True):
                rate = lr * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - lr * group["weight_decay"])
                if isinstance(rate, Tensor):
                    p.sub_(update.reshape(p.shape) * rate)
                else:
                    p.sub_(update.reshape(p.shape), alpha=rate)
        return result


def make_optimizers(recipe: Recipe, net: ConvWave) -> list[torch.optim.Optimizer]:
    """What a recipe moves a network with: SGD, or Muon for the convolution matrices and AdamW for all else."""
    if recipe.optimizer == "sgd":
        return [torch.optim.SGD(net.parameters(), lr=recipe.lr)]
    matrices = [p for name, p in net.named_parameters() if name.endswith("conv.weight")]
    rest = [p for name, p in net.named_parameters() if not name.endswith("conv.weight")]
    decay, betas = recipe.weight_decay, (recipe.adam_beta, ADAM_BETA2)
    return [
        Muon(matrices, recipe.lr, recipe.momentum, decay, recipe.orthogonal_steps),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=betas, weight_decay=decay, fused=True),
    ]
