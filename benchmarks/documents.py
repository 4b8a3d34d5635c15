"""Files of results: one JSON document a study, written after each of its steps, with where it comes from."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convwave as cw
from benchmarks.harness import TOO_NOISY, flags
from benchmarks.studies import STUDIES, Plan
from convwave.files import write_atomic
from convwave.runs.registry import device_name, package_version, provenance

FORMAT = "convwave.benchmark.1"
BUNDLE = "studies.json"
PEERS = ("pytorch-tcn",)  # packaged libraries that are measured where they are installed
RESULTS = Path(__file__).resolve().parent / "results"

Document = dict[str, Any]


def new_document(study: str, plan: Plan, command: str, words: cw.Words) -> Document:
    """A study without rows yet."""
    return {
        "format": FORMAT,
        "study": study,
        "question": STUDIES[study].question,
        "complete": False,
        "noisy": [],
        "provenance": {
            **provenance(command),
            "device": device_name(plan.device),
            "clocks": clocks(plan.device),
            "flags": flags(),
            "peers": {name: package_version(name) for name in PEERS},
        },
        "data": Path(words.source).name,
        "data_sha256": words.sha256,
        "settings": {
            "quick": plan.quick,
            "rounds": plan.settings.rounds,
            "least_rounds": plan.settings.least_rounds,
            "seconds": plan.settings.seconds,
            "sample_seconds": plan.settings.sample_seconds,
        },
        "rows": [],
    }


def noisy_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Which times are not to be relied on: another run's median may differ by more than 10 %."""
    return [
        f"{row['provider']}, {row['mode']}" + (f", {row['x']} {row['x_name']}" if row["x"] is not None else "")
        for row in rows
        if row["metric"] == "seconds" and row["noise"] is not None and row["noise"] > TOO_NOISY
    ]


def clocks(device: str) -> dict[str, Any]:
    """The clocks as the system tells them; None where it does not."""
    if device.startswith("cuda"):
        fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            return dict.fromkeys(fields)
        return dict(zip(fields, (part.strip() for part in first.split(",")), strict=False))
    try:
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = []
    return {"cpu_mhz": max(map(float, found)) if found else None}


def write_document(document: Document, out: Path, *, bundle: bool) -> Path:
    """Write one study: a file of its own, or its place in the one file that holds all."""
    path = out / (BUNDLE if bundle else f"{document['study']}.json")
    content: Mapping[str, Any] = document
    if bundle:
        studies = json.loads(path.read_text(encoding="utf-8"))["studies"] if path.exists() else {}
        content = {"format": FORMAT, "studies": {**studies, document["study"]: document}}
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_documents(folder: Path) -> dict[str, tuple[Path, Document]]:
    """The studies in a folder by name, each with the file that holds it; other files are passed over."""
    found: dict[str, tuple[Path, Document]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            continue
        for document in content.get("studies", {"": content}).values():
            if document["study"] in STUDIES:
                found[document["study"]] = path, document
    return {name: found[name] for name in STUDIES if name in found}


def slug(name: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
