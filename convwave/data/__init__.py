"""The data's way: words, tokens, evaluation graphs, batches."""

from typing import TYPE_CHECKING

from convwave._lazy import attach

if TYPE_CHECKING:
    from convwave.data.batches import ContextSampler, Plan, StepReader
    from convwave.data.graph import Graph, dense_graph, distinct_graph, graph_of_windows, select_windows, windowed_graph
    from convwave.data.packing import Corpus, Packed, Splits, Vocabulary, pack, pack_ids, split_words
    from convwave.data.words import (
        NAMES_SHA256,
        NAMES_URL,
        DataError,
        Words,
        bundled_words,
        fetch_names,
        load_words,
        read_words,
    )

__all__ = [
    "NAMES_SHA256",
    "NAMES_URL",
    "ContextSampler",
    "Corpus",
    "DataError",
    "Graph",
    "Packed",
    "Plan",
    "Splits",
    "StepReader",
    "Vocabulary",
    "Words",
    "bundled_words",
    "dense_graph",
    "distinct_graph",
    "fetch_names",
    "graph_of_windows",
    "load_words",
    "pack",
    "pack_ids",
    "read_words",
    "select_windows",
    "split_words",
    "windowed_graph",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "batches": [
            "ContextSampler",
            "Plan",
            "StepReader",
        ],
        "graph": [
            "Graph",
            "dense_graph",
            "distinct_graph",
            "graph_of_windows",
            "select_windows",
            "windowed_graph",
        ],
        "packing": [
            "Corpus",
            "Packed",
            "Splits",
            "Vocabulary",
            "pack",
            "pack_ids",
            "split_words",
        ],
        "words": [
            "NAMES_SHA256",
            "NAMES_URL",
            "DataError",
            "Words",
            "bundled_words",
            "fetch_names",
            "load_words",
            "read_words",
        ],
    },
)
