"""The list of runs, and where a figure comes from: machine, versions, commit, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from convwave.runs.folder import MODEL_FILE, STATE_FILE


def newest_run(runs: Path) -> Path | None:
    """The run in a folder that finished last, else the one that was interrupted last; None where there is none."""
    for name in (MODEL_FILE, STATE_FILE):
        newest = max(runs.glob(f"**/{name}"), key=lambda file: file.stat().st_mtime, default=None)
        if newest is not None:
            return newest.parent
    return None


def provenance(command: str | None = None) -> dict[str, Any]:
    """What to store with a measurement, as plain JSON values."""
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
