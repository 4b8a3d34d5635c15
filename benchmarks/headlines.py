"""The few figures of the studies that stand in the README and on top of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.charts import short_number
from benchmarks.documents import Document, read_documents
from benchmarks.harness import TOO_NOISY

NOT_MEASURED = "not measured"
Documents = Mapping[str, tuple[Path, Document]]


def devices(results: Path) -> dict[str, Documents]:
    """Every folder of results that holds studies, by its path below `results`, "." for itself."""
    folders = [results, *sorted(path for path in results.glob("*") if path.is_dir())]
    found = {folder.relative_to(results).as_posix(): read_documents(folder) for folder in folders}
    return {name: documents for name, documents in found.items() if documents}


def device_of(documents: Documents) -> str:
    """What the studies of a folder ran on."""
    return str(next(iter(documents.values()))[1]["provenance"]["device"])


def find(
    documents: Documents, study: str, provider: str, mode: str, metric: str, x: Any = None
) -> dict[str, Any] | None:
    """The row with numbers, None where it was not measured."""
    for row in documents[study][1]["rows"] if study in documents else []:
        same = (row["provider"], row["mode"], row["metric"]) == (provider, mode, metric)
        if same and (x is None or row["x"] == x) and row["median"] is not None:
            return dict(row)
    return None


def headlines(documents: Documents) -> list[tuple[str, str, str]]:
    """Question, answer, command of every headline."""
    return [
        (
            "training, context 1,024, width 128: dense over the windowed MLP",
            _speedup(documents, "context", "dense", "train", 1024),
            "context",
        ),
        (
            "training, 512 names at the post's size: dense over the windowed MLP",
            _speedup(documents, "names", "dense", "train", 512),
            "names",
        ),
        (
            "the same over distinct contexts",
            _speedup(documents, "names", "distinct", "train", 512),
            "names",
        ),
        (
            "evaluation, 512 names: distinct contexts over the windowed MLP",
            _speedup(documents, "names", "distinct", "eval", 512),
            "names",
        ),
        (
            "generation, 1,024 sequences at once: cached over the windowed MLP",
            _speedup(documents, "sample", "cached", "eval", 1024),
            "sample",
        ),
        (
            "training a stack of width 128, float32: convwave over two shifted matmuls",
            _speedup(documents, "width", "convwave", "train, float32", 128),
            "width",
        ),
        (
            "the same over them compiled",
            _over_compiled(documents),
            "width",
        ),
        (
            "a level of width 128, evaluation, float32: fraction of the hardware's limit",
            _fraction(documents),
            "roofline",
        ),
        ("the winning graph, predicted beforehand", _predictions(documents), "breakeven"),
    ]


def ours(documents: Documents, study: str, provider: str, mode: str, metric: str, x: Any) -> tuple[str, Any]:
    """The name and row of a provider of this library: its kernels where they were measured, else plain PyTorch."""
    for name in (f"{provider}, triton", f"{provider}, eager", provider):
        row = find(documents, study, name, mode, metric, x)
        if row is not None:
            return name, row
    return provider, None


def _speedup(documents: Documents, study: str, provider: str, mode: str, x: Any) -> str:
    name, ratio = ours(documents, study, provider, mode, "speedup", x)
    rate = find(documents, study, name, mode, "positions_per_second", x)
    if ratio is None or rate is None:
        return NOT_MEASURED
    spread = f"{short_number(ratio['p05'])} to {short_number(ratio['p95'])}"
    unit = "characters/s" if study == "sample" else "positions/s"
    noisy = " ~" if (ratio["noise"] or 0.0) > TOO_NOISY else ""
    return f"{short_number(ratio['median'])} times ({spread}){noisy}; {short_number(rate['median'])} {unit}"


def _over_compiled(documents: Documents) -> str:
    ratios = []
    for tuning, mode in (("compiled", "train, float32"), ("max-autotune", "train, float32, max-autotune")):
        _, own = ours(documents, "width", "convwave", mode, "seconds", 128)
        peer = find(documents, "width", f"two shifted matmuls, {tuning}", mode, "seconds", 128)
        if own is not None and peer is not None:
            ratios.append(f"{short_number(peer['median'] / own['median'])} times ({tuning}, ratio of medians)")
    return "; ".join(ratios) or NOT_MEASURED


def _fraction(documents: Documents) -> str:
    _, row = ours(documents, "roofline", "level, eval", "float32", "fraction", 128)
    return NOT_MEASURED if row is None else f"{row['median']:.2f}, {row['note']}"


def _predictions(documents: Documents) -> str:
    rows = documents["breakeven"][1]["rows"] if "breakeven" in documents else []
    right = [row["median"] for row in rows if row["metric"] == "right" and row["median"] is not None]
    regret = [row["median"] for row in rows if row["metric"] == "regret" and row["median"] is not None]
    if not right:
        return NOT_MEASURED
    mean, worst = sum(regret) / len(regret), max(regret)
    return f"right in {sum(right):.0f} of {len(right)}; time lost {mean:.1%} on average, {worst:.0%} at worst"
