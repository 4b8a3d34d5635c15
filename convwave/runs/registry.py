"""The list of runs, and where a figure comes from: machine, versions, commit, command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from convwave.runs.folder import METRICS_FILE, MODEL_FILE, RESULT_FILE, RUN_FILE, STATE_FILE, Folder
from convwave.runs.metrics import last_metrics, read_metrics
from convwave.runs.plots import Point


def newest_run(runs: Path) -> Path | None:
    """The run in a folder that finished last, else the one that was interrupted last; None where there is none."""
    for name in (MODEL_FILE, STATE_FILE):
        newest = max(runs.glob(f"**/{name}"), key=lambda file: file.stat().st_mtime, default=None)
        if newest is not None:
            return newest.parent
    return None


@dataclass(frozen=True)
class Entry:
    """A run as its folder tells, without its tensors.

    Attributes:
        path: of the folder.
        state: "finished", "interrupted", "diverged", or "training" where a process is at it.
        data: where its words are from; None where the folder does not tell.
        parameters: their number; None where the folder does not tell.
        done: steps.
        config: as plain JSON values.
        train_loss, val_loss, novel_val_loss: of a finished run's network; else the mean of its last losses and the
            last validation loss measured; None where there is none.
        seconds: of training.
        changed: when, in seconds since 1970.
    """

    path: Path
    state: str
    data: str | None
    parameters: int | None
    done: int
    config: dict[str, Any]
    train_loss: float | None = None
    val_loss: float | None = None
    novel_val_loss: float | None = None
    seconds: float | None = None
    changed: float = field(default=0.0)

    def value(self, name: str) -> Any:
        """An attribute, a field of the configuration or of its recipe; "recipe" is the recipe's name.

        Raises:
            KeyError: no such name.
        """
        return {**self.settings, **asdict(self), "run": str(self.path)}[name]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with the fields of its recipe; "recipe" is the recipe's name."""
        recipe = self.config["recipe"]
        return {**{k: v for k, v in recipe.items() if k != "name"}, **self.config, "recipe": recipe["name"]}


def entry(path: Path) -> Entry | None:
    """What a folder tells of its run; None where it tells of none."""
    folder = Folder(path)
    try:
        begun = json.loads((path / RUN_FILE).read_bytes())
        config = dict(begun["config"])
        steps = int(config["steps"])
        str(config["recipe"]["name"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    source, records = folder.source(), last_metrics(path / METRICS_FILE)
    common = {"data": source and source.name, "parameters": begun.get("parameters"), "config": config}
    changed = max(
        (path / name).stat().st_mtime for name in (RUN_FILE, METRICS_FILE, STATE_FILE) if (path / name).exists()
    )
    try:
        result = json.loads((path / RESULT_FILE).read_bytes())
        if result["steps"] == steps:  # else it was extended since
            losses = {name: result[name] for name in ("train_loss", "val_loss", "novel_val_loss")}
            common["parameters"] = result["parameters"]
            return Entry(
                path, "finished", done=steps, seconds=result["train_seconds"], changed=changed, **losses, **common
            )
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        pass
    steps_done = [record for record in records if "loss" in record]
    last = [record["loss"] for record in steps_done[-100:]]
    return Entry(
        path,
        "training" if folder.busy() else next((r["state"] for r in records[-1:] if "state" in r), "interrupted"),
        done=steps_done[-1]["step"] if steps_done else 0,
        train_loss=sum(last) / len(last) if last else None,
        val_loss=next((record["val_loss"] for record in reversed(records) if "val_loss" in record), None),
        seconds=steps_done[-1].get("seconds") if steps_done else None,
        changed=changed,
        **common,
    )


def list_runs(runs: Path) -> list[Entry]:
    """The runs in a folder and its folders, by when they changed last."""
    found = (entry(file.parent) for file in runs.glob(f"**/{RUN_FILE}"))
    return sorted((run for run in found if run is not None), key=lambda run: run.changed)


def differences(entries: list[Entry]) -> dict[str, list[Any]]:
    """By name, what is not the same in all of these runs' configurations, recipes and data."""
    every = [{"data": run.data, **run.settings} for run in entries]
    names = dict.fromkeys(name for values in every for name in values)
    table = {name: [values.get(name) for values in every] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def curves(path: Path) -> tuple[list[float], list[Point]]:
    """The training loss of every step of a run, and its validation losses."""
    records = read_metrics(path / METRICS_FILE)
    losses = [record["loss"] for record in records if "loss" in record]
    return losses, [Point(record["step"], record["val_loss"]) for record in records if "val_loss" in record]


def provenance(command: str | None = None) -> dict[str, Any]:
    """What to store with a measurement, as plain JSON values."""
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or " ".join(["python", *sys.argv]),
        "commit": commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("convwave", "torch", "triton", "numpy")},
        },
    }


def device_name(device: str = "cpu") -> str:
    """The model name of the GPU or CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.machine()


def commit() -> str | None:
    """The checkout's commit, with "+" if tracked files are modified; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / "setup.py").is_file():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def package_version(name: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
