"""The folder of one run: its lock, what it remembers, the state to resume from, the network and the results."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convwave.files import CheckpointError, read_tensors, write_atomic, write_tensors
from convwave.runs.plots import Point, block_means, drawn, loss_csv, loss_plot

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

RUNS = Path("runs")  # where runs go that were given no other folder
STATE_FORMAT = "convwave.state.3"
STATE_FILE, MODEL_FILE, RESULT_FILE, RUN_FILE = "state.safetensors", "model.safetensors", "result.json", "run.json"
LOSS_TABLE, LOSS_PICTURE, METRICS_FILE = "loss.csv", "loss.png", "metrics.jsonl"
FILES = (STATE_FILE, MODEL_FILE, RESULT_FILE, RUN_FILE, LOSS_TABLE, LOSS_PICTURE, METRICS_FILE)


@dataclass(frozen=True)
class Source:
    """Where a run's words are from.

    Attributes:
        name: what to show a person.
        sha256: of the source's bytes.
        path: of the file, absolute; None where it was no file.
    """

    name: str
    sha256: str
    path: str | None = None

    @classmethod
    def of(cls, name: str, sha256: str) -> Source:
        """The source of words as they were just read: the name of a file is its path from here."""
        return cls(name, sha256, str(Path(name).resolve()) if Path(name).is_file() else None)


@dataclass(frozen=True)
class State:
    """What a run needs to continue.

    Attributes:
        tensors: of the run, as its tier gave them.
        config: its configuration as plain JSON values.
        data_sha256: of the words.
        vocabulary: the characters in order of their ids.
        losses: of every step so far.
        seconds: of training so far.
        validation: the validation losses measured so far.
        best: parameters and statistics of the best network so far, where the run keeps it.
        best_step: after which it was that.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    data_sha256: str
    vocabulary: str
    losses: list[float]
    seconds: float
    validation: list[Point] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0


class Folder:
    """The folder of one run; nothing is made before `locked`.

    Args:
        path: need not exist.

    Attributes:
        unlocked: why the folder could not be locked, where its file system has no locks; None where it has.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state, self.model = path, path / STATE_FILE, path / MODEL_FILE
        self.unlocked: str | None = None

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Keep other processes from training here until the end, however the process ends; False where one does.

        Where the file system has no locks, nothing keeps them out: see `unlocked`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield True
            return
        with open(self.path / ".lock", "w") as file:
            ours = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                ours = error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
                self.unlocked = error.strerror if ours else None
            yield ours

    def busy(self) -> bool:
        """Whether another process is training here, where that can be told."""
        if fcntl is None or not (self.path / ".lock").exists():
            return False
        with suppress(OSError), open(self.path / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def holds_run(self) -> bool:
        return self.state.exists() or self.model.exists()

    def is_extended(self, state: State) -> bool:
        """Whether the run went on after its network was written, and has not ended again."""
        steps = state.config.get("steps")
        try:
            written = json.loads((self.path / RESULT_FILE).read_bytes())["steps"]
        except (OSError, LookupError, TypeError, ValueError, RecursionError):
            written = steps
        return self.model.exists() and (len(state.losses) != steps or written != steps)

    def clear(self) -> None:
        """Delete what a run that was killed while it wrote has left, and nothing else."""
        clear_partials(self.path, FILES)

    def remember(self, source: Source, config: dict[str, Any], parameters: int) -> None:
        """Write where the words are from, how they are learned, and by how many parameters."""
        content = {"data": asdict(source), "config": config, "parameters": parameters}
        write_atomic(self.path / RUN_FILE, (json.dumps(content, indent=2) + "\n").encode())

    def source(self) -> Source | None:
        """Where the run's words are from; None where the folder does not tell."""
        try:
            source = Source(**json.loads((self.path / RUN_FILE).read_bytes())["data"])
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            return None
        texts = isinstance(source.name, str) and isinstance(source.sha256, str)
        return source if texts and isinstance(source.path, str | None) else None

    def save(self, state: State) -> None:
        import torch

        tensors = {
            **state.tensors,
            **{f"best.{name}": tensor for name, tensor in state.best.items()},
            "losses": torch.tensor(state.losses, dtype=torch.float64, device="cpu"),
            "validation": torch.tensor(state.validation, dtype=torch.float64, device="cpu").view(-1, 2),
        }
        names = ("config", "data_sha256", "vocabulary", "seconds", "best_step")
        write_tensors(self.state, tensors, {"format": STATE_FORMAT, **{name: getattr(state, name) for name in names}})

    def load(self) -> State:
        """The saved state; raises CheckpointError where there is none that can be used."""
        tensors, metadata = read_tensors(self.state, STATE_FORMAT)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and (tensor.element_size() == 1 or not bool(tensor.isfinite().all())):
                raise CheckpointError(f"{self.state}: {name} is not finite: there is nothing to continue from")
        try:
            losses = [float(loss) for loss in tensors.pop("losses").tolist()]
            validation = [Point(int(step), loss) for step, loss in tensors.pop("validation").tolist()]
            best = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
            return State(
                {name: tensor for name, tensor in tensors.items() if not name.startswith("best.")},
                dict(metadata["config"]),
                str(metadata["data_sha256"]),
                str(metadata["vocabulary"]),
                losses,
                float(metadata["seconds"]),
                validation,
                best,
                int(metadata["best_step"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.unusable(error) from None

    def unusable(self, error: Exception) -> CheckpointError:
        """What to raise where a state does not fit its run."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"{self.state}: is not a usable state: {reason}")

    def write_results(
        self,
        losses: Sequence[float],
        validation: Sequence[Point],
        summary: dict[str, Any],
        title: str,
        levels: Mapping[str, float],
    ) -> str | None:
        """Write ``result.json``, the summary, and ``loss.csv``, then draw ``loss.png``; says why it cannot be drawn.

        Args:
            levels: losses to draw as lines, by what they are.
        """
        write_atomic(self.path / RESULT_FILE, (json.dumps(summary, indent=2) + "\n").encode())
        curve = block_means(losses)
        write_atomic(self.path / LOSS_TABLE, loss_csv(curve).encode())
        picture = self.path / LOSS_PICTURE
        return drawn(picture, lambda: loss_plot(curve, picture, title, validation, summary["val_loss"], levels))


def new_folder(name: str, runs: Path = RUNS) -> Path:
    """Make a folder in `runs` that no other run has: `name`, or `name` with a number."""
    runs.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def clear_partials(folder: Path, names: Iterable[str]) -> None:
    """Delete what `write_atomic` leaves of files of these names in a folder when it is killed."""
    ours = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})\.\d+\.partial")
    for file in folder.glob(".*.partial"):
        if ours.fullmatch(file.name):
            file.unlink(missing_ok=True)
