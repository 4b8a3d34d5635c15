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

__version__ = "0.1.0"

from convwave import reference
from convwave.checkpoint import CheckpointError
from convwave.checkpoint import load_model as load
from convwave.convert import ConversionError, from_windowed, to_torch, to_windowed
from convwave.data import (
    DataError,
    Packed,
    Splits,
    Vocabulary,
    Words,
    load_words,
    pack,
    pack_ids,
    read_words,
    split_words,
)
from convwave.evaluation import EvaluationSet
from convwave.functional import conv_bn_tanh, loss
from convwave.generation import GenerationCache, sample
from convwave.graph import Graph, dense_graph, distinct_graph, graph_of_windows, select_windows, windowed_graph
from convwave.nn import BatchNorm, CausalConv1d, ConvBatchNormTanh, ConvWave
from convwave.ops import available_backends

__all__ = [
    "BatchNorm",
    "CausalConv1d",
    "CheckpointError",
    "ConvBatchNormTanh",
    "ConvWave",
    "ConversionError",
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
