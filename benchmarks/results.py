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
BUNDLE = "studies.json"
RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"

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


def noisy_rows(rows: Sequence[Figure]) -> list[str]:
    """Which times are not to be relied on."""
    noisy = [row for row in rows if row["metric"] == "seconds" and is_noisy(row)]
    places = [f", {row['x']} {row['x_name']}" if row["x"] is not None else "" for row in noisy]
    return [f"{row['provider']}, {row['mode']}{place}" for row, place in zip(noisy, places, strict=True)]


def clocks(device: str) -> dict[str, Any]:
    """The clocks as the system tells them; None where it does not."""
    if not device.startswith("cuda"):
        system = Path("/proc/cpuinfo")
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", system.read_text() if system.exists() else "", re.MULTILINE)
        return {"cpu_mhz": max(map(float, found), default=None)}
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    return dict(zip(fields, answer.split("\n")[0].split(", "), strict=False))


def write_document(document: Document, out: Path, bundle: bool = False) -> Path:
    """Write one study: a file of its own, or its place in the one file that holds all."""
    path = out / (BUNDLE if bundle else f"{document['study']}.json")
    content = document
    if bundle:
        studies = json.loads(path.read_text(encoding="utf-8"))["studies"] if path.exists() else {}
        content = {"format": FORMAT, "studies": {**studies, document["study"]: document}}
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return path


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


def devices(results: Path) -> list[Documents]:
    """The studies of every folder of results that holds some, those of `results` itself first."""
    folders = [results, *sorted(path for path in results.glob("*") if path.is_dir())]
    return [documents for folder in folders if (documents := read_documents(folder))]


def device_of(documents: Documents) -> str:
    """What the studies of a folder ran on."""
    return str(next(iter(documents.values()))[1]["provenance"]["device"])


def short_number(value: float) -> str:
    """Three digits and a unit of a thousand: 1.23 k, 45.6 M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


# Headlines

SPEEDUPS = {  # provider, mode, study, x of a speed-up, by question
    "training, context 1,024, width 128: dense over the windowed MLP": ("dense", "train", "context", 1024),
    "training, 512 names at the post's size: dense over the windowed MLP": ("dense", "train", "names", 512),
    "the same over distinct contexts": ("distinct", "train", "names", 512),
    "evaluation, 512 names: distinct contexts over the windowed MLP": ("distinct", "eval", "names", 512),
    "generation, 1,024 sequences at once: cached over the windowed MLP": ("cached", "eval", "sample", 1024),
}
STACK = "training a stack of width 128, float32: convwave over two shifted matmuls"


def headlines(documents: Documents) -> list[tuple[str, str, str]]:
    """Question, answer, study of every headline in the studies of one device."""
    rows = [row for _, document in documents.values() for row in document["rows"] if row["median"] is not None]
    fields = ("study", "provider", "mode", "x", "metric")
    by = {tuple(row[field] for field in fields): row for row in rows}

    def ours(study: str, provider: str, *where: Any) -> Figure | None:
        """A row of this library: of its kernels where they were measured, else of plain PyTorch."""
        names = (f"{provider}, triton", f"{provider}, eager", provider)
        return next((by[study, name, *where] for name in names if (study, name, *where) in by), None)

    def speedup(provider: str, mode: str, study: str, x: int) -> str:
        ratio = ours(study, provider, mode, x, "speedup")
        if ratio is None:
            return NOT_MEASURED
        seconds, rate = (by[study, ratio["provider"], mode, x, m] for m in ("seconds", "positions_per_second"))
        unit = "characters/s" if study == "sample" else "positions/s"
        mark = " ~" * is_noisy(ratio, seconds)
        spread = f"{short_number(ratio['p05'])} to {short_number(ratio['p95'])}"
        return f"{short_number(ratio['median'])} times ({spread}){mark}; {short_number(rate['median'])} {unit}{mark}"

    def over_compiled() -> str:
        ratios = []
        for tuning, mode in (("compiled", "train, float32"), ("max-autotune", "train, float32, max-autotune")):
            own = ours("width", "convwave", mode, 128, "seconds")
            peer = by.get(("width", f"two shifted matmuls, {tuning}", mode, 128, "seconds"))
            if own is not None and peer is not None:
                ratio = short_number(peer["median"] / own["median"]) + " times" + " ~" * is_noisy(own, peer)
                ratios.append(f"{ratio} ({tuning}, ratio of medians)")
        return "; ".join(ratios) or NOT_MEASURED

    def predictions() -> str:
        right, regret = ([r["median"] for r in rows if r["metric"] == metric] for metric in ("right", "regret"))
        if not right:
            return NOT_MEASURED
        lost = f"{sum(regret) / len(regret):.1%} on average, {max(regret):.0%} at worst"
        return f"right in {sum(right):.0f} of {len(right)}; time lost {lost}"

    level = ours("roofline", "level, eval", "float32", 128, "fraction")
    fraction = f"{level['median']:.2f}, {level['note']}" if level else NOT_MEASURED
    return [
        *((question, speedup(*where), where[2]) for question, where in SPEEDUPS.items()),
        (STACK, speedup("convwave", "train, float32", "width", 128), "width"),
        ("the same over them compiled", over_compiled(), "width"),
        ("a level of width 128, evaluation, float32: fraction of the hardware's limit", fraction, "roofline"),
        ("the winning graph, predicted beforehand", predictions(), "breakeven"),
    ]


# Two runs


def times(folder: Path) -> dict[str, Figure]:
    """Every time in a folder, by what it is of."""
    fields = ("study", "mode", "x", "provider")
    rows = [row for _, document in read_documents(folder).values() for row in document["rows"]]
    found = [row for row in rows if row["metric"] == "seconds" and row["median"] is not None]
    return {", ".join(str(row[field]) for field in fields if row[field] is not None): row for row in found}


def main(arguments: list[str] | None = None) -> int:
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
    quiet = [where for where in both if not is_noisy(first[where], second[where])]
    apart = {}
    for where in quiet:
        low, high = sorted((first[where]["median"], second[where]["median"]))
        apart[where] = high / low - 1
    bad = [where for where in sorted(apart, key=lambda where: -apart[where]) if apart[where] > TOO_NOISY]
    print("".join(f"{where}: {apart[where]:.1%} apart\n" for where in bad), end="")
    counts = f"{len(quiet) - len(bad)} repeat within {TOO_NOISY:.0%}, {len(bad)} do not"
    print(f"{len(both)} times: {counts}, {len(both) - len(quiet)} were called too noisy")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
