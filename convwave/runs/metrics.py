"""metrics.jsonl: what a run measures while it trains, one JSON object a line, for anybody's tool to follow.

    {"step": 12, "loss": 2.513, "seconds": 0.14}      after every step; seconds of training so far
    {"step": 40, "val_loss": 2.206}                   where the validation loss was measured
    {"step": 40, "diagnostics": {..}}                 of that step, with `convwave train --diagnostics`
    {"step": 52, "state": "diverged", "message": ..}  the end of a run that diverged

Lines are written at most `_SECONDS` late. A run that is continued begins by making the file agree with the state that
it continues from, so every step is there once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convwave.files import write_atomic
from convwave.runs.plots import Point
from convwave.runs.track import Tracker

_SECONDS = 0.2  # between two writes
_TAIL = 2**16  # bytes

Record = dict[str, Any]


class Metrics:
    """The file of a run under way, and those who follow it.

    Args:
        path: of the file; None where the run has no folder.
        losses: of the steps that the state holds.
        validation: the validation losses that it holds.
        trackers: get every record too.
    """

    def __init__(
        self, path: Path | None, losses: Sequence[float], validation: Sequence[Point], trackers: Sequence[Tracker] = ()
    ) -> None:
        self._trackers = trackers
        self._lines: list[str] = []
        self._written = time.perf_counter()
        self._file = None
        if path is not None:
            _agree(path, losses, validation)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def add(self, record: Record) -> None:
        """Write a record, soon."""
        for tracker in self._trackers:
            tracker.log(record)
        if self._file is not None:
            self._lines.append(json.dumps(record) + "\n")
            if time.perf_counter() - self._written > _SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what waits: whole lines, in one call."""
        if self._file is not None and self._lines:
            self._file.write("".join(self._lines))
            self._file.flush()
            self._lines.clear()
        self._written = time.perf_counter()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a file; [] where there is none. A last line that was cut short is left out."""
    return list(_records(path.read_bytes())) if path.exists() else []


def last_metrics(path: Path) -> list[Record]:
    """The last records of a file, some hundreds at least."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        content = file.read()
    return list(_records(content if size <= _TAIL else content.partition(b"\n")[2]))


def _records(content: bytes) -> Iterator[Record]:
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record


def _agree(path: Path, losses: Sequence[float], validation: Sequence[Point]) -> None:
    """Make a file hold what a run with these losses has measured: later lines go, missing ones come."""
    found = read_metrics(path)
    known = {record["step"]: record for record in found if "loss" in record}
    kept: list[Record] = []
    for step, loss in enumerate(losses, 1):
        record = known.get(step, {})
        kept.append(record if record.get("loss") == loss else {"step": step, "loss": loss})
    kept += [{"step": point.step, "val_loss": point.loss} for point in validation]
    looks = {record["step"]: record for record in found if "diagnostics" in record}
    kept += [record for step, record in looks.items() if step <= len(losses)]
    kept.sort(key=lambda record: record["step"])  # stable: of one step the loss comes first
    content = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if not path.exists() or path.read_bytes() != content:
        write_atomic(path, content)
