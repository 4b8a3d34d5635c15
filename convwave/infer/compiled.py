"""Exact losses by the compiled loops of `ops.loops`, in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from convwave.data.graph import Graph
from convwave.nn import ConvWave
from convwave.ops import loops
from convwave.ops.compiled import MOST_ROWS, everything, memory_for, text_of, threads_of_torch
from convwave.ops.fold import folded


class CompiledLosses:
    """A distinct graph prepared for evaluating networks of two taps and one width in float32 on it.

    Args:
        graph: on the CPU.
    """

    def __init__(self, graph: Graph) -> None:
        self._tokens = 1 + max(int(graph.tokens.max()), int(graph.target_ids.max()))
        self._part = everything(text_of(graph), self._tokens)
        self._nll = np.empty(graph.target_ids.numel(), np.float32)
        self._memory: dict[int, tuple[loops.Floats, loops.Floats]] = {}

    @staticmethod
    def fits(graph: Graph) -> bool:
        """Whether the loops compute this graph at once."""
        return set(graph.factors) == {2} and max(weights.numel() for weights in graph.weights) <= MOST_ROWS

    def takes(self, model: ConvWave) -> bool:
        """Whether the loops compute this network."""
        return (
            model.factors == (2,) * self._part.totals.size
            and len(set(model.widths)) == 1
            and model.embedding.weight.dtype == torch.float32
            and model.vocab_size >= self._tokens
        )

    @torch.no_grad()
    def __call__(self, model: ConvWave) -> Tensor:
        """(T,) negative log-likelihood of every pair of context and target, in the graph's order, in evaluation mode.

        The result is overwritten by the next call.
        """
        matrices, shifts = [], []
        for block in model.layers:
            weight, shift = folded(block.level())
            matrices.append(weight.permute(2, 1, 0).contiguous().numpy())
            shifts.append(torch.stack([shift, shift]))
        H = model.widths[0]
        rest = np.stack(matrices[1:]) if len(matrices) > 1 else np.empty((0, 2, H, H), np.float32)
        vectors = (model.embedding.weight, torch.stack(shifts), model.head.weight, model.head.bias)
        embedding, norms, head, bias = (tensor.contiguous().numpy() for tensor in vectors)
        net = loops.Network(embedding, norms, head, bias, matrices[0], rest)
        if H not in self._memory:
            self._memory[H] = memory_for(self._part, H, self._tokens, loops.BLOCK)
        with threads_of_torch():
            loops.losses(net, self._part, *self._memory[H], self._nll)
        return torch.from_numpy(self._nll)
