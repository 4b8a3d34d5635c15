"""The folder of one run: its lock, the state to resume from, the network and the results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convwave.files import CheckpointError, read_tensors, write_atomic, write_tensors
from convwave.runs.plots import block_means, loss_csv, loss_plot

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Path("runs")  # where runs go that were given no other folder
STATE_FORMAT = "convwave.state.2"
STATE_FILE, MODEL_FILE, RESULT_FILE = "state.safetensors", "model.safetensors", "result.json"


@dataclass(frozen=True)
class State:
    """What a run needs to continue.

    Attributes:
        tensors: of the run, as its tier gave them.
        config: its configuration as plain JSON values.
        data_sha256: of the words.
        losses: of every step so far.
        seconds: of training so far.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    data_sha256: str
    losses: list[float]
    seconds: float


class Folder:
    """The folder of one run; nothing is made before `locked`.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state, self.model = path, path / STATE_FILE, path / MODEL_FILE

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other processes from training here until the end, however the process ends; False where one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield True
            return
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def holds_run(self) -> bool:
        return self.state.exists() or self.model.exists()

    def clear(self) -> None:
        """Delete what a run that was killed while it wrote has left."""
        for partial in self.path.glob(".*.partial"):
            partial.unlink()

    def save(self, state: State) -> None:
        import torch

        tensors = {**state.tensors, "losses": torch.tensor(state.losses, dtype=torch.float64)}
        metadata = {name: getattr(state, name) for name in ("config", "data_sha256", "seconds")}
        write_tensors(self.state, tensors, {"format": STATE_FORMAT, **metadata})

    def load(self) -> State:
        """The saved state; raises CheckpointError where there is none that can be used."""
        tensors, metadata = read_tensors(self.state, STATE_FORMAT)
        try:
            losses = tensors.pop("losses").tolist()
            return State(tensors, dict(metadata["config"]), metadata["data_sha256"], losses, float(metadata["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self.unusable(error) from None

    def unusable(self, error: Exception) -> CheckpointError:
        """What to raise where a state does not fit its run."""
        return CheckpointError(f"{self.state}: is not a usable state: {str(error).splitlines()[0]}")

    def write_results(self, losses: Sequence[float], summary: dict[str, Any], title: str) -> None:
        """Write ``loss.csv``, ``loss.png`` and ``result.json``, the summary; its ``val_loss`` is a line of the plot."""
        curve = block_means(losses)
        write_atomic(self.path / "loss.csv", loss_csv(curve).encode())
        loss_plot(curve, self.path / "loss.png", title, summary["val_loss"])
        write_atomic(self.path / RESULT_FILE, (json.dumps(summary, indent=2) + "\n").encode())
