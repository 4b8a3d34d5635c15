"""Diagnostics of a training under way, as the lecture series teaches them: activations, gradients, updates.

In tiers cpu and reference a look costs half a step to one and a half, and nine of the post's steps of 32 windows (CPU
time on one core of an AMD EPYC), which at the default interval is 0.1 to 3 % of the time; in tier fused it is a step of
autograd, whose cost is not measured. It changes nothing and leaves random numbers as they were, so a run with
diagnostics ends in the same bits as one without.

Of every level: a histogram of its activations, their mean and deviation, the share that is saturated, and how many
channels are dead. Of every parameter: the norm of its gradient, and the norm of its update over that of the parameter,
which for a healthy training is about 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from convwave.nn import ConvWave
from convwave.train.config import Config
from convwave.train.tiers import Activations, Run, Watch

SATURATED = 0.97  # tanh beyond which it passes on less than 6 % of a gradient
BINS = 40  # of [-1, 1]
LOOKS = 20  # at a training


def default_interval(config: Config) -> int:
    """Steps from one look to the next: 20 looks, or fewer where they would take much of the time."""
    least = 300 if config.recipe.batch_of == "windows" else 200 if config.tier == "fused" else 50
    return max(least, config.steps // LOOKS)


class Diagnostics(Run):
    """A run that looks at some of its steps.

    Args:
        run: what it is otherwise.
        every: looks at the first step and then at every step whose number is a multiple of it.
        seen: gets ``{"step": number, "diagnostics": {..}}`` of every step looked at, plain JSON values.
    """

    def __init__(self, run: Run, every: int, seen: Callable[[dict[str, Any]], None]) -> None:
        self._run, self._every, self._seen = run, every, seen
        self.block = min(run.block, every)

    @property
    def positions(self) -> int:  # type: ignore[override]
        return self._run.positions

    def prepare(self, message: Callable[[str], None]) -> None:
        self._run.prepare(message)

    def steps(self, first: int, stop: int) -> list[float]:
        losses: list[float] = []
        while first < stop:
            if first == 0 or (first + 1) % self._every == 0:
                losses.append(self._look(first))
                first += 1
                continue
            end = min(stop, first + self._every - 1 - first % self._every)  # before the next step to look at
            losses += self._run.steps(first, end)
            first = end
        return losses

    def step(self, i: int, watch: Watch | None = None) -> float:
        return self.steps(i, i + 1)[0] if watch is None else self._run.step(i, watch)

    @torch.no_grad()
    def _look(self, i: int) -> float:
        found: dict[str, Any] = {}

        def watch(gradients: Mapping[str, Tensor], activations: Sequence[Activations]) -> None:
            found["gradient_norm"] = {name: float(gradient.norm()) for name, gradient in gradients.items()}
            found["levels"] = [_of_level(*level) for level in activations]

        before = {name: p.detach().clone() for name, p in self._run.model().named_parameters()}
        with torch.enable_grad():
            loss = self._run.step(i, watch)
        after = self._run.model().named_parameters()
        found["update_ratio"] = {name: _ratio(p - before[name], before[name]) for name, p in after}
        self._seen({"step": i + 1, "diagnostics": found})
        return loss

    def finish(self) -> ConvWave:
        return self._run.finish()

    def model(self) -> ConvWave:
        return self._run.model()

    def state(self) -> dict[str, Tensor]:
        return self._run.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._run.restore(state)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self._run.begin_with(weights)


def _ratio(update: Tensor, parameter: Tensor) -> float | None:
    """Of the norms; None for a parameter that is still 0."""
    size = float(parameter.norm())
    return float(update.norm()) / size if size else None


def _of_level(h: Tensor, counts: Tensor) -> dict[str, Any]:
    """What a level's activations (N, H) are like, of which row n stands for ``counts[n]`` equal ones (N,)."""
    shares = counts.to(h.dtype)
    shares = shares / (shares.sum() * h.shape[1])
    far = h.abs() > SATURATED
    bins = h.add(1).mul_(BINS / 2).clamp_(0, BINS - 1).long()
    histogram = torch.bincount(bins.view(-1), shares[:, None].expand_as(h).reshape(-1), BINS)
    mean = float(shares @ h.sum(1))
    return {
        "mean": mean,
        "deviation": float(shares @ (h - mean).square().sum(1)) ** 0.5,
        "saturated": float(shares @ far.sum(1).to(shares.dtype)),
        "dead": int(far[counts > 0].all(0).sum()),
        "histogram": [round(share, 6) for share in histogram.tolist()],
    }
