"""Files of results: one JSON document a study, with where it comes from; and two runs compared.

    python -m benchmarks names width --out runs/a && python -m benchmarks names width --out runs/b
    python -m benchmarks.results runs/a runs/b

A time that both runs called quiet must differ by at most 10 %; one that either called too noisy is counted, not judged.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import convwave as cw
from benchmarks.harness import TOO_NOISY, flags
from benchmarks.studies import STUDIES, Plan
from convwave.files import write_atomic
from convwave.runs.registry import device_name, package_version, provenance

FORMAT = "convwave.benchmark.1"
RESULTS = Path(__file__).resolve().parent / "results"

Document = dict[str, Any]
Documents = Mapping[str, tuple[Path, Document]]  # by study, with the file of each
Figure = Mapping[str, Any]  # a Row, as a file holds it


def new_document(study: str, plan: Plan, command: str, words: cw.Words) -> Document:
    """A study without rows yet."""
    settings = ("quick", "rounds", "least_rounds", "seconds", "sample_seconds")
    more = {"device": device_name(plan.device), "clocks": clocks(plan.device), "flags": flags()}
    return {
        "format": FORMAT,
        "study": study,
        "question": STUDIES[study].question,
        "complete": False,
        "noisy": [],
        "provenance": {**provenance(command), **more, "peers": {"pytorch-tcn": package_version("pytorch-tcn")}},
        "data": Path(words.source).name,
        "data_sha256": words.sha256,
        "settings": {name: getattr(plan, name) for name in settings},
        "rows": [],
    }


def is_noisy(*rows: Figure | None) -> bool:
    """Whether another run's median of one of them may differ by more than 10 %."""
    return any(row is not None and (row["noise"] or 0.0) > TOO_NOISY for row in rows)


def where(row: Figure) -> str:
    """What a figure is of, in words."""
    return ", ".join(str(row[field]) for field in ("study", "mode", "x", "provider") if row[field] is not None)


def clocks(device: str) -> dict[str, Any]:
    """The clocks as the system tells them; None where it does not."""
    if not device.startswith("cuda"):
        system = Path("/proc/cpuinfo")
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", system.read_text() if system.exists() else "", re.MULTILINE)
        return {"cpu_mhz": max(map(float, found), default=None)}
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        return dict(zip(fields, answer.split("\n")[0].split(", "), strict=False))
    return dict.fromkeys(fields)


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_documents(folder: Path) -> Documents:
    """The studies in a folder by name, each with the file that holds it; other files are passed over."""
    found: dict[str, tuple[Path, Document]] = {}
    for path in sorted(folder.glob("*.json")):
        content = None
        with suppress(ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") == FORMAT:
            found |= {d["study"]: (path, d) for d in content.get("studies", {"": content}).values()}
    return {name: found[name] for name in STUDIES if name in found}


def times(folder: Path) -> dict[str, Figure]:
    """Every time in a folder, by what it is of."""
    rows = [row for _, document in read_documents(folder).values() for row in document["rows"]]
    return {where(row): row for row in rows if row["metric"] == "seconds" and row["median"] is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all quiet times repeat, 1 if one does not, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description="Compare the medians of two runs of the same studies.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(arguments)
    first, second = times(args.first), times(args.second)
    both = first.keys() & second.keys()
    if not both:
        print(f"results: expected two folders of the same studies, got {args.first} and {args.second}", file=sys.stderr)
        return 2
    medians = {w: (first[w]["median"], second[w]["median"]) for w in both if not is_noisy(first[w], second[w])}
    apart = {w: max(pair) / min(pair) - 1 for w, pair in medians.items()}
    bad = sorted((w for w in apart if apart[w] > TOO_NOISY), key=lambda w: -apart[w])
    print("".join(f"{w}: {apart[w]:.1%} apart\n" for w in bad), end="")
    counts = f"{len(apart) - len(bad)} repeat within {TOO_NOISY:.0%}, {len(bad)} do not"
    print(f"{len(both)} times: {counts}, {len(both) - len(apart)} were called too noisy")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
