"""How networks are trained: what a step reads, the optimiser, the schedule. A recipe is a value; a tier runs it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

OPTIMIZERS, BATCHES = ("sgd", "muon"), ("windows", "names", "contexts", "text")


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Raises:
        ValueError: a field of another type or out of range; the message names it, what was expected and what came.

    Attributes:
        name: to tell it from others.
        optimizer: "sgd" is the post's; "muon" is Muon on the convolution matrices and Adam on all else.
        batch_of: "windows" draws single positions with replacement, "names" takes whole names epoch by epoch,
            "contexts" draws distinct contexts, see `batches.ContextSampler`, "text" takes the whole text in every step.
        batch: windows or names per step, or contexts in the first step; 1 for "text".
        growth: of batches of contexts, from the first step to the last.
        context_power: exponent of a context's count in its probability of being drawn.
        lr: of SGD, or of Muon.
        adam_lr: of Adam, for everything that is not a convolution matrix.
        adam_beta: of Adam's running mean of gradients.
        weight_decay: decoupled, of Muon and Adam.
        warmup: share of the steps in which the rate rises from 0.
        orthogonal_steps: Newton-Schulz steps of Muon.
        token_noise: share of input letters replaced by random ones of the training text (targets are unchanged), which
            regularises networks large enough to memorise names.
        steps: unless a run asks for another number.
        momentum: of Muon.
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

    def __post_init__(self) -> None:
        for name in _KINDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.token_noise and self.batch_of != "names":
            raise ValueError(f"token_noise: expected 0 unless batch_of is 'names', got {self.token_noise}")
        if (self.growth, self.context_power) != (1, 0) and self.batch_of != "contexts":
            got = f"{self.growth} and {self.context_power}"
            raise ValueError(f"growth, context_power: expected 1 and 0 unless batch_of is 'contexts', got {got}")

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rates at `step` of `steps`.

        SGD: 1, and 0.1 for the last quarter, as in the post. Otherwise a linear rise, then a linear fall to 0.
        """
        if self.optimizer == "sgd":
            return 1.0 if step < 0.75 * steps else 0.1
        rise = (step + 1) / max(self.warmup * steps, 1)
        fall = (steps - step) / ((1 - self.warmup) * steps)
        return min(1.0, rise, fall)


_KINDS = {field.name: str(field.type) for field in fields(Recipe)}
_CHOICES = {"optimizer": OPTIMIZERS, "batch_of": BATCHES}
# smallest value, and where there is one the bound that it must stay below
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "batch", "n_embd", "n_hidden", "levels"), (1, 2**31)),
    **dict.fromkeys(("growth", "orthogonal_steps"), (1, 1000)),
    **dict.fromkeys(("lr", "adam_lr", "weight_decay", "context_power"), (0, 1e6)),
    **dict.fromkeys(("adam_beta", "momentum", "warmup", "token_noise"), (0, 1)),
}


def _checked(name: str, value: Any) -> Any:
    """The value of a field, an int as a float where that is its type."""
    if name in _RANGES:
        whole = _KINDS[name] == "int"
        low, high = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{name}: expected {'a whole number' if whole else 'a number'}, got {value!r}")
        if not low <= value < high:
            raise ValueError(f"{name}: expected at least {low:g} and below {high:g}, got {value}")
        return value if whole else float(value)
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{name}: expected one of {', '.join(_CHOICES[name])}, got {value!r}")
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r}")
    if not value or set(value) & {"/", "\\"}:  # it becomes part of a folder's name
        raise ValueError(f"{name}: expected text without slashes, got {value!r}")
    return value


def vary(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in some fields; its name tells which, unless they hold one.

    Raises:
        ValueError: an unknown field, or what `Recipe` refuses.
    """
    _refuse_unknown(values)
    changes = "".join(f"+{name}={value}" for name, value in values.items())
    return replace(recipe, **{"name": recipe.name + changes, **values}) if values else recipe


def parse_field(text: str) -> tuple[str, Any]:
    """``"adam_lr=0.02"`` as a field of `Recipe` and its value.

    Raises:
        ValueError: not of this form, an unknown field, or text where a number is expected.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise ValueError(f"expected FIELD=VALUE, got {text!r}")
    _refuse_unknown([name])
    if name not in _RANGES:
        return name, _checked(name, value)
    try:
        return name, _checked(name, int(value) if _KINDS[name] == "int" else float(value))
    except ValueError as error:
        if str(error).startswith(f"{name}:"):
            raise
        kind = "a whole number" if _KINDS[name] == "int" else "a number"
        raise ValueError(f"{name}: expected {kind}, got {value!r}") from None


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a TOML file: fields of `Recipe`, and ``base``, the built-in one that has the fields not given.

    Raises:
        ValueError: no such file, not TOML, or what `vary` and `named` refuse; the message begins with the path.
    """
    path = Path(path)
    try:
        values = {"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}
        if "base" in values:
            return vary(named(values.pop("base")), values)
        _refuse_unknown(values)
        missing = [field.name for field in fields(Recipe) if field.default is MISSING and field.name not in values]
        if missing:
            raise ValueError(f"{missing[0]}: expected a value, or a base that has one, got none")
        return Recipe(**values)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # nested too deep; tomllib's is a ValueError
        raise ValueError(f"{path}: {error}") from None


def _refuse_unknown(names: Mapping[str, Any] | list[str]) -> None:
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"{name}: expected a field of a recipe ({', '.join(_KINDS)})")


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


def named(recipe: str | Recipe) -> Recipe:
    """The built-in recipe of a name; a recipe is itself.

    Raises:
        ValueError: no such name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]


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
