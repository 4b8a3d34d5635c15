"""Using a trained network: exact losses, generation."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.infer.generate import GenerationCache, sample, sample_ids
    from convwave.infer.score import EvaluationSet, SplitLoss

__all__ = [
    "EvaluationSet",
    "GenerationCache",
    "SplitLoss",
    "sample",
    "sample_ids",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "generate": [
            "GenerationCache",
            "sample",
            "sample_ids",
        ],
        "score": [
            "EvaluationSet",
            "SplitLoss",
        ],
    },
)
