"""Exact losses of a network on the post's split, over the distinct subcontexts of the whole text at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data import Splits, Vocabulary, pack
from convwave.graph import Graph, distinct_graph
from convwave.inference import Inference
from convwave.nn import ConvWave

SPLITS = ("train", "val", "novel_val", "test")


class SplitLoss(NamedTuple):
    """Mean cross-entropy in nats over the positions of a split; None where the split has none."""

    loss: float | None
    positions: int


class EvaluationSet:
    """Everything about a text that evaluating a network on it needs: prepare once, evaluate often.

    Args:
        splits: the words.
        vocabulary: of the networks to come.
        factors: of the networks to come.
        device: where to evaluate.

    Attributes:
        graph: of all positions of all splits, over distinct subcontexts.
        masks: per split, (N,) bool over the packed positions. "novel_val" are the validation words that the training
            split does not contain.
    """

    def __init__(
        self,
        splits: Splits,
        vocabulary: Vocabulary,
        factors: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> None:
        packed = pack([*splits.train, *splits.val, *splits.test], vocabulary)
        self.graph: Graph = distinct_graph(packed, factors=factors).to(device)
        self.targets = packed.targets.to(device)
        assert self.graph.inverse is not None
        vocab_size = len(vocabulary)
        pairs, self._pair = torch.unique(self.graph.inverse * vocab_size + self.targets, return_inverse=True)
        self._pair_rows, self._pair_targets = pairs // vocab_size, pairs % vocab_size
        self._infer = Inference(self.graph) if self.targets.device.type == "cpu" else None

        train = set(splits.train)
        novel = [word not in train for word in splits.val]
        start_val, start_test = len(splits.train), len(splits.train) + len(splits.val)
        of_words = {name: torch.zeros(packed.num_words, dtype=torch.bool) for name in SPLITS}
        of_words["train"][:start_val] = True
        of_words["val"][start_val:start_test] = True
        of_words["novel_val"][start_val:start_test] = torch.tensor(novel, dtype=torch.bool)
        of_words["test"][start_test:] = True
        lengths = packed.cu_seqlens.diff()
        self.masks: dict[str, Tensor] = {
            name: mask.repeat_interleave(lengths).to(device) for name, mask in of_words.items()
        }
        # (splits, pairs) how many positions of a split have a context with a target
        self._counts = torch.stack(
            [torch.bincount(self._pair[mask], minlength=pairs.numel()).double() for mask in self.masks.values()]
        )
        self._positions: list[int] = self._counts.sum(1).long().tolist()

    @torch.no_grad()
    def nll(self, model: ConvWave) -> Tensor:
        """(N,) negative log-likelihood of every packed position's target, in evaluation mode."""
        return self._of_pairs(model).index_select(0, self._pair)

    @torch.no_grad()
    def _of_pairs(self, model: ConvWave) -> Tensor:
        """The same for every different context with every target that it has: 88,331 in names.txt."""
        if self._infer is not None:
            logp = self._infer(model)
        else:
            training = model.training
            model.eval()
            logp = F.log_softmax(model(self.graph), dim=1)
            model.train(training)
        return logp.view(-1).index_select(0, self._pair_rows * logp.shape[1] + self._pair_targets).neg_()

    def losses(self, model: ConvWave) -> dict[str, SplitLoss]:
        """Loss and number of positions of every split."""
        sums = (self._counts @ self._of_pairs(model).double()).tolist()
        return {
            name: SplitLoss(total / positions if positions else None, positions)
            for name, total, positions in zip(self.masks, sums, self._positions, strict=True)
        }
