"""`convwave bench`: run studies, show them, write them; or make the report of what was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import convwave as cw
from benchmarks import charts
from benchmarks.documents import BUNDLE, Document, new_document, noisy_rows, read_documents, write_document
from benchmarks.harness import TIME_UP, TOO_NOISY, Row, Settings, Unavailable, absent, first_line
from benchmarks.studies import STUDIES, Plan, Step
from convwave.cli.console import table
from convwave.files import write_atomic
from convwave.runs.registry import device_name

FULL = Settings(rounds=15, least_rounds=4, seconds=12.0)
QUICK = Settings(rounds=8, least_rounds=4, seconds=1.0, sample_seconds=0.001)


def run_studies(
    names: Sequence[str],
    words: cw.Words,
    out: Path,
    console: Console,
    *,
    device: str = "cpu",
    quick: bool = False,
    budget: float | None = None,
    bundle: bool = False,
    resume: bool = False,
) -> list[Document]:
    """Run studies one after the other.

    Args:
        names: of studies.
        words: of the vocabulary and the batches.
        out: folder for ``STUDY.json`` and ``STUDY.png``, written after every step.
        console: for people.
        device: "cpu", "cuda", ...
        quick: small sizes, few samples, nothing compiled.
        budget: seconds for all studies, of which each gets an equal share of what is left when it begins; what does
            not fit is recorded as not measured.
        bundle: write all studies to one ``studies.json`` and one ``studies.png``.
        resume: pass over studies that `out` holds complete, of the same device and sizes.

    Returns:
        The documents as they were written.
    """
    if resume:
        names = [name for name in names if not _is_done(out, name, device, quick, console)]
    settings = replace(QUICK if quick else FULL, device=device)
    options = [f"--device {device}", f"--threads {torch.get_num_threads()}"]
    options += ["--quick"] * quick + ([] if budget is None else [f"--budget {budget:g}"])
    ends = None if budget is None else time.monotonic() + budget
    documents: list[Document] = []
    for i, name in enumerate(names):
        deadline = None
        if ends is not None:
            now = time.monotonic()
            deadline = now + (ends - now) / (len(names) - i)
        plan = Plan(words.words, device, quick, replace(settings, deadline=deadline))
        document = new_document(name, plan, " ".join(["convwave bench", name, *options]), words)
        documents.append(document)

        def write(document: Document = document) -> None:
            document["noisy"] = noisy_rows(document["rows"])
            write_document(document, out, bundle=bundle)

        console.print(f"{name}: {STUDIES[name].question}")
        _run(STUDIES[name].steps(plan), document, deadline, write, console)
        document["complete"] = not any(row["note"] == TIME_UP for row in document["rows"])
        write()
        show(document, console)
        picture = out / ("studies.png" if bundle else f"{name}.png")
        drawn = charts.png([each for _, each in read_documents(out).values()] if bundle else [document])
        if drawn is not None:
            write_atomic(picture, drawn)
        files = [out / (BUNDLE if bundle else f"{name}.json"), *([picture] if drawn is not None else [])]
        console.print(f"written: {', '.join(map(str, files))}")
    return documents


def _is_done(out: Path, name: str, device: str, quick: bool, console: Console) -> bool:
    """Whether a folder holds this study complete, measured on the same device at the same sizes."""
    _, document = read_documents(out).get(name, (out, None))
    if document is None or not document["complete"]:
        return False
    same = document["provenance"]["device"] == device_name(device) and document["settings"]["quick"] == quick
    if same:
        console.print(f"{name}: done on {document['provenance']['date'][:16]}, passed over")
    return same


def list_studies(console: Console) -> None:
    """The studies with the question that each answers."""
    for study in STUDIES.values():
        console.print(f"{study.name:<10} {study.question}")


def _run(
    steps: Sequence[Step], document: Document, deadline: float | None, write: Callable[[], None], console: Console
) -> None:
    write()
    for i, step in enumerate(steps):
        where = f"{step.point.mode}" + (f", {step.point.x} {step.point.x_name}" if step.point.x is not None else "")
        if deadline is not None and time.monotonic() > deadline:
            rows = [absent(step.point, "all", TIME_UP)]
        else:
            console.print(f"  {i + 1} of {len(steps)}: {where}")
            rows = _measure(step)
        document["rows"] += [row.to_json() for row in rows]
        write()


def _measure(step: Step) -> list[Row]:
    """The rows of a step; one that fails as a whole must not take the others with it."""
    torch.compiler.reset()  # a function compiled too often silently runs uncompiled
    try:
        return step.measure()
    except (RuntimeError, ValueError, Unavailable) as error:
        return [absent(step.point, "all", f"{type(error).__name__}: {first_line(error)}")]


def show(document: Document, console: Console) -> None:
    """The table of a study, and whether the machine was quiet enough."""
    head, *lines = cells(document)
    console.print(table(f"{document['study']} on {document['provenance']['device']}", head, lines))
    noisy = document["noisy"]
    if noisy:
        timed = sum(row["metric"] == "seconds" and row["n"] > 1 for row in document["rows"])
        console.print(
            f"machine too noisy: {len(noisy)} of {timed} times, marked ~, may differ by more than {TOO_NOISY:.0%} in "
            "another run"
        )


def cells(document: Document) -> list[list[str]]:
    """A study as text: the column heads, then for every mode and size a line a competitor; empty columns left out."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in document["rows"]:
        places.setdefault((row["mode"], row["x_name"], row["x"]), []).append(row)
    lines: list[list[str]] = []
    for (mode, x_name, x), here in places.items():
        where = mode if x is None else f"{mode}, {x}" if isinstance(x, str) else f"{mode}, {x:,} {x_name}"
        for provider in dict.fromkeys(row["provider"] for row in here):
            lines.append([where, provider, *_cells([row for row in here if row["provider"] == provider])])
            where = ""
    heads = [
        "",
        "",
        "median",
        "5 % to 95 %",
        "per second",
        "speed-up",
        "peak memory",
        "per position",
        "graph replay",
        "kernels",
        "more",
    ]
    heads.append("")
    used = [i for i in range(len(heads)) if i < 3 or any(line[i] for line in lines)]
    return [[line[i] for i in used] for line in [heads, *lines]]


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    by = {row["metric"]: row for row in rows}
    seconds = by.get("seconds")
    notes = [row["note"] for row in rows if row["status"] != "ok"]
    status = next((row["status"] for row in rows if row["status"] != "ok" and row["median"] is None), "")

    def number(metric: str, unit: str = "") -> str:
        row = by.get(metric)
        return "" if row is None or row["median"] is None else charts.short_number(row["median"]) + unit

    timed = seconds is not None and seconds["median"] is not None
    spread = ""
    if timed and seconds is not None and seconds["p05"] is not None:
        spread = f"{duration(seconds['p05'])} to {duration(seconds['p95'])}"
    noisy = seconds is not None and (seconds["noise"] or 0.0) > TOO_NOISY
    more = [
        f"{number(metric)} {unit}".strip()
        for metric, unit in (
            ("fraction", "of limit"),
            ("bandwidth", "B/s"),
            ("rate", "FLOP/s"),
            ("launches", by.get("launches", {}).get("unit", "")),
            ("regret", "lost"),
            ("predicted_seconds", "s predicted"),
            ("overhead", "s per level"),
            ("element", "s per element"),
            ("product", "s per FLOP"),
        )
        if number(metric)
    ]
    if by.get("right", {}).get("note"):
        more.append(by["right"]["note"])
    if status == "wrong":
        error = rows[0]["error"]
        notes = [f"{rows[0]['note']}" + ("" if error is None else f" by {error:.1e}")]
    return [
        duration(seconds["median"]) + (" ~" if noisy else "") if timed and seconds is not None else status,
        spread,
        number("positions_per_second"),
        number("speedup", " x"),
        number("peak_bytes", "B"),
        number("bytes_per_position", "B"),
        duration(by["graph_seconds"]["median"]) if by.get("graph_seconds", {}).get("median") else "",
        duration(by["kernel_seconds"]["median"]) if by.get("kernel_seconds", {}).get("median") else "",
        ", ".join(more),
        "; ".join(notes),
    ]


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
