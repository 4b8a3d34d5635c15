"""Training: configuration, recipes, tiers, and the loop."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.train.config import MODELS, Config, Diverged, Interrupted, UsageError
    from convwave.train.loop import Reporter, Result, few_threads, fit, read_config, threads, train
    from convwave.train.recipes import PUBLISHED, RECIPES, Recipe, read_recipe, vary
    from convwave.train.setup import recompute_statistics
    from convwave.train.tiers import available_tiers, begin

__all__ = [
    "MODELS",
    "PUBLISHED",
    "RECIPES",
    "Config",
    "Diverged",
    "Interrupted",
    "Recipe",
    "Reporter",
    "Result",
    "UsageError",
    "available_tiers",
    "begin",
    "few_threads",
    "fit",
    "read_config",
    "read_recipe",
    "recompute_statistics",
    "threads",
    "train",
    "vary",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "autograd": [],
        "closed_form": [],
        "config": ["MODELS", "Config", "Diverged", "Interrupted", "UsageError"],
        "cuda_graph": [],
        "loop": ["Reporter", "Result", "few_threads", "fit", "read_config", "threads", "train"],
        "optim": [],
        "recipes": ["PUBLISHED", "RECIPES", "Recipe", "read_recipe", "vary"],
        "setup": ["recompute_statistics"],
        "tiers": ["available_tiers", "begin"],
    },
)
