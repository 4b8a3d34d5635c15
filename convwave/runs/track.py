"""Other people's trackers: the records of `metrics` through TensorBoard or Trackio, imported when asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Follows a run."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of `metrics`."""

    def close(self) -> None:
        """After the last one."""


class TensorBoard:
    """Event files in the run's folder, under ``tensorboard``.

    Args:
        folder: of the run.
        config: its configuration as plain JSON values.
        done: steps that it has done; what was logged of later ones is hidden.

    Raises:
        ImportError: the library is missing.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), 0)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of Trackio's project "convwave", named after the run's folder; a run that is continued is resumed there.

    Args, Raises: those of `TensorBoard`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], done: int) -> None:
        import trackio

        self._trackio = trackio
        name = folder.resolve().name
        with redirect_stdout(sys.stderr):  # where it prints, standard output is for --json
            trackio.init(project="convwave", name=name, config=dict(config), resume="allow")

    def log(self, record: Mapping[str, Any]) -> None:
        values = dict(scalars(record))
        if values:
            self._trackio.log(values, step=record["step"])

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name: loss, val_loss, seconds; gradient_norm/PARAMETER, level0/saturated, ..."""
    for name, value in record.items():
        if name in ("loss", "val_loss", "seconds"):
            yield name, value
    found = record.get("diagnostics", {})
    for kind in ("gradient_norm", "update_ratio"):
        for name, value in found.get(kind, {}).items():
            if value is not None:
                yield f"{kind}/{name}", value
    for number, level in enumerate(found.get("levels", ())):
        for name in ("mean", "deviation", "saturated", "dead"):
            yield f"level{number}/{name}", level[name]
