"""Exact losses of a network on the post's split, over the distinct subcontexts of the whole text at once.

`Inference` is `ConvWave` in evaluation mode with the arithmetic of `train.closed_form`: BatchNorm folded into the
weights, rows below multiplied by each tap once, then gathered; a logistic instead of the tanh; logits padded to whole
vectors. The top level is processed in blocks that fit the cache, and only its log-probabilities are kept.

On a CUDA device `ops.library.score_names` evaluates every position of every word in one launch, and those of the
distinct pairs of context and target are picked; a network that its kernel does not take goes level by level over the
distinct subcontexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.batches import Parts, padded
from convwave.data.graph import Graph, distinct_graph_and_targets
from convwave.data.packing import Packed, Splits, Vocabulary, pack
from convwave.nn import ConvBatchNormTanh, ConvWave, evaluating
from convwave.ops.fold import Buffers, fold_head, folded
from convwave.ops.level import Level
from convwave.ops.library import runs_kernels, score_names, why_not_score_names

_BLOCK = 4096  # rows: 1.1 MB of 68 float32 channels; 2,048 and 16,384 are slower by a tenth
_POSITIONS = 2**22  # counted at once

SPLITS = ("train", "val", "novel_val", "test")


class SplitLoss(NamedTuple):
    """Mean cross-entropy in nats over the positions of a split; None where the split has none."""

    loss: float | None
    positions: int


class EvaluationSet:
    """A text prepared for evaluating networks on it: prepare once, evaluate often.

    Args:
        splits: the words.
        vocabulary, factors: of the networks that will be evaluated.
        device: where to evaluate.
        compiled: by the compiled loops of `ops.loops` where they take the network, on a CPU; else by PyTorch.

    Attributes:
        graph: of all positions of all splits, over distinct subcontexts.
        masks: per split, (N,) bool over the packed positions. "novel_val" is the validation words that are not in the
            training split.
    """

    def __init__(
        self,
        splits: Splits,
        vocabulary: Vocabulary,
        factors: tuple[int, ...],
        device: torch.device | str = "cpu",
        compiled: bool = False,
    ) -> None:
        packed = pack([*splits.train, *splits.val, *splits.test], vocabulary)
        graph, pair = distinct_graph_and_targets(packed, factors=factors)
        self.graph, self._pair = graph.to(device), pair.to(device)
        self.targets = packed.targets.to(device)
        self._words = splits, vocabulary
        self._compiled = None
        if compiled and self.targets.device.type == "cpu":
            from convwave.infer.compiled import CompiledLosses

            self._compiled = CompiledLosses(self.graph) if CompiledLosses.fits(self.graph) else None

        train = set(splits.train)
        novel = [word not in train for word in splits.val]
        start_val, start_test = len(splits.train), len(splits.train) + len(splits.val)
        of_words = {name: torch.zeros(packed.num_words, dtype=torch.bool, device="cpu") for name in SPLITS}
        of_words["train"][:start_val] = True
        of_words["val"][start_val:start_test] = True
        of_words["novel_val"][start_val:start_test] = torch.tensor(novel, dtype=torch.bool, device="cpu")
        of_words["test"][start_test:] = True
        lengths = packed.cu_seqlens.diff()
        self.masks: dict[str, Tensor] = {
            name: mask.repeat_interleave(lengths).to(device) for name, mask in of_words.items()
        }
        # (splits, pairs) how many positions of each split have each pair
        pairs = self.graph.target_ids.numel()
        self._counts = torch.zeros(len(SPLITS), pairs, dtype=torch.float64, device=device)
        for counts, mask in zip(self._counts, self.masks.values(), strict=True):
            for pair, chosen in zip(self._pair.split(_POSITIONS), mask.split(_POSITIONS), strict=True):
                counts.add_(torch.bincount(pair[chosen], minlength=pairs))
        self._positions: list[int] = self._counts.sum(1).long().tolist()

    @cached_property
    def _infer(self) -> Inference | None:
        return Inference(self.graph) if self.targets.device.type == "cpu" else None

    @cached_property
    def _names(self) -> tuple[Packed, Tensor]:
        """All words packed, for a kernel that reads them whole; and a position of every pair."""
        splits, vocabulary = self._words
        packed = pack([*splits.train, *splits.val, *splits.test], vocabulary).to(self.targets.device)
        example = torch.empty_like(self.graph.target_ids)
        example[self._pair] = torch.arange(len(packed), device=example.device)
        return packed, example

    @torch.no_grad()
    def nll(self, model: ConvWave) -> Tensor:
        """(N,) negative log-likelihood of every packed position's target, in evaluation mode."""
        return self._of_pairs(model).index_select(0, self._pair)

    @torch.no_grad()
    def _of_pairs(self, model: ConvWave) -> Tensor:
        """The same for every distinct pair of context and target: 88,331 in names.txt."""
        if self._compiled is not None and self._compiled.takes(model):
            return self._compiled(model)
        if self._infer is not None:
            return self._infer.nll(model)
        with evaluating(model):
            levels = [block.level() for block in model.layers]
            if model.factors == self.graph.factors and _takes_whole_names(model, levels):
                network = model.embedding.weight, levels, model.head.weight, model.head.bias
                packed, example = self._names
                return score_names(*network, packed, precision=model.precision).index_select(0, example)
            logp = F.log_softmax(model(self.graph), dim=1)
        return -logp[self.graph.target_rows, self.graph.target_ids]

    def losses(self, model: ConvWave) -> dict[str, SplitLoss]:
        """Loss and number of positions of every split."""
        sums = (self._counts @ self._of_pairs(model).double()).tolist()
        return {
            name: SplitLoss(total / positions if positions else None, positions)
            for name, total, positions in zip(self.masks, sums, self._positions, strict=True)
        }


