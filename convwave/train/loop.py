"""The loop: one for every tier, with or without anybody watching, which survives being killed.

On a CPU a run that was killed at any moment and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convwave.data.packing import Corpus, Packed, Vocabulary
from convwave.data.words import Words
from convwave.files import CheckpointError
from convwave.infer.score import EvaluationSet, SplitLoss
from convwave.nn import ConvWave
from convwave.runs.folder import Folder, State
from convwave.train.config import Config, Diverged, Interrupted, UsageError
from convwave.train.tiers import Run, begin

_SECONDS = 0.1  # of a block of steps while somebody watches


class Reporter:
    """What a run reports; does nothing by itself."""

    def start(self, config: Config, parameters: int, done: int) -> None:
        """Before the first step of this process."""

    def step(self, done: int, loss: float, positions: int) -> None:
        """After every step."""

    def stop(self) -> None:
        """After the last one, however it ended."""

    def message(self, text: str) -> None:
        """A line for a person."""


@dataclass(frozen=True)
class Result:
    """A finished training."""

    config: Config
    parameters: int
    seconds: float  # wall time of the training loop, interrupted runs added up
    losses: list[float]  # of every step
    splits: dict[str, SplitLoss]
    model: ConvWave
    checkpoint: Path | None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        splits = self.splits
        return {
            **self.config.summary(),
            "parameters": self.parameters,
            "train_seconds": self.seconds,
            "train_loss": splits["train"].loss,
            "val_loss": splits["val"].loss,
            "novel_val_loss": splits["novel_val"].loss,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
        }


def blocks(run: Run, first: int, stop: int, seconds: float = math.inf) -> Iterator[list[float]]:
    """Do steps `first` to ``stop - 1`` in blocks, and yield the losses of each.

    A block is as long as the tier can go without waiting for its device (`Run.block`), but not longer than about
    `seconds`: blocks then begin with one step and double while they are short.

    Raises:
        Diverged: a loss that is not finite.
    """
    size = run.block if seconds == math.inf else 1
    while first < stop:
        began = time.perf_counter()
        losses = run.steps(first, min(first + size, stop))
        for i, loss in enumerate(losses, first + 1):
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {i}")
        took = time.perf_counter() - began
        first += len(losses)
        yield losses
        size = min(2 * size, run.block) if took < seconds / 2 else max(size // 2, 1) if took > seconds else size


def fit(config: Config, train: Packed, vocabulary: Vocabulary) -> ConvWave:
    """The network that `train` ends with, and nothing else: no files, no evaluation, no progress.

    Args:
        config: what and how.
        train: the words to train on.
        vocabulary: theirs.

    Raises:
        Diverged: a loss that is not finite.
    """
    run = begin(config, train, vocabulary)
    with few_threads(config, run.model().num_parameters, train):
        for _ in blocks(run, 0, config.steps):
            pass
        return run.finish()


def train(
    config: Config,
    words: Words | Corpus,
    out: Path | None = None,
    *,
    resume: bool = False,
    save_every: float = 10.0,
    reporter: Reporter | None = None,
) -> Result:
    """Train a network and evaluate it.

    Args:
        config: what and how.
        words: the data; its split is the post's.
        out: directory for ``state.safetensors`` (to resume), ``model.safetensors``, ``loss.csv``, ``loss.png`` and
            ``result.json``; None writes nothing.
        resume: continue from the state in `out`, or begin where there is none.
        save_every: seconds between two savings of the state.
        reporter: of progress.

    Raises:
        DataError: no word is left to train on.
        UsageError: `out` holds a run already and `resume` is False, or another process is training there.
        CheckpointError: a state that cannot be used, or one of another configuration or other data.
        Diverged: a loss or a weight that is not finite; the last good state stays on the disk.
        Interrupted: Ctrl-C; the state is saved.
    """
    folder = None if out is None else Folder(out)
    with nullcontext(True) if folder is None else folder.locked() as ours:
        if not ours:
            raise UsageError(f"out: another process is training in {out}")
        if folder is not None and folder.holds_run() and not resume:
            raise UsageError(f"out: {out} holds a run already; continue it with --resume or choose another directory")
        corpus = words if isinstance(words, Corpus) else Corpus(words)
        training = _Training(config, corpus, folder, save_every, reporter or Reporter())
        try:
            training.steps()
            return training.result()
        except (Diverged, Interrupted) as error:
            kept = "" if folder is None else f"; {folder.state} holds the last good state, --resume continues from it"
            raise type(error)(f"{error}{kept}") from None


class _Training:
    """A run on its way to a `Result`, with the state on the disk that it began from."""

    def __init__(
        self, config: Config, corpus: Corpus, folder: Folder | None, save_every: float, reporter: Reporter
    ) -> None:
        self.config, self.corpus, self.folder, self.save_every = config, corpus, folder, save_every
        self.reporter = reporter
        self.run = begin(config, corpus.train, corpus.vocabulary)
        self.parameters = self.run.model().num_parameters
        self.losses: list[float] = []
        self.seconds = 0.0
        if folder is not None:
            folder.clear()
            if folder.state.exists():
                self._load(folder)

    def steps(self) -> None:
        """All steps that are not done yet, and what comes after the last."""
        config, began = self.config, time.perf_counter() - self.seconds
        saved = time.perf_counter()
        try:
            self.reporter.start(config, self.parameters, len(self.losses))
            with _interruptible() as interrupted, few_threads(config, self.parameters, self.corpus.train):
                if not self.losses:
                    self._save()  # so that even a run killed in its first second leaves something to resume
                for losses in blocks(self.run, len(self.losses), config.steps, _SECONDS):
                    for loss in losses:
                        self.losses.append(loss)
                        self.reporter.step(len(self.losses), loss, self.run.positions)
                    self.seconds = time.perf_counter() - began
                    if interrupted():
                        self._save()
                        raise Interrupted(f"stopped after step {len(self.losses)} of {config.steps}")
                    if time.perf_counter() - saved >= self.save_every:
                        self._save()
                        saved = time.perf_counter()
                self._save()
                self.model = self.run.finish()
                self.seconds = time.perf_counter() - began
                if interrupted():
                    raise Interrupted("stopped after the last step")
        finally:
            self.reporter.stop()

    def result(self) -> Result:
        """Evaluate the network, and write it and its figures where there is a folder."""
        config, corpus, folder, model = self.config, self.corpus, self.folder, self.model
        model.vocabulary, model.data_sha256 = corpus.vocabulary, corpus.sha256
        evaluation = EvaluationSet(corpus.splits, corpus.vocabulary, config.factors, config.device)
        checkpoint = None if folder is None else folder.model
        splits = evaluation.losses(model)
        for name, split in splits.items():
            if split.loss is not None and not math.isfinite(split.loss):
                raise Diverged(f"the loss of split {name} is {split.loss}")
        result = Result(config, model.num_parameters, self.seconds, self.losses, splits, model, checkpoint)
        if folder is not None:
            model.save(folder.model)
            title = f"{config.model}, recipe {config.recipe.name}"
            title += f": {result.parameters:,} parameters, {self.seconds:.1f} s"
            summary = {**result.summary(), "data": corpus.source, "data_sha256": corpus.sha256}
            folder.write_results(self.losses, summary, title)
        return result

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = self.run.state()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise Diverged(f"{name} is no longer finite after step {len(self.losses)}")
        self.folder.save(State(tensors, asdict(self.config), self.corpus.sha256, self.losses, self.seconds))

    def _load(self, folder: Folder) -> None:
        state = folder.load()
        saved, ours = _config_of(folder, state).summary(), self.config.summary()
        for values in (saved, ours):  # the recipe's name, then its fields
            values |= {f"the recipe's {name}": value for name, value in values.pop("recipe_fields").items()}
        for name, now in ours.items():
            if saved[name] != now:
                raise CheckpointError(f"{folder.state}: was made with {name} {saved[name]}, cannot continue with {now}")
        if state.data_sha256 != self.corpus.sha256:
            raise CheckpointError(f"{folder.state}: was trained on other data than {self.corpus.source}")
        self.losses, self.seconds = state.losses, state.seconds
        try:
            if self.losses:
                self.run.restore(state.tensors)
        except (KeyError, RuntimeError) as error:
            raise folder.unusable(error) from None
        self.reporter.message(f"resuming {folder.path} after step {len(self.losses)} of {self.config.steps}")


def read_config(out: Path) -> Config:
    """The configuration of the run in a directory; raises CheckpointError where there is none."""
    folder = Folder(out)
    return _config_of(folder, folder.load())


def _config_of(folder: Folder, state: State) -> Config:
    try:
        return Config.from_json(state.config)
    except (KeyError, TypeError, ValueError) as error:
        raise folder.unusable(error) from None


def few_threads(config: Config, parameters: int, train: Packed) -> AbstractContextManager[None]:
    """One thread where a step is so little work that several gain nothing, and lose much where a core is busy.

    22,397 parameters and 512 names, 80 million multiply-adds forward: 9.5 ms a step on one thread, 8.4 on two idle
    cores, 50 with another process on the second.
    """
    of_names = config.recipe.batch_of == "names"
    positions = config.batch * (len(train) / train.num_words if of_names else 1)
    return threads(1) if parameters * positions < 2e8 else nullcontext()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use that many threads: on batches of some dozen rows, one is faster than several."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between two steps; a second one interrupts at once."""
    seen = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
