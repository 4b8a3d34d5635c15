"""What people read, from the results files alone: tables, pictures, the README's figures, the page of all studies.

    python -m benchmarks.report      writes the README's figures and benchmarks/results/report.html

The README's blocks between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` are those of readme.md, the page is
report.html, both Jinja templates; a test holds that the README is what this makes.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from benchmarks.harness import TOO_NOISY
from benchmarks.results import RESULTS, Document, Documents, Figure, is_noisy, read_documents
from benchmarks.studies import STUDIES, Picture
from convwave.cli.console import table
from convwave.files import write_atomic
from convwave.train import UsageError

README = RESULTS.parent.parent / "README.md"
PAGE = "report.html"
WIDTH = 100  # columns of a terminal
Rows = Sequence[Figure]

# Tables

COLUMNS = {  # metrics with one, and their unit
    "positions_per_second": ("per second", ""),
    "speedup": ("speed-up", "x"),
    "peak_bytes": ("memory", "B"),
    "bytes_per_position": ("B/position", "B"),
    "graph_seconds": ("graph replay", "s"),
    "kernel_seconds": ("kernels", "s"),
}
SHARED = ("fraction", "bandwidth", "rate", "launches", "regret", "predicted_seconds", "overhead", "element", "product")
BEFORE = {"regret": "lost ", "predicted_seconds": "predicted "}


def si(value: float, unit: str = "") -> str:
    """Three digits, a prefix and the unit: 1.23 ms, 45.6 M; small ones have a prefix if they are seconds."""
    value = float(f"{value:.3g}")
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = max(-3 if unit == "s" else 0, min(power, 4))
    return f"{value / 1000.0**power:.3g} {' kMGTnum'[power]}".rstrip() + (" " if not power and unit else "") + unit


def place(mode: str, x_name: str | None, x: Any) -> str:
    """Where in a study something stands."""
    return mode if x is None else f"{mode}, {x}" if isinstance(x, str) else f"{mode}, {x:,} {x_name}"


def grouped(rows: Iterable[Figure], *fields: str) -> dict[tuple[Any, ...], list[Figure]]:
    """Rows by the values of fields, in the order in which those appear."""
    groups: dict[tuple[Any, ...], list[Figure]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def cells(document: Document) -> list[list[str]]:
    """A study as text: the column heads, then for every mode and size its name and a line a competitor."""
    lines = [["", "median (5 % to 95 %)", *(head for head, _ in COLUMNS.values()), "", "note"]]
    for point, here in grouped(document["rows"], "mode", "x_name", "x").items():
        lines.append([place(*point), *[""] * (len(COLUMNS) + 3)])
        lines += [[f"  {provider}", *_cells(rows)] for (provider,), rows in grouped(here, "provider").items()]
    used = [i for i in range(len(lines[0])) if i < 2 or any(line[i] for line in lines[1:])]
    return [[line[i] for i in used] for line in lines]


def _cells(rows: Rows) -> list[str]:
    """One competitor; where its time or its speed-up is noisy, every figure of it is marked."""
    by = {row["metric"]: row for row in rows if row["median"] is not None}
    mark = " ~" * is_noisy(by.get("seconds"), by.get("speedup"))
    failed = [row for row in rows if row["status"] != "ok"]
    shown = failed[0]["status"] if failed else ""
    if "seconds" in by:
        value, unit = si(by["seconds"]["median"], "s").split()
        low, high = (float(value) * by["seconds"][q] / by["seconds"]["median"] for q in ("p05", "p95"))
        low, high = (f"{end:.0f}" if end >= 1000 else f"{end:.3g}" for end in (low, high))
        shown = f"{value} ({low} to {high}) {unit}{mark}"
    columns = [si(by[m]["median"], unit) + mark if m in by else "" for m, (_, unit) in COLUMNS.items()]
    more = [BEFORE.get(m, "") + si(by[m]["median"], by[m]["unit"]) for m in SHARED if m in by]
    more += [by["right"]["note"]] if "right" in by else []
    notes = [row["note"] + (f" by {row['error']:.1e}" if row["error"] is not None else "") for row in failed]
    return [shown, *columns, ", ".join(more), "; ".join(notes)]


def show(document: Document, console: Console) -> None:
    """The table of a study, and whether the machine was quiet enough."""
    head, *lines = cells(document)
    shown = [i for i, name in enumerate(head) if name not in ("B/position", "note")]  # too wide for a terminal
    kept, *rest = [[line[i] for i in shown] for line in [head, *lines]]
    title = f"{document['study']} on {document['provenance']['device']}"
    shown_table = table(title, kept, rest)
    shown_table.columns[1].no_wrap = True
    console.print(shown_table, width=min(console.width, WIDTH))
    for reason in dict.fromkeys(line[-1] for line in lines if head[-1] == "note" and line[-1]):
        console.print(f"{', '.join(dict.fromkeys(line[0].strip() for line in lines if line[-1] == reason))}: {reason}")
    if document["noisy"]:
        timed = sum(row["metric"] == "seconds" and row["n"] > 1 for row in document["rows"])
        noisy = f"{len(document['noisy'])} of {timed} times"
        console.print(f"machine too noisy: {noisy}, marked ~, may differ by more than {TOO_NOISY:.0%} in another run")


# Pictures

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d", "#6b7280")
MOST_BARS = 14  # of one picture; the smaller ones share a line


def draw(document: Document, kind: str) -> bytes:
    """The pictures of a study, two in a row, as "png" or "svg"; empty without numbers."""
    groups = grouped((row for row in document["rows"] if row["median"] is not None), "metric", "mode")
    chosen: list[tuple[Picture, str, Rows]] = []
    for picture in STUDIES[document["study"]].pictures:
        drawn = groups.get((picture.metric, picture.mode), [])
        apart = picture.kind == "bars" and not any(isinstance(row["x"], str) for row in drawn)
        parts = grouped(drawn, *["x_name", "x"] * apart).items()
        chosen += [(picture, place(picture.title, *at) if at else picture.title, here) for at, here in parts]
    if not chosen:
        return b""
    providers = grouped(document["rows"], "provider")
    colours = {name: COLOURS[i % len(COLOURS)] for i, (name,) in enumerate(providers)}  # same in every picture
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": document["study"], "font.size": 9}):
        heights = [0.27 * len(bars_of(rows)) + 1 if p.kind == "bars" else 4.0 for p, _, rows in chosen]
        columns, lines = min(2, len(chosen)), math.ceil(len(chosen) / 2)
        canvas = Canvas(figsize=(6.4 * columns, max(heights) * lines), layout="constrained")
        for i, (picture, title, rows) in enumerate(chosen):
            axes = canvas.add_subplot(lines, columns, i + 1)
            (draw_lines if picture.kind == "lines" else draw_bars)(axes, picture, rows, colours)
            axes.set_title(title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, axis="both" if picture.kind == "lines" else "x")
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def draw_lines(axes: Any, picture: Picture, rows: Rows, colours: Mapping[str, str]) -> None:
    """Lines with bands of the 5 and 95 % quantiles; markers with whiskers for fewer than three points."""
    for (provider,), here in grouped(sorted(rows, key=lambda row: row["x"]), "provider").items():
        x, y = ([row[key] for row in here] for key in ("x", "median"))
        low, high = ([row["median"] if row[q] is None else row[q] for row in here] for q in ("p05", "p95"))
        if len(here) < 3:
            ends = [[abs(a - b) for a, b in zip(y, end, strict=True)] for end in (low, high)]
            axes.errorbar(x, y, ends, fmt="D", markersize=5, capsize=3, color=colours[provider], label=provider)
        else:
            axes.plot(x, y, "o-", markersize=3.5, linewidth=1.4, color=colours[provider], label=provider)
            axes.fill_between(x, low, high, color=colours[provider], alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=rows[0]["x_name"], ylabel=picture.label)
    ticks = sorted({row["x"] for row in rows})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: si(value))
    axes.yaxis.set_minor_formatter("")
    axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")


def bars_of(rows: Rows) -> list[tuple[str, float, str]]:
    """Label, length, provider of every bar, the largest first. An x that is a text names the bars of one provider."""
    ordered = sorted(rows, key=lambda row: -row["median"])
    kept = [row for row in ordered[:MOST_BARS] if row["median"]]
    bars = [
        (row["x"] if isinstance(row["x"], str) else row["provider"], row["median"], row["provider"]) for row in kept
    ]
    rest = ordered[len(kept) :]
    return bars + ([(f"the other {len(rest)}, each at most", rest[0]["median"], "")] if rest else [])


def draw_bars(axes: Any, picture: Picture, rows: Rows, colours: Mapping[str, str]) -> None:
    labels, values, providers = zip(*bars_of(rows), strict=True)
    shown = axes.barh(range(len(labels)), values, color=[colours.get(p, COLOURS[-1]) for p in providers], height=0.7)
    axes.bar_label(shown, [si(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: si(value))
    axes.set(xlabel=picture.label)


# Templates

BLOCK = re.compile(r"<!-- begin (\w+) -->(.*?)<!-- end \1 -->", re.DOTALL)
FILES = {"reproduce": "reproduce/reproduce.json", "open": "speedrun-open.json", "profile": "speedrun-profile.json"}


def seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def svg(document: Document) -> str:
    """The pictures as an element of a page."""
    text = draw(document, "svg").decode()
    return text[text.find("<svg") :] if text else ""


def spread(values: Any) -> str:
    found = values["values"] if isinstance(values, dict) else values
    return f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f}"


def devices(results: Path) -> dict[str, Documents]:
    """The studies in a folder and in the folders in it, by device."""
    folders = [results, *sorted(path for path in results.glob("*") if path.is_dir())]
    found = [documents for folder in folders if (documents := read_documents(folder))]
    if not found:
        raise UsageError(f"--report: expected results of 'convwave bench' in {results}, found none")
    return {next(iter(documents.values()))[1]["provenance"]["device"]: documents for documents in found}


def figures(documents: Documents, study: str, provider: str = "", **where: Any) -> Rows:
    """The rows of a study with these values; of a provider those of its kernels where they were measured."""
    rows = documents[study][1]["rows"] if study in documents else []
    rows = [row for row in rows if row["median"] is not None and all(row[key] == where[key] for key in where)]
    named, ends = grouped(rows, "provider"), (", triton", ", eager", "")
    return next((named[provider + end,] for end in ends if (provider + end,) in named), []) if provider else rows


JINJA = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=jinja2.select_autoescape(),  # the page, not the README
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
JINJA.globals |= {"cells": cells, "svg": svg, "studies": STUDIES, "figures": figures, "is_noisy": is_noisy}
JINJA.filters |= {
    "si": si,
    "seconds": seconds,
    "timing": lambda q: f"{seconds(q['median'])} ({seconds(q['min'])} to {seconds(q['max'])}, {q['runs']} runs)",
    "spread": spread,
    "device": lambda source: f"{source['device']}, torch {source['versions']['torch']}",
    "as": lambda value, form: format(value, form),
}


def read(name: str) -> Any:
    return json.loads((RESULTS / FILES.get(name, f"{name}.json")).read_text(encoding="utf-8"))


def render(text: str) -> str:
    """The README with every block made anew from its template."""
    mutants = re.findall(r"Caught by the tests: (\d+ of \d+)", (README.parent / "tests/MUTANTS.md").read_text("utf-8"))
    values = {"read": read, "root": README.parent, "mutants": mutants[0], "devices": (found := devices(RESULTS))}
    records = [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / "speedrun").glob("*.json"))]
    values["history"] = [record for record in records if record["track"] == "post"]
    rows = [row for documents in found.values() for _, document in documents.values() for row in document["rows"]]
    values["measured_on_a_gpu"] = any(row["device"] != "cpu" for row in rows)
    made = JINJA.get_template("readme.md").render(values)
    blocks = {match[1]: match[0] for match in BLOCK.finditer(made)}
    return BLOCK.sub(lambda match: blocks[match[1]], text)


def page(results: Path) -> str:
    """The page as text: a function of the files in `results` alone; raises UsageError where there are none."""
    return JINJA.get_template(PAGE).render(results=results, devices=devices(results))


def write_report(results: Path = RESULTS) -> list[Path]:
    """Write the page into a folder of results, and where that is the checkout's own, the README's tables too.

    Raises:
        UsageError: no study was ever written there.
    """
    write_atomic(results / PAGE, page(results).encode())
    if results.resolve() != RESULTS:
        return [results / PAGE]
    write_atomic(README, render(README.read_text(encoding="utf-8")).encode())
    return [results / PAGE, README]


if __name__ == "__main__":
    write_report()
