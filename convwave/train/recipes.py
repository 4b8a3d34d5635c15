"""How networks are trained: what a step sees, the optimiser, the schedule. A recipe is a value; `training` runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        optimizer: "sgd" is the post's; "muon" is Muon on the convolution matrices and Adam on all else.
        batch_of: "windows" draws single positions with replacement, "names" takes whole names epoch by epoch,
            "contexts" draws distinct contexts, see `batches.ContextSampler`, "text" takes all there is, every time.
        batch: windows, names or contexts a step; contexts in the first step; 1 text.
        growth: of batches of contexts, from the first step to the last.
        context_power: how much more often frequent contexts are drawn.
        lr: of SGD, or of Muon.
        adam_lr: of Adam, for everything that is not a convolution matrix.
        adam_beta: of Adam's running mean of gradients.
        weight_decay: decoupled, of Muon and Adam.
        warmup: share of the steps in which the rate rises from 0.
        orthogonal_steps: Newton-Schulz steps of Muon.
        token_noise: share of the letters read that are replaced by random ones of the training text (what is to be
            predicted stays): smoothing for networks large enough to learn the names by heart.
        n_embd, n_hidden, levels: the network that the recipe was made for.
    """

    name: str
    optimizer: Literal["sgd", "muon"]
    batch_of: Literal["windows", "names", "contexts", "text"]
    steps: int
    batch: int
    lr: float
    growth: float = 1.0
    context_power: float = 0.0
    adam_lr: float = 0.0
    adam_beta: float = 0.9
    weight_decay: float = 0.0
    momentum: float = 0.0
    orthogonal_steps: int = 5
    warmup: float = 0.0
    token_noise: float = 0.0
    n_embd: int = 10
    n_hidden: int = 68
    levels: int = 3

    def rate(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at `step` of `steps`.

        SGD: 1, and 0.1 for the last quarter, as in the post. Otherwise a linear rise, then a linear fall to 0.
        """
        if self.optimizer == "sgd":
            return 1.0 if step < 0.75 * steps else 0.1
        rise = (step + 1) / max(self.warmup * steps, 1)
        fall = (steps - step) / ((1 - self.warmup) * steps)
        return min(1.0, rise, fall)


BLOG = Recipe("blog", "sgd", "windows", steps=200_000, batch=32, lr=0.1)

FAST = Recipe(
    "fast",
    "muon",
    "names",
    steps=400,
    batch=512,
    lr=0.1,
    adam_lr=0.03,
    weight_decay=0.1,
    momentum=0.9,
    warmup=0.1,
)

RECORD = Recipe(
    "record",
    "muon",
    "names",
    steps=1600,
    batch=256,
    lr=0.1,
    adam_lr=0.006,
    weight_decay=0.2,
    momentum=0.9,
    warmup=0.1,
    token_noise=0.03,
    n_embd=24,
    n_hidden=384,
)

SPRINT = Recipe(
    "sprint",
    "muon",
    "contexts",
    steps=200,
    batch=1300,
    growth=1.7,
    context_power=0.7,
    lr=0.25,
    adam_lr=0.05,
    adam_beta=0.8,
    weight_decay=0.15,
    momentum=0.9,
    orthogonal_steps=3,
    warmup=0.05,
)

SPRINT_WIDE = replace(SPRINT, name="sprint_wide", steps=100, adam_lr=0.03, weight_decay=0.15, n_embd=24, n_hidden=128)

FULL = Recipe(
    "full",
    "muon",
    "text",
    steps=120,
    batch=1,
    lr=0.25,
    adam_lr=0.05,
    adam_beta=0.8,
    weight_decay=0.2,
    momentum=0.9,
    warmup=0.05,
)

RECIPES = {recipe.name: recipe for recipe in (BLOG, FAST, RECORD, SPRINT, SPRINT_WIDE, FULL)}


@dataclass(frozen=True)
class Published:
    """A network of the post and its printed losses on names.txt after 200,000 steps."""

    name: str
    title: str
    n_hidden: int
    factors: tuple[int, ...]
    train: float
    val: float
    uniform_embedding: bool = False


PUBLISHED = {
    network.name: network
    for network in (
        Published("mlp3", "MLP, context 3", 200, (3,), 2.0552, 2.1033, uniform_embedding=True),
        Published("mlp8", "MLP, context 8", 200, (8,), 1.9202, 2.0310),
        Published("hierarchical", "hierarchical MLP, context 8", 68, (2, 2, 2), 1.9113, 2.0209),
    )
}
