"""Training: what and how, by which implementation, the loop."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.train.loop import Config, Diverged, Interrupted, Result, UsageError, fit, train
    from convwave.train.recipes import PUBLISHED, RECIPES, Recipe

__all__ = [
    "PUBLISHED",
    "RECIPES",
    "Config",
    "Diverged",
    "Interrupted",
    "Recipe",
    "Result",
    "UsageError",
    "fit",
    "train",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "loop": [
            "Config",
            "Diverged",
            "Interrupted",
            "Result",
            "UsageError",
            "fit",
            "train",
        ],
        "recipes": [
            "PUBLISHED",
            "RECIPES",
            "Recipe",
        ],
    },
)
