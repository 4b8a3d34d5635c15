"""Output for people, all on standard error: a progress bar on a terminal, plain lines elsewhere, tables; and JSON.

Importing it imports rich and torch, so commands do it when they run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from convwave.data.packing import Corpus
from convwave.data.words import Words, load_words
from convwave.files import quoted
from convwave.train.config import Config, UsageError
from convwave.train.loop import Reporter


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        """The reader has gone: be quiet from now on, and let the work continue."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def stderr() -> Console:
    """A console on the current standard error; lines are not wrapped unless it is a terminal."""
    console = _Stderr(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        console = _Stderr(stderr=True, highlight=False, markup=False, width=260, soft_wrap=True)
    return console


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """First column left-aligned, the others right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left")
    for row in rows:
        result.add_row(*row)
    return result


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class ConsoleReporter(Reporter):
    """Progress with loss, positions per second and time left: a bar on a terminal; elsewhere lines, every two seconds
    at first, later whenever 5 % of the elapsed time has passed.
    """

    def __init__(self) -> None:
        self.console = stderr()
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def start(self, config: Config, parameters: int, done: int) -> None:
        self.steps, self.done = config.steps, done
        self.shown = self.started = time.perf_counter()
        self.first, self.positions = done, 0
        self.loss = float("nan")
        self.message(
            f"training {config.model} ({parameters:,} parameters) by recipe {config.recipe.name}: "
            f"{config.steps:,} steps, seed {config.seed}, {config.device}, tier {config.tier}"
        )
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} positions/s "),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=5,
            )
            self.task = self.progress.add_task("train", total=config.steps, completed=done, loss=self.loss, rate=0.0)
            self.progress.start()

    def step(self, done: int, loss: float, positions: int) -> None:
        self.positions += positions
        # a running mean, because a single batch of 32 windows is mostly noise
        self.loss = loss if done == self.first + 1 else self.loss + 0.02 * (loss - self.loss)
        self.done = done
        now = time.perf_counter()
        if now - self.shown < (0.1 if self.progress else max(2.0, 0.05 * (now - self.started))):
            return
        self.shown = now
        rate = self.positions / (now - self.started)
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=done, loss=self.loss, rate=rate)
        else:
            left = (now - self.started) / (done - self.first) * (self.steps - done)
            self.message(
                f"step {done:,} of {self.steps:,}  loss {self.loss:.4f}  {rate:,.0f} positions/s  {left:.0f} s left"
            )

    def stop(self) -> None:
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=self.done, loss=self.loss)
            self.progress.stop()
            self.progress = None

    def message(self, text: str) -> None:
        self.console.print(text)


def corpus(args: argparse.Namespace) -> Corpus:
    """The words of ``--data``, announced."""
    return announced(load_words(args.data))


def announced(words: Words) -> Corpus:
    """Words, announced."""
    note = f", {words.blank_lines} blank lines skipped" if words.blank_lines else ""
    stderr().print(f"data: {words.source}, {len(words.words):,} words{note}")
    return Corpus(words)


def check_device(device: str) -> None:
    """Raises UsageError for a device that is not there."""
    import torch

    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device: {quoted(device)} is not available: {reason}") from None
    # torch takes every number of a CPU
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and torch.device(device).index not in (None, 0)):
        raise UsageError(f"--device: expected cpu or cuda, got {quoted(device)}")


def print_json(args: argparse.Namespace, value: dict[str, Any]) -> None:
    """One line on standard output where --json asks for it."""
    if args.json:
        write(json.dumps(value, allow_nan=False) + "\n")


def write(text: str) -> None:
    """Write to standard output; a reader that has gone, as in `convwave sample | head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        if not isinstance(error, BrokenPipeError):  # a full disk
            raise OSError(error.errno, error.strerror, "standard output") from None
