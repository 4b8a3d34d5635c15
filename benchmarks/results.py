"""Files of results: one JSON document a study, with where it comes from; the headlines in them; two runs compared.

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
RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"

Document = dict[str, Any]
Documents = Mapping[str, tuple[Path, Document]]  # by study, with the file of each


def new_document(study: str, plan: Plan, command: str, words: cw.Words) -> Document:
    """A study without rows yet."""
    settings = ("rounds", "least_rounds", "seconds", "sample_seconds")
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
        "settings": {"quick": plan.quick, **{name: getattr(plan, name) for name in settings}},
        "rows": [],
    }


def is_noisy(row: Mapping[str, Any] | None) -> bool:
    """Whether another run's median may differ by more than 10 %."""
    return row is not None and (row["noise"] or 0.0) > TOO_NOISY


def noisy_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Which times are not to be relied on."""
    return [
        f"{row['provider']}, {row['mode']}" + (f", {row['x']} {row['x_name']}" if row["x"] is not None else "")
        for row in rows
        if row["metric"] == "seconds" and is_noisy(row)
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


def write_document(document: Document, out: Path, bundle: bool = False) -> Path:
    """Write one study: a file of its own, or its place in the one file that holds all."""
    path = out / (BUNDLE if bundle else f"{document['study']}.json")
    content: Mapping[str, Any] = document
    if bundle:
        studies = json.loads(path.read_text(encoding="utf-8"))["studies"] if path.exists() else {}
        content = {"format": FORMAT, "studies": {**studies, document["study"]: document}}
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_documents(folder: Path) -> Documents:
    """The studies in a folder by name, each with the file that holds it; other files are passed over."""
    found: dict[str, tuple[Path, Document]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict) and content.get("format") == FORMAT:
            for document in content.get("studies", {"": content}).values():
                found[document["study"]] = path, document
    return {name: found[name] for name in STUDIES if name in found}


def devices(results: Path) -> dict[str, Documents]:
    """Every folder of results that holds studies, by its path below `results`, "." for itself."""
    folders = [results, *sorted(path for path in results.glob("*") if path.is_dir())]
    found = {folder.relative_to(results).as_posix(): read_documents(folder) for folder in folders}
    return {name: documents for name, documents in found.items() if documents}


def device_of(documents: Documents) -> str:
    """What the studies of a folder ran on."""
    return str(next(iter(documents.values()))[1]["provenance"]["device"])


def short_number(value: float) -> str:
    """Three digits and a unit of a thousand: 1.23 k, 45.6 M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# Headlines


class _Found:
    """Look-ups in the studies of one device."""

    def __init__(self, documents: Documents) -> None:
        self.rows = [row for _, document in documents.values() for row in document["rows"] if row["median"] is not None]

    def row(self, study: str, provider: str, mode: str, metric: str, x: Any) -> dict[str, Any] | None:
        wanted = (study, provider, mode, metric, x)
        found = (r for r in self.rows if (r["study"], r["provider"], r["mode"], r["metric"], r["x"]) == wanted)
        return next(found, None)

    def ours(self, study: str, provider: str, mode: str, metric: str, x: Any) -> dict[str, Any] | None:
        """A row of this library: of its kernels where they were measured, else of plain PyTorch."""
        names = (f"{provider}, triton", f"{provider}, eager", provider)
        return next((r for r in (self.row(study, name, mode, metric, x) for name in names) if r is not None), None)

    def speedup(self, study: str, provider: str, mode: str, x: Any) -> str:
        ratio = self.ours(study, provider, mode, "speedup", x)
        if ratio is None:
            return NOT_MEASURED
        seconds, rate = (
            self.row(study, ratio["provider"], mode, metric, x) for metric in ("seconds", "positions_per_second")
        )
        assert rate is not None
        unit = "characters/s" if study == "sample" else "positions/s"
        mark = " ~" * (is_noisy(ratio) or is_noisy(seconds))
        spread = f"{short_number(ratio['p05'])} to {short_number(ratio['p95'])}"
        return f"{short_number(ratio['median'])} times ({spread}){mark}; {short_number(rate['median'])} {unit}{mark}"

    def over_compiled(self) -> str:
        ratios = []
        for tuning, mode in (("compiled", "train, float32"), ("max-autotune", "train, float32, max-autotune")):
            own = self.ours("width", "convwave", mode, "seconds", 128)
            peer = self.row("width", f"two shifted matmuls, {tuning}", mode, "seconds", 128)
            if own is not None and peer is not None:
                mark = " ~" * (is_noisy(own) or is_noisy(peer))
                ratio = short_number(peer["median"] / own["median"])
                ratios.append(f"{ratio} times{mark} ({tuning}, ratio of medians)")
        return "; ".join(ratios) or NOT_MEASURED

    def fraction(self) -> str:
        row = self.ours("roofline", "level, eval", "float32", "fraction", 128)
        return NOT_MEASURED if row is None else f"{row['median']:.2f}, {row['note']}"

    def predictions(self) -> str:
        right, regret = ([r["median"] for r in self.rows if r["metric"] == metric] for metric in ("right", "regret"))
        if not right:
            return NOT_MEASURED
        mean, worst = sum(regret) / len(regret), max(regret)
        return f"right in {sum(right):.0f} of {len(right)}; time lost {mean:.1%} on average, {worst:.0%} at worst"


