"""Generation: reading sequences letter by letter, each time asking what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import convwave as cw
from benchmarks.harness import Results, Work
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Network, compiled, inference

QUESTION = "Generation: what does the cache save?"
PICTURES = (Picture("Reading letter by letter", "positions_per_second", "eval", "characters per second"),)
PROVIDERS = ("windowed MLP", "dense, no cache", "cached")
CHARACTERS = 16  # that every sequence reads and continues


def steps(plan: Plan) -> Iterator[Step]:
    for batch in plan.pick((1, 32), (1024, 1, 32, 8192)):
        providers = PROVIDERS + ("windowed MLP, compiled",) * (batch in (1, 1024))
        yield plan.step(("eval", "sequences", batch), partial(Reading, plan, batch), providers, "windowed MLP")


class Reading:
    """The task: `batch` sequences of random letters, and the logits after the last."""

    def __init__(self, plan: Plan, batch: int) -> None:
        self.positions, self.model = batch * CHARACTERS, plan.network().eval()
        generator = torch.Generator().manual_seed(0)
        letters = torch.randint(1, len(plan.vocabulary), (batch, CHARACTERS), generator=generator)
        letters[:, 0] = 0
        exact = Network(cw.pack_ids(letters[:, 1:].tolist()), self.model, False, plan.device).expected()["logits"]
        self._last = exact.view(batch, CHARACTERS, -1)[:, -1]
        self.tokens, self.model = letters.to(plan.device), self.model.to(plan.device)

    def expected(self) -> Results:
        return {"logits": self._last}

    def make(self, provider: str) -> Work:
        """Of "windowed MLP", which may be "compiled", "dense, no cache" and "cached"."""
        name, _, how = provider.partition(", ")
        readers = {"windowed MLP": self._windowed, "dense": self._dense, "cached": self._cached}
        return inference(readers[name](how), lambda out: {"logits": out})

    def _windowed(self, how: str) -> Callable[[], Tensor]:
        call = compiled(cw.to_torch(self.model).to(self.tokens.device).eval(), how)
        padded = F.pad(self.tokens, (self.model.context - 1, 0))
        windows = [padded[:, t : t + self.model.context] for t in range(CHARACTERS)]
        return lambda: [call(window) for window in windows][-1]

    def _cached(self, how: str) -> Callable[[], Tensor]:
        columns = list(self.tokens.T)

        def read() -> Tensor:
            cache = cw.GenerationCache(self.model, self.tokens.shape[0])
            return [cache.step(column) for column in columns][-1]

        return read

    def _dense(self, how: str) -> Callable[[], Tensor]:
        """All that was read up to then, again for every letter."""
        texts = [cw.pack_ids(self.tokens[:, 1 : t + 1].tolist()) for t in range(CHARACTERS)]
        graphs = [cw.dense_graph(packed, factors=self.model.factors).to(self.tokens.device) for packed in texts]
        return lambda: [self.model(graph) for graph in graphs][-1].view(*self.tokens.shape, -1)[:, -1]