def _takes_whole_names(model: ConvWave, levels: Sequence[Level]) -> bool:
    """Whether one launch of a kernel can evaluate a network, and takes no module's place that is watched."""
    kernels = model.backend == "triton" and runs_kernels(model.embedding.weight)
    return kernels and model.plain and not why_not_score_names(levels, model.vocab_size)


class Inference:
    """A graph prepared for evaluating networks on it.

    Args:
        graph: any graph, on the CPU.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        everything = torch.arange(graph.num_rows, device=graph.tokens.device)
        parts = Parts(graph, int(graph.tokens.max()) + 1)
        self._whole = parts.part(everything, graph.weights[-1], graph.totals[-1], graph.weights[-1])
        self._buffers: dict[torch.dtype, Buffers] = {}

    @torch.no_grad()
    def __call__(self, model: ConvWave) -> Tensor:
        """Log-probabilities (graph.num_rows, V) of a network of the graph's factors.

        Raises:
            ValueError: the network's factors differ from the graph's.
        """
        return torch.cat([logp[:, : model.vocab_size].clone() for _, logp in self._blocks(model)])

    @torch.no_grad()
    def nll(self, model: ConvWave) -> Tensor:
        """(M,) negative log-likelihood of every target of a distinct graph, whose rows ascend."""
        rows, targets = self.graph.target_rows, self.graph.target_ids
        assert rows is not None
        result = model.embedding.weight.new_empty(0)
        for start, logp in self._blocks(model):
            if start == 0:
                result = logp.new_empty(rows.numel())
            begin, end = torch.searchsorted(rows, rows.new_tensor([start, start + logp.shape[0]])).tolist()
            places = (rows[begin:end] - start).mul_(logp.shape[1]).add_(targets[begin:end])
            torch.index_select(logp.view(-1), 0, places, out=result[begin:end])
        return result.neg_()

    def _blocks(self, model: ConvWave) -> Iterator[tuple[int, Tensor]]:
        """First row, and log-probabilities (n, V'), of one block of top rows after the other; overwritten by the next.

        The columns from V on are padding.
        """
        if model.factors != self.graph.factors:
            raise ValueError(f"model: expected factors {self.graph.factors}, got {model.factors}")
        x = model.embedding.weight
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is not summed in itself
        buffer = self._buffers.setdefault(x.dtype, Buffers(x))
        columns = padded(model.vocab_size)
        head_weight, head_bias = x.new_empty(columns, model.widths[-1]), x.new_empty(columns)
        fold_head(model.head.weight, model.head.bias, head_weight, head_bias)
        for level, block in enumerate(model.layers):
            taps, H = self._whole.taps[level], model.widths[level]
            top = level == self.graph.levels - 1
            weights, shift = (part.to(x.dtype) for part in _folded(block, after_a_logistic=level > 0))
            N, rows = taps.shape[1], min(_BLOCK, taps.shape[1])
            z = buffer(f"z{level % 2}", rows if top else N, H)
            conv = self._conv(level, x, weights, shift, buffer)
            for start in range(0, N, rows):
                part = slice(start, min(start + rows, N))
                n = part.stop - start
                s = z[:n] if top else z[part]
                conv(part, s)
                s.sigmoid_()
                if top:
                    logits = torch.addmm(head_bias, s, head_weight.T, out=buffer("logits", n, columns))
                    yield start, torch.log_softmax(logits, 1, out=buffer("logp", n, columns))
            x = z

    def _conv(
        self, level: int, x: Tensor, weights: Tensor, shift: Tensor, buffer: Buffers
    ) -> Callable[[slice, Tensor], None]:
        """A function that writes the pre-activations of some rows of a level: (part, out (n, H))."""
        taps, ranges = self._whole.taps[level], [slice(*of_tap) for of_tap in self._whole.ranges[level]]
        H = shift.numel()

        if sum(of_tap.stop - of_tap.start for of_tap in ranges) >= taps.shape[1]:  # little is shared

            def gather_first(part: slice, out: Tensor) -> None:
                scratch = buffer("scratch", out.shape[0], x.shape[1])
                for j, (of_tap, weight) in enumerate(zip(ranges, weights, strict=True)):
                    read = torch.index_select(x[of_tap], 0, taps[j, part], out=scratch)
                    torch.addmm(out if j else shift, read, weight, out=out)

            return gather_first

        products = []
        for j, (of_tap, weight) in enumerate(zip(ranges, weights, strict=True)):
            product = buffer(f"products{j}", of_tap.stop - of_tap.start, H)
            torch.mm(x[of_tap], weight, out=product) if j else torch.addmm(shift, x[of_tap], weight, out=product)
            products.append(product)

        def multiply_first(part: slice, out: Tensor) -> None:
            torch.index_select(products[0], 0, taps[0, part], out=out)
            for product, tap in zip(products[1:], taps[1:], strict=True):
                out.add_(torch.index_select(product, 0, tap[part], out=buffer("scratch", *out.shape)))

        return multiply_first


def _folded(block: ConvBatchNormTanh, after_a_logistic: bool) -> tuple[Tensor, Tensor]:
    """Weights (k, C, H) and the shift (H,) of twice a level's normalised pre-activation."""
    matrix, shift = folded(block.level())
    weight, shift = 2 * matrix.permute(2, 1, 0), 2 * shift
    if after_a_logistic:
        return 2 * weight, shift - weight.sum((0, 1))
    return weight, shift
