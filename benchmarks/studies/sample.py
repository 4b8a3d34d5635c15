"""Generation: reading sequences letter by letter, each time asking what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import convwave as cw
from benchmarks.harness import Competitor, Results, Row, Work, compare, numeric_flags
from benchmarks.studies import Picture, Plan, Step
from benchmarks.tasks import Network, compiled

Reader = Callable[[cw.ConvWave, Tensor], Callable[[], Tensor]]
CHARACTERS = 16  # that every sequence reads and continues


def steps(plan: Plan) -> Iterator[Step]:
    for batch in (1, 32) if plan.quick else (1024, 1, 32, 8192):
        yield Step(("eval", "sequences", batch), _measure, (plan, batch))


def _measure(plan: Plan, batch: int, point: Row) -> list[Row]:
    competitors, expected = generation(plan, batch)
    if plan.quick or batch not in (1, 1024):
        competitors.pop()
    with numeric_flags():
        return compare(competitors, expected, point, plan, positions=batch * CHARACTERS, baseline="windowed MLP")


def generation(plan: Plan, batch: int) -> tuple[list[Competitor], Results]:
    """Who reads `batch` sequences, and the logits that they must arrive at."""
    model = plan.network().eval()
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(1, len(plan.vocabulary), (batch, CHARACTERS), generator=generator)
    letters[:, 0] = 0
    exact = Network(cw.pack_ids(letters[:, 1:].tolist()), model, False, plan.device).expected()["logits"]
    tokens, model = letters.to(plan.device), model.to(plan.device)
    readers: dict[str, Reader] = {
        "windowed MLP": partial(_windowed, compile=False),
        "dense, no cache": _dense,
        "cached": _cached,
        "windowed MLP, compiled": partial(_windowed, compile=True),
    }

    def make(reader: Reader) -> Work:
        read = torch.no_grad()(reader(model, tokens))
        return Work(read, lambda: {"logits": read()})

    competitors = [Competitor(name, partial(make, reader)) for name, reader in readers.items()]
    return competitors, {"logits": exact.view(batch, CHARACTERS, -1)[:, -1]}


def _windowed(model: cw.ConvWave, tokens: Tensor, compile: bool) -> Callable[[], Tensor]:
    call = compiled(cw.to_torch(model).to(tokens.device).eval(), compile)
    padded = torch.nn.functional.pad(tokens, (model.context - 1, 0))
    windows = [padded[:, t : t + model.context] for t in range(tokens.shape[1])]
    return lambda: [call(window) for window in windows][-1]


def _cached(model: cw.ConvWave, tokens: Tensor) -> Callable[[], Tensor]:
    columns = list(tokens.T)

    def read() -> Tensor:
        cache = cw.GenerationCache(model, tokens.shape[0])
        return [cache.step(column) for column in columns][-1]

    return read


def _dense(model: cw.ConvWave, tokens: Tensor) -> Callable[[], Tensor]:
    """All that was read up to then, again for every letter."""
    texts = [cw.pack_ids(tokens[:, 1 : t + 1].tolist()) for t in range(tokens.shape[1])]
    graphs = [cw.dense_graph(packed, factors=model.factors).to(tokens.device) for packed in texts]

    def read() -> Tensor:
        for graph in graphs:
            logits = model(graph)
        return logits.view(*tokens.shape, -1)[:, -1]

    return read


QUESTION = "Generation: what does the cache save?"
PICTURES = (Picture("Reading letter by letter", "positions_per_second", "eval", "characters per second"),)
