"""Training: what and how, by which implementation, the loop."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.train.autograd import ConvolutionRun, WindowedRun
    from convwave.train.closed_form import ClosedForm, ClosedFormRun, MuonAdam
    from convwave.train.config import MODELS, Config, Diverged, Interrupted, UsageError
    from convwave.train.cuda_graph import GraphedRun
    from convwave.train.loop import Reporter, Result, few_threads, fit, read_config, threads, train
    from convwave.train.optim import Muon
    from convwave.train.recipes import PUBLISHED, RECIPES, Recipe, read_recipe, vary
    from convwave.train.setup import recompute_statistics
    from convwave.train.tiers import TIERS, Run, available_tiers, begin, choose_tier

__all__ = [
    "MODELS",
    "PUBLISHED",
    "RECIPES",
    "TIERS",
    "ClosedForm",
    "ClosedFormRun",
    "Config",
    "ConvolutionRun",
    "Diverged",
    "GraphedRun",
    "Interrupted",
    "Muon",
    "MuonAdam",
    "Recipe",
    "Reporter",
    "Result",
    "Run",
    "UsageError",
    "WindowedRun",
    "available_tiers",
    "begin",
    "choose_tier",
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
        "autograd": ["ConvolutionRun", "WindowedRun"],
        "closed_form": ["ClosedForm", "ClosedFormRun", "MuonAdam"],
        "config": ["MODELS", "Config", "Diverged", "Interrupted", "UsageError"],
        "cuda_graph": ["GraphedRun"],
        "loop": ["Reporter", "Result", "few_threads", "fit", "read_config", "threads", "train"],
        "optim": ["Muon"],
        "recipes": ["PUBLISHED", "RECIPES", "Recipe", "read_recipe", "vary"],
        "setup": ["recompute_statistics"],
        "tiers": ["TIERS", "Run", "available_tiers", "begin", "choose_tier"],
    },
)
