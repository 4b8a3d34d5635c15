"""The studies: one file a question. Each says what is compared with what, at which sizes, the most telling first."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import convwave as cw
from benchmarks.harness import Row, Settings, compare, numeric_flags

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

    def pick(self, quick: Any, cpu: Any, cuda: Any = None) -> Any:
        """What fits: the first in a quick run, else the last on CUDA, where one is given."""
        return quick if self.quick else cuda if self.cuda and cuda is not None else cpu

    def step(
        self,
        point: tuple[str, str | None, float | str | None],
        make: Callable[[], Any],
        providers: Iterable[str],
        baseline: str,
        precision: str = "float32",
        after: Callable[[Any, Row, list[Row]], list[Row]] = lambda task, point, rows: rows,
    ) -> Step:
        """The step that compares competitors of a task; those that this plan runs: nothing compiled when quick, what
        needs a GPU on one alone. `after` makes the rows of the study from the task, the point and the measured rows.
        """
        absent = ["compiled", "max-autotune"] * self.quick
        absent += [] if self.cuda else ["triton", "max-autotune", "deterministic"]

        def measure(point: Row) -> list[Row]:
            with numeric_flags(precision):
                task = make()
                chosen = (name for name in providers if not any(word in name for word in absent))
                makers = [(name, functools.partial(task.make, name)) for name in chosen]
                numbers = {"positions": task.positions, "baseline": baseline}
                return after(task, point, compare(makers, task.expected(), point, self, **numbers))

        return Step(point, measure)


class Step(NamedTuple):
    """A part of a study: it is measured, then the file is written."""

    point: tuple[str, str | None, float | str | None]  # mode, name of x, x
    measure: Callable[[Row], list[Row]]  # called with the point that this stands at


class Picture(NamedTuple):
    """A picture of a study: one metric of one mode, as lines over x or as bars, one picture for every x."""

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