STACK = "training a stack of width 128, float32: convwave over two shifted matmuls"
SPEEDUPS = {  # provider, mode, x of a speed-up, by question
    "training, context 1,024, width 128: dense over the windowed MLP": ("context", "dense", "train", 1024),
    "training, 512 names at the post's size: dense over the windowed MLP": ("names", "dense", "train", 512),
    "the same over distinct contexts": ("names", "distinct", "train", 512),
    "evaluation, 512 names: distinct contexts over the windowed MLP": ("names", "distinct", "eval", 512),
    "generation, 1,024 sequences at once: cached over the windowed MLP": ("sample", "cached", "eval", 1024),
    STACK: ("width", "convwave", "train, float32", 128),
}


def headlines(documents: Documents) -> list[tuple[str, str, str]]:
    """Question, answer, study of every headline."""
    found = _Found(documents)
    fraction = "a level of width 128, evaluation, float32: fraction of the hardware's limit"
    return [
        *((question, found.speedup(*where), where[0]) for question, where in SPEEDUPS.items()),
        ("the same over them compiled", found.over_compiled(), "width"),
        (fraction, found.fraction(), "roofline"),
        ("the winning graph, predicted beforehand", found.predictions(), "breakeven"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def differences(first: Path, second: Path) -> list[tuple[float, bool, str]]:
    """Of every time in both folders: how far its medians are apart, whether it was noisy, which; largest first."""
    before, after = _times(first), _times(second)
    found = []
    for where in before.keys() & after.keys():
        low, high = sorted((before[where]["median"], after[where]["median"]))
        found.append((high / low - 1, is_noisy(before[where]) or is_noisy(after[where]), where))
    return sorted(found, reverse=True)


def _times(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        ", ".join(str(part) for part in (name, row["mode"], row["x"], row["provider"]) if part is not None): row
        for name, (_, document) in read_documents(folder).items()
        for row in document["rows"]
        if row["metric"] == "seconds" and row["median"] is not None
    }


def main(arguments: list[str] | None = None) -> int:
    """0 if all quiet times repeat, 1 if one does not, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description="Compare the medians of two runs of the same studies.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(arguments)
    found = differences(args.first, args.second)
    if not found:
        print(f"results: expected two folders of the same studies, got {args.first} and {args.second}", file=sys.stderr)
        return 2
    quiet = [apart for apart, noisy, _ in found if not noisy]
    for apart, noisy, where in found:
        if apart > TOO_NOISY and not noisy:
            print(f"{where}: {apart:.1%} apart")
    bad = sum(apart > TOO_NOISY for apart in quiet)
    counts = f"{len(quiet) - bad} repeat within {TOO_NOISY:.0%}, {bad} do not, {len(found) - len(quiet)} were called"
    print(f"{len(found)} times: {counts} too noisy")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
