"""convwave: the WaveNet-style MLP of names as a stack of dilated causal convolutions, equal number by number.

>>> import convwave as cw
>>> words = cw.load_words().words
>>> vocab = cw.Vocabulary.from_words(words)
>>> packed = cw.pack(words[:32], vocab)
>>> graph = cw.dense_graph(packed)
>>> model = cw.ConvWave(len(vocab))
>>> logits = model(graph)
>>> loss = cw.loss(logits, graph)
"""

from typing import TYPE_CHECKING

from convwave._lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convwave import nn, reference
    from convwave.convert import ConversionError, from_windowed, to_torch, to_windowed
    from convwave.data import (
        Corpus,
        DataError,
        Graph,
        Packed,
        Splits,
        Vocabulary,
        Words,
        dense_graph,
        distinct_graph,
        graph_of_windows,
        load_words,
        pack,
        pack_ids,
        read_words,
        select_windows,
        split_words,
        windowed_graph,
    )
    from convwave.files import CheckpointError
    from convwave.infer import EvaluationSet, GenerationCache, sample
    from convwave.nn import BatchNorm, CausalConv1d, ConvBatchNormTanh, ConvWave, load
    from convwave.ops import available_backends, conv_bn_tanh, loss

__all__ = [
    "BatchNorm",
    "CausalConv1d",
    "CheckpointError",
    "ConvBatchNormTanh",
    "ConvWave",
    "ConversionError",
    "Corpus",
    "DataError",
    "EvaluationSet",
    "GenerationCache",
    "Graph",
    "Packed",
    "Splits",
    "Vocabulary",
    "Words",
    "available_backends",
    "conv_bn_tanh",
    "dense_graph",
    "distinct_graph",
    "from_windowed",
    "graph_of_windows",
    "load",
    "load_words",
    "loss",
    "nn",
    "pack",
    "pack_ids",
    "read_words",
    "reference",
    "sample",
    "select_windows",
    "split_words",
    "to_torch",
    "to_windowed",
    "windowed_graph",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "convert": ["ConversionError", "from_windowed", "to_torch", "to_windowed"],
        "data": [
            "Corpus",
            "DataError",
            "Graph",
            "Packed",
            "Splits",
            "Vocabulary",
            "Words",
            "dense_graph",
            "distinct_graph",
            "graph_of_windows",
            "load_words",
            "pack",
            "pack_ids",
            "read_words",
            "select_windows",
            "split_words",
            "windowed_graph",
        ],
        "files": ["CheckpointError"],
        "infer": ["EvaluationSet", "GenerationCache", "sample"],
        "nn": ["BatchNorm", "CausalConv1d", "ConvBatchNormTanh", "ConvWave", "load"],
        "ops": ["available_backends", "conv_bn_tanh", "loss"],
        "reference": [],
        "runs": [],
        "train": [],
        "verify": [],
    },
)
