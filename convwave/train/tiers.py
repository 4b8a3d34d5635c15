"""Tiers: implementations of one training, from the plainest to the fastest.

Every tier runs the same recipe on the same batches and ends at the same losses, up to the noise between seeds. For a
given seed, device and tier the weights are the same bits every time (on a GPU not for batches of contexts, whose
weights are added up in any order); from tier to tier they differ by rounding, which a few steps make visible.

| tier | what runs | where |
|---|---|---|
| ``reference`` | `ConvWave`, autograd, `optim.Muon`, torch's AdamW and SGD | everywhere, every recipe |
| ``cpu`` | `closed_form`: the same step without autograd | recipes that take Muon, on a CPU |
| ``cuda-graph`` | the fused kernels and both optimisers, a step as one CUDA graph | recipe ``full``, on CUDA |
"""

from __future__ import annotations

from typing import NamedTuple

from convwave.train.recipes import RECIPES


class Tier(NamedTuple):
    """What a tier can train.

    Attributes:
        device: type of the device that it runs on, None for any.
        models: names in `training.MODELS`, None for any.
        optimizers, batches: `optimizer` and `batch_of` of `recipes.Recipe`, None for any.
    """

    device: str | None = None
    models: tuple[str, ...] | None = None
    optimizers: tuple[str, ...] | None = None
    batches: tuple[str, ...] | None = None

    def runs(self, model: str, recipe: str, device: str) -> bool:
        """Whether it trains this model by this recipe on this device."""
        return (
            self.device in (None, device.partition(":")[0])
            and (self.models is None or model in self.models)
            and (self.optimizers is None or RECIPES[recipe].optimizer in self.optimizers)
            and (self.batches is None or RECIPES[recipe].batch_of in self.batches)
        )


# the fastest first
TIERS = {
    "cuda-graph": Tier("cuda", ("convwave",), ("muon",), ("text",)),
    "cpu": Tier("cpu", ("convwave",), ("muon",)),
    "reference": Tier(),
}


def available_tiers(model: str = "convwave", recipe: str = "fast", device: str = "cpu") -> list[str]:
    """The tiers that train a model by a recipe on a device, the fastest first."""
    return [name for name, tier in TIERS.items() if tier.runs(model, recipe, device)]


def choose_tier(tier: str, model: str, recipe: str, device: str) -> str:
    """The tier that a name means: "auto" is the fastest there is.

    Raises:
        ValueError: another name, or a tier that does not run this.
    """
    available = available_tiers(model, recipe, device)
    if tier == "auto":
        return available[0]
    if tier not in TIERS:
        raise ValueError(f"tier: expected auto or one of {', '.join(TIERS)}, got {tier!r}")
    if tier not in available:
        raise ValueError(
            f"tier: expected one of {', '.join(available)} for {model} by recipe {recipe} on {device}, got {tier!r}"
        )
    return tier
