"""The studies: one file a question. Each says what is compared with what, at which sizes, the most telling first."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import convwave as cw
from benchmarks.harness import Row, Settings

MODES = {"train": True, "eval": False}
RATE = "positions per second"


@dataclass(frozen=True)
class Plan(Settings):
    """What a study is run with."""

    words: Sequence[str] = ()  # of the vocabulary and the batches
    quick: bool = False  # small sizes, few samples, nothing compiled

    @functools.cached_property
    def vocabulary(self) -> cw.Vocabulary:
        return cw.Vocabulary.from_words(self.words)

    def names(self, count: int) -> cw.Packed:
        """The first names of the post's shuffle, packed."""
        return cw.pack(cw.split_words(list(self.words)).train[:count], self.vocabulary)

    def document(self, positions: int) -> cw.Packed:
        """One text of this many positions: the letters of name after name."""
        text = "".join(self.words)
        return cw.pack([(text * (positions // len(text) + 1))[: positions - 1]], self.vocabulary)

    def network(self, n_embd: int = 10, n_hidden: int = 68, levels: int = 3) -> cw.ConvWave:
        """A network with the biased variance, which nn.BatchNorm1d shares; its statistics are those of some names."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cw.ConvWave(len(self.vocabulary), n_embd, n_hidden, levels, unbiased=False, backend="eager")
        with torch.no_grad():
            for _ in range(8):
                model.train()(cw.distinct_graph(self.names(200), levels))
        return model


class Step(NamedTuple):
    """A part of a study: it is measured, then the file is written."""

    point: tuple[str, str | None, float | str | None]  # mode, name of x, x
    measure: Callable[..., list[Row]]  # called with the arguments, then the point that this stands at
    arguments: tuple[object, ...] = ()


class Picture(NamedTuple):
    """A picture of a study: one metric of one mode, as lines over x or as bars, grouped by x."""

    title: str
    metric: str
    mode: str
    label: str
    kind: str = "lines"


class Study(NamedTuple):
    """A named study: the question that it answers, its steps, its pictures."""

    name: str
    question: str
    steps: Callable[[Plan], Iterator[Step]]
    pictures: Sequence[Picture]


ORDER = ("names", "context", "width", "train", "sample", "roofline", "ladder", "launches", "breakeven")
MODULES = {name: importlib.import_module(f"benchmarks.studies.{name}") for name in ORDER}
STUDIES = {name: Study(name, module.QUESTION, module.steps, module.PICTURES) for name, module in MODULES.items()}
