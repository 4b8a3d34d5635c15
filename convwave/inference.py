"""Log-probabilities of all rows of a graph at once, in evaluation mode, on a CPU.

`ConvWave` in evaluation mode with the arithmetic of `closed_form`: BatchNorm folded into the weights, both taps
multiplied once for every row below and gathered after, a logistic for the tanh, logits in whole vectors. The top level
goes through the cache in blocks and leaves nothing but its log-probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convwave.closed_form import Buffers, Parts, fold_head, padded
from convwave.graph import Graph
from convwave.nn import ConvBatchNormTanh, ConvWave

_BLOCK = 4096  # rows: 1.1 MB of 68 float32 channels; 2,048 and 16,384 are slower by a tenth


class Inference:
    """A graph prepared for evaluating networks on it.

    Args:
        graph: any graph, on the CPU.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        everything = torch.arange(graph.num_rows)
        parts = Parts(graph, int(graph.tokens.max()) + 1)
        self._whole = parts.part(everything, graph.weights[-1], graph.totals[-1], graph.weights[-1])
        self._buffers: dict[torch.dtype, Buffers] = {}

    @torch.no_grad()
    def __call__(self, model: ConvWave) -> Tensor:
        """Log-probabilities (graph.num_rows, V') of a network of the graph's factors; columns from V on are no tokens.

        The result is overwritten by the next call.

        Raises:
            ValueError: the network has other factors.
        """
        if model.factors != self.graph.factors:
            raise ValueError(f"model: expected factors {self.graph.factors}, got {model.factors}")
        x = model.embedding.weight
        buffer = self._buffers.setdefault(x.dtype, Buffers(x))
        columns = padded(model.vocab_size)
        head_weight, head_bias = x.new_empty(columns, model.widths[-1]), x.new_empty(columns)
        fold_head(model.head.weight, model.head.bias, head_weight, head_bias)
        result = buffer("result", self.graph.num_rows, columns)
        for level, block in enumerate(model.layers):
            taps, H = self._whole.taps[level], model.widths[level]
            top = level == self.graph.levels - 1
            weights, shift = _folded(block, after_a_logistic=level > 0)
            products = []
            for j, (begin, end) in enumerate(self._whole.ranges[level]):
                out = buffer(f"products{j}", end - begin, H)
                if j == 0:
                    products.append(torch.addmm(shift, x[begin:end], weights[j], out=out))
                else:
                    products.append(torch.mm(x[begin:end], weights[j], out=out))
            N = taps.shape[1]
            rows = min(_BLOCK, N) if top else N
            for start in range(0, N, rows):
                n = min(rows, N - start)
                z, scratch = buffer(f"z{level % 2}", n, H), buffer("scratch", n, H)
                torch.index_select(products[0], 0, taps[0, start : start + n], out=z)
                for j in range(1, len(products)):
                    z.add_(torch.index_select(products[j], 0, taps[j, start : start + n], out=scratch))
                x = z.sigmoid_()
                if top:
                    logits = torch.addmm(head_bias, x, head_weight.T, out=buffer("logits", n, columns))
                    torch.log_softmax(logits, 1, out=result[start : start + n])
        return result


def _folded(block: ConvBatchNormTanh, after_a_logistic: bool) -> tuple[Tensor, Tensor]:
    """Weights (k, C, H) and the shift (H,) of twice a level's normalised pre-activation."""
    weight, norm = block.conv.weight.permute(2, 1, 0), block.norm
    scale = 2 * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = 2 * norm.bias - norm.running_mean * scale
    weight = weight * scale
    if after_a_logistic:
        return 2 * weight, shift - weight.sum((0, 1))
    return weight, shift
