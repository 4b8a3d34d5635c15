"""What people read, from the results files alone: tables, pictures, the README's figures, the page of all studies.

    python -m benchmarks.report      writes the README's figures and benchmarks/results/report.html

A figure of the README lies between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; a test holds that the README is
what this makes.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Formatter, Template
from typing import Any

from rich.console import Console

from benchmarks.harness import TOO_NOISY
from benchmarks.results import (
    NOT_MEASURED,
    RESULTS,
    Document,
    Documents,
    Figure,
    device_of,
    devices,
    headlines,
    is_noisy,
    short_number,
)
from benchmarks.studies import STUDIES, Picture
from convwave.cli.console import table
from convwave.files import write_atomic
from convwave.train import UsageError

README = RESULTS.parent.parent / "README.md"
PAGE = "report.html"
BLOCKS, TEMPLATE = (Path(__file__).with_name(name) for name in ("readme.md", PAGE))
WIDTH = 100  # columns of a terminal
Rows = Sequence[Figure]

# Tables

METRICS = {  # those with a column, with the unit of a number
    "positions_per_second": ("per second", ""),
    "speedup": ("speed-up", " x"),
    "peak_bytes": ("memory", "B"),
    "bytes_per_position": ("B/position", "B"),
    "graph_seconds": ("graph replay", ""),
    "kernel_seconds": ("kernels", ""),
}
MORE = {  # those that share the last one
    "fraction": "of limit",
    "bandwidth": "B/s",
    "rate": "FLOP/s",
    "launches": "",
    "regret": "lost",
    "predicted_seconds": "s predicted",
    "overhead": "s per level",
    "element": "s per element",
    "product": "s per FLOP",
}


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    units = {1.0: "s", 1e-3: "ms", 1e-6: "us", 1e-9: "ns"}
    limit = next((limit for limit in units if seconds >= limit), 1e-9)
    return f"{seconds / limit:.3g} {units[limit]}"


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
    lines = [["", "median (5 % to 95 %)", *(head for head, _ in METRICS.values()), "", "note"]]
    for where, here in grouped(document["rows"], "mode", "x_name", "x").items():
        lines.append([place(*where), *[""] * (len(METRICS) + 3)])
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
        median = by["seconds"]["median"]
        value, unit = duration(median).split()
        low, high = (f"{float(value) / median * by['seconds'][q]:.3g}" for q in ("p05", "p95"))
        shown = f"{value} ({low} to {high}) {unit}{mark}"
    numbers = {m: (duration if m.endswith("_seconds") else short_number)(row["median"]) for m, row in by.items()}
    columns = [numbers[m] + unit + mark if m in by else "" for m, (_, unit) in METRICS.items()]
    more = [f"{short_number(by[m]['median'])} {unit or by[m]['unit']}".strip() for m, unit in MORE.items() if m in by]
    more += [by["right"]["note"]] if "right" in by else []
    notes = [row["note"] + (f" by {row['error']:.1e}" if row["error"] is not None else "") for row in failed]
    return [shown, *columns, ", ".join(more), "; ".join(notes)]


def show(document: Document, console: Console) -> None:
    """The table of a study, and whether the machine was quiet enough."""
    head, *lines = cells(document)
    shown = [i for i, name in enumerate(head) if name not in ("B/position", "note")]  # too wide for a terminal
    kept, *rest = [[line[i] for i in shown] for line in [head, *lines]]
    title = f"{document['study']} on {document['provenance']['device']}"
    console.print(table(title, kept, rest), width=min(console.width, WIDTH))
    for reason in dict.fromkeys(line[-1] for line in lines if head[-1] == "note" and line[-1]):
        console.print(f"{', '.join(dict.fromkeys(line[0].strip() for line in lines if line[-1] == reason))}: {reason}")
    if document["noisy"]:
        timed = sum(row["metric"] == "seconds" and row["n"] > 1 for row in document["rows"])
        noisy = f"{len(document['noisy'])} of {timed} times"
        console.print(f"machine too noisy: {noisy}, marked ~, may differ by more than {TOO_NOISY:.0%} in another run")


# Pictures

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d", "#6b7280")
MOST_BARS = 14  # of one group; the smaller ones share a line


def draw(documents: Iterable[Document], kind: str) -> bytes:
    """All pictures of some studies, two in a row, as "png" or "svg"; empty without numbers or without matplotlib."""
    chosen: list[tuple[Document, Picture, Rows]] = []
    for document in documents:
        groups = grouped((r for r in document["rows"] if r["median"] is not None), "metric", "mode")
        pictures = STUDIES[document["study"]].pictures
        chosen += [(document, p, groups[p.metric, p.mode]) for p in pictures if (p.metric, p.mode) in groups]
    if not chosen or importlib.util.find_spec("matplotlib") is None:
        return b""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chosen[0][0]["study"], "font.size": 9}):
        heights = [0.27 * len(bars_of(rows)) + 1 if p.kind == "bars" else 4.0 for _, p, rows in chosen]
        columns, lines = min(2, len(chosen)), math.ceil(len(chosen) / 2)
        canvas = Figure(figsize=(6.4 * columns, max(heights) * lines), layout="constrained")
        for i, (document, picture, rows) in enumerate(chosen):
            axes = canvas.add_subplot(lines, columns, i + 1)
            providers = grouped(document["rows"], "provider")
            colours = {name: COLOURS[i % len(COLOURS)] for i, (name,) in enumerate(providers)}  # same in every picture
            (draw_lines if picture.kind == "lines" else draw_bars)(axes, picture, rows, colours)
            axes.set_title(f"{document['study']}: {picture.title}", fontsize=10)
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
        style: dict[str, Any] = {"color": colours[provider], "label": provider}
        if len(here) < 3:
            below, above = ([abs(a - b) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
            axes.errorbar(x, y, [below, above], fmt="D", markersize=5, capsize=3, **style)
        else:
            axes.plot(x, y, "o-", markersize=3.5, linewidth=1.4, **style)
            axes.fill_between(x, low, high, color=colours[provider], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["x"] for row in rows})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel=rows[0]["x_name"], ylabel=picture.label)
    axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")


def bars_of(rows: Rows) -> list[tuple[str, float | None, str]]:
    """Label, length, provider of every bar; without a length the head of a group, which has one x, largest bar first.

    An x that is a text tells apart bars of one provider, in one group.
    """
    named = isinstance(rows[0]["x"], str)
    groups = {("", None): list(rows)} if named else grouped(rows, "x_name", "x")
    lines: list[tuple[str, float | None, str]] = []
    for (x_name, x), group in groups.items():
        group.sort(key=lambda row: -row["median"])
        kept = [row for row in group[:MOST_BARS] if row["median"]]
        rest = group[len(kept) :]
        lines += [(f"{x:,} {x_name}", None, "")] if len(groups) > 1 else []
        lines += [(row["x"] if named else row["provider"], row["median"], row["provider"]) for row in kept]
        lines += [(f"the other {len(rest)}, each at most", rest[0]["median"], "")] if rest else []
    return lines


def draw_bars(axes: Any, picture: Picture, rows: Rows, colours: Mapping[str, str]) -> None:
    """A group for every x, its bars from the largest to the smallest."""
    lines = bars_of(rows)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    for y, (tick, (_, value, provider)) in enumerate(zip(axes.get_yticklabels(), lines, strict=True)):
        if value is None:
            tick.set_fontweight("bold")
        else:
            axes.barh(y, value, color=colours.get(provider, COLOURS[-1]), height=0.7)
            axes.annotate(f" {short_number(value)}", (value, y), va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set(xlabel=picture.label)


# The README's figures

BLOCK = re.compile(r"<!-- begin (\w+) -->(.*?)<!-- end \1 -->", re.DOTALL)
FILES = {"reproduce": "reproduce/reproduce.json", "open": "speedrun-open.json", "profile": "speedrun-profile.json"}


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


SPECS: dict[str, Callable[[Any], str]] = {  # format specifications of the template besides Python's own
    "seconds": _seconds,
    "timing": lambda q: f"{_seconds(q['median'])} ({_seconds(q['min'])} to {_seconds(q['max'])}, {q['runs']} runs)",
    "spread": lambda loss: f"{loss['mean']:.4f} ± {loss['std']:.4f}",
    "device": lambda source: f"{source['device']}, torch {source['versions']['torch']}",
    "count": lambda values: str(len(values)),
    "percent": lambda share: f"{100 * share:.0f}",
    "parts": lambda ms: ", ".join(f"{name} {100 * each / sum(ms.values()):.0f} %" for name, each in ms.items()),
}


class _Formatter(Formatter):
    """``{fast[losses][val]:spread}`` of the results files, and the values that are made of several."""

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return MADE[key]() if key in MADE else _read(key)

    def format_field(self, value: Any, spec: str) -> str:
        return SPECS[spec](value) if spec in SPECS else str(super().format_field(value, spec))


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / FILES.get(name, f"{name}.json")).read_text(encoding="utf-8"))
    if "track" in found:
        splits = found["losses"].items()
        found["losses"] = {split: {"mean": statistics.mean(v), "std": statistics.stdev(v)} for split, v in splits}
    return found


def _mutants() -> str:
    text = (README.parent / "tests/MUTANTS.md").read_text(encoding="utf-8")
    return str(re.findall(r"Caught by the tests: (\d+ of \d+)", text)[0])


def _checks() -> dict[str, Any]:
    checks = _read("certificate")["checks"]
    errors = [check["max_abs_error"] for check in checks if check["name"].startswith("trajectory")]
    return {"all": len(checks), "passed": sum(check["passed"] for check in checks), "trajectory": max(errors)}


def _headlines(found: Sequence[Documents]) -> list[list[str]]:
    """The devices; then for every headline the question, the answer of every device, the command."""
    columns = {device_of(documents): headlines(documents) for documents in found}
    asked = next(iter(columns.values()))
    if not any(row["device"] != "cpu" for d in found for _, doc in d.values() for row in doc["rows"]):
        columns["GPU"] = [(question, NOT_MEASURED, study) for question, _, study in asked]
    rows = [
        [question, *(answers[i][1] for answers in columns.values()), f"convwave bench {study}"]
        for i, (question, _, study) in enumerate(asked)
    ]
    return [list(columns), *rows]


def _bench() -> str:
    found = devices(RESULTS)
    columns, *rows = _headlines(found)
    head = ["speed-up, 5 to 95 % of the ratios within rounds; rate", *columns, "command"]
    lines = [head, ["---"] * len(head), *([*row[:-1], f"`{row[-1]}`"] for row in rows)]
    every = [(name, *entry) for documents in found for name, entry in documents.items()]
    short = ", ".join(name for name, _, document in every if not document["complete"])
    links = ", ".join(f"[{name}]({path.relative_to(README.parent).as_posix()})" for name, path, _ in every)
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + "\n\n~: may differ by more than 10 % in another run."
        + f" Cut short: {short}." * bool(short)
        + f"\nWith device, clocks, versions, commit, command, flags and quantiles: {links}."
    )


MADE: dict[str, Callable[[], Any]] = {
    "bench": _bench,
    "checks": _checks,
    "mutants": _mutants,
    "post": lambda: {row["model"]: row for row in _read("reproduce")["rows"]},
}


def render(text: str) -> str:
    """The README with every block made anew from its template."""
    made = _Formatter().format(BLOCKS.read_text(encoding="utf-8"))
    blocks = {match[1]: match[0] for match in BLOCK.finditer(made)}
    return BLOCK.sub(lambda match: blocks[match[1]], text)


# The page


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


def page(results: Path) -> str:
    """The page as text: a function of the files in `results` alone; raises UsageError where there are none."""
    found = devices(results)
    if not found:
        raise UsageError(f"--report: expected results of 'convwave bench' in {results}, found none")
    columns, *rows = _headlines(found)
    sections = [
        f"<h2>{escape(device_of(documents))}</h2>" + "".join(_study(results, name, documents) for name in STUDIES)
        for documents in found
    ]
    summary, studies = _html([["", *columns, ""], *rows]), "".join(sections)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(summary=summary, studies=studies)


def _study(results: Path, name: str, documents: Documents) -> str:
    title = f"<h3>{escape(STUDIES[name].question)}</h3>"
    if name not in documents:
        return f"{title}<p>{name}: {NOT_MEASURED}</p>"
    path, document = documents[name]
    source, flags = document["provenance"], document["provenance"]["flags"]
    facts = [
        source["command"],
        f"commit {source['commit']}",
        source["date"][:10],
        f"torch {source['versions']['torch']}",
        f"{flags['threads']} CPU threads",
        f"float32 products: {flags['float32_matmul_precision']}",
        *(f"{key} {value}" for key, value in source["clocks"].items() if value),
    ]
    noisy = f" Machine too noisy for {len(document['noisy'])} of its times, marked ~." * bool(document["noisy"])
    cut = " This run was cut short." * (not document["complete"])
    svg = draw([document], "svg").decode()
    link = escape(path.relative_to(results).as_posix())
    return (
        f'{title}<p class="quiet">{escape(" · ".join(facts))}.{cut}{noisy} <a href="{link}">{link}</a></p>'
        f"<figure>{svg[svg.find('<svg') :] if svg else ''}</figure>"
        f"<details><summary>All figures</summary>{_html(cells(document))}</details>"
    )


def _html(lines: list[list[str]]) -> str:
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines)
    return '<div class="scroll"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


if __name__ == "__main__":
    write_report()
