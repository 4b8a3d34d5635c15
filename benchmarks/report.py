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
from collections import defaultdict
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
BLOCKS = Path(__file__).with_name("readme.md")
Rows = Sequence[Mapping[str, Any]]

# ---------------------------------------------------------------------------------------------------------------------
# Tables

METRICS = {  # those with a column, then those that share the last one
    "positions_per_second": "per second",
    "speedup": "speed-up",
    "peak_bytes": "memory",
    "bytes_per_position": "B/position",
    "graph_seconds": "graph replay",
    "kernel_seconds": "kernels",
}
MORE = {
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
WIDTH = 100  # columns of a terminal


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def place(mode: str, x_name: str | None, x: Any) -> str:
    """Where in a study something stands."""
    return mode if x is None else f"{mode}, {x}" if isinstance(x, str) else f"{mode}, {x:,} {x_name}"


def cells(document: Document) -> list[list[str]]:
    """A study as text: the column heads, then for every mode and size its name and a line a competitor."""
    lines: list[list[str]] = []
    places = dict.fromkeys((row["mode"], row["x_name"], row["x"]) for row in document["rows"])
    for where in places:
        here = [row for row in document["rows"] if (row["mode"], row["x_name"], row["x"]) == where]
        lines.append([place(*where), *[""] * (len(METRICS) + 3)])
        for provider in dict.fromkeys(row["provider"] for row in here):
            lines.append([f"  {provider}", *_cells([row for row in here if row["provider"] == provider])])
    heads = ["", "median (5 % to 95 %)", *METRICS.values(), "", "note"]
    used = [i for i in range(len(heads)) if i < 2 or any(line[i] for line in lines)]
    return [[line[i] for i in used] for line in [heads, *lines]]


def _cells(rows: Rows) -> list[str]:
    """One competitor; where its time or its speed-up is noisy, every figure of it is marked."""
    by = {row["metric"]: row for row in rows if row["median"] is not None}
    mark = " ~" * any(is_noisy(by.get(metric)) for metric in ("seconds", "speedup"))
    time = by.get("seconds")

    def number(metric: str) -> str:
        if metric not in by:
            return ""
        value = by[metric]["median"]
        unit = {"speedup": " x", "peak_bytes": "B", "bytes_per_position": "B"}.get(metric, "")
        return (duration(value) if metric.endswith("_seconds") else short_number(value) + unit) + mark

    shown = ""
    if time is not None:
        value, unit = duration(time["median"]).split()
        scale = float(value) / time["median"]
        shown = f"{value} ({scale * time['p05']:.3g} to {scale * time['p95']:.3g}) {unit}{mark}"
    more = [f"{short_number(by[m]['median'])} {unit or by[m]['unit']}".strip() for m, unit in MORE.items() if m in by]
    more += [by["right"]["note"]] if "right" in by else []
    failed = [row for row in rows if row["status"] != "ok"]
    errors = [f" by {row['error']:.1e}" if row["error"] is not None else "" for row in failed]
    notes = [f"{row['note']}{error}" for row, error in zip(failed, errors, strict=True)]
    shown = shown or next((row["status"] for row in failed), "")
    return [shown, *(number(metric) for metric in METRICS), ", ".join(more), "; ".join(notes)]


def show(document: Document, console: Console) -> None:
    """The table of a study, and whether the machine was quiet enough."""
    head, *lines = cells(document)
    shown = [i for i, name in enumerate(head) if name not in ("B/position", "note")]  # too wide for a terminal
    kept = [[line[i] for i in shown] for line in [head, *lines]]
    title = f"{document['study']} on {document['provenance']['device']}"
    console.print(table(title, kept[0], kept[1:]), width=min(console.width, WIDTH))
    for reason in dict.fromkeys(line[-1] for line in lines if head[-1] == "note" and line[-1]):
        console.print(f"{', '.join(dict.fromkeys(line[0].strip() for line in lines if line[-1] == reason))}: {reason}")
    timed = sum(row["metric"] == "seconds" and row["n"] > 1 for row in document["rows"])
    if document["noisy"]:
        noisy = f"{len(document['noisy'])} of {timed} times"
        console.print(f"machine too noisy: {noisy}, marked ~, may differ by more than {TOO_NOISY:.0%} in another run")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d", "#6b7280")
MOST_BARS = 14  # of one group; the smaller ones share a line


def draw(documents: Iterable[Document], kind: str) -> bytes:
    """All pictures of some studies, two in a row, as "png" or "svg"; empty without numbers or without matplotlib."""
    chosen = [
        (document, picture, rows)
        for document in documents
        for picture in STUDIES[document["study"]].pictures
        if (rows := [r for r in document["rows"] if _is_of(picture, r)])
    ]
    if not chosen or importlib.util.find_spec("matplotlib") is None:
        return b""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(2, len(chosen))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": chosen[0][0]["study"], "font.size": 9}):
        bars = [len(_grouped(rows, defaultdict(str))) for _, p, rows in chosen if p.kind == "bars"]
        height = max(0.27 * max(bars, default=0) + 1, 4.0 if len(bars) < len(chosen) else 1.0)
        canvas = Figure(figsize=(6.4 * columns, height * math.ceil(len(chosen) / columns)), layout="constrained")
        grid = canvas.subplots(math.ceil(len(chosen) / columns), columns, squeeze=False)
        for axes in grid.flat[len(chosen) :]:
            axes.set_visible(False)
        for axes, (document, picture, rows) in zip(grid.flat, chosen, strict=False):
            providers = list(dict.fromkeys(row["provider"] for row in document["rows"]))
            colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(providers)}  # the same in every picture
            (_lines if picture.kind == "lines" else _bars)(axes, picture, rows, colours)
            axes.set_title(f"{document['study']}: {picture.title}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, axis="both" if picture.kind == "lines" else "x")
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _is_of(picture: Picture, row: Mapping[str, Any]) -> bool:
    return row["median"] is not None and (row["metric"], row["mode"]) == (picture.metric, picture.mode)


def _lines(axes: Any, picture: Picture, rows: Rows, colours: Mapping[str, str]) -> None:
    """Lines with bands of the 5 and 95 % quantiles; markers with whiskers for fewer than three points."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((row for row in rows if row["provider"] == provider), key=lambda row: row["x"])
        x, y = ([row[key] for row in points] for key in ("x", "median"))
        low, high = ([row["median"] if row[q] is None else row[q] for row in points] for q in ("p05", "p95"))
        colour = colours[provider]
        if len(points) < 3:
            whiskers = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, whiskers, fmt="D", color=colour, label=provider, markersize=5, capsize=3)
        else:
            axes.plot(x, y, "o-", color=colour, label=provider, markersize=3.5, linewidth=1.4)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["x"] for row in rows})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_minor_formatter("")
    axes.set(xlabel=rows[0]["x_name"], ylabel=picture.label)
    axes.legend(fontsize=8, framealpha=0.7, edgecolor="none")


def _grouped(rows: Rows, colours: Mapping[str, str]) -> list[tuple[str, float | None, str]]:
    """Label, length, colour of every bar; without a length the head of a group, which has one x, largest bar first."""
    groups: dict[str, list[tuple[str, float | None, str]]] = {}
    for row in rows:
        named = isinstance(row["x"], str)  # bars of one provider, told apart by x
        group = "" if named or row["x"] is None else f"{row['x']:,} {row['x_name']}"
        label = row["x"] if named else row["provider"]
        groups.setdefault(group, []).append((label, row["median"], colours[row["provider"]]))
    lines: list[tuple[str, float | None, str]] = []
    for group, bars in groups.items():
        bars.sort(key=lambda bar: -(bar[1] or 0.0))
        kept = [bar for bar in bars[:MOST_BARS] if bar[1]]
        rest = bars[len(kept) :]
        lines += [(group, None, "")] * (len(groups) > 1) + kept
        lines += [(f"the other {len(rest)}, each at most", rest[0][1], COLOURS[-1])] if rest else []
    return lines


def _bars(axes: Any, picture: Picture, rows: Rows, colours: Mapping[str, str]) -> None:
    """A group for every x, its bars from the largest to the smallest."""
    lines = _grouped(rows, colours)
    for y, (_, value, colour) in enumerate(lines):
        if value is not None:
            axes.barh(y, value, color=colour, height=0.7)
            axes.annotate(f" {short_number(value)}", (value, y), va="center", fontsize=8)
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    for tick, (_, value, _) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if value is None else "normal")
    axes.margins(x=0.15)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.set(xlabel=picture.label)


# ---------------------------------------------------------------------------------------------------------------------
# The README's figures


class _Formatter(Formatter):
    """Format specifications of the README's template besides Python's own, and ``{fast[losses][val]}`` of the files."""

    def __init__(self) -> None:
        self.made = {name: make() for name, make in MADE.items()}

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        """A made value, or a results file."""
        return self.made[key] if key in self.made else _read(key)

    def format_field(self, value: Any, spec: str) -> str:
        return SPECS[spec](value) if spec in SPECS else str(super().format_field(value, spec))


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / FILES.get(name, f"{name}.json")).read_text(encoding="utf-8"))
    if "track" in found:
        splits = found["losses"].items()
        found["losses"] = {split: {"mean": statistics.mean(v), "std": statistics.stdev(v)} for split, v in splits}
    return found


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


FILES = {"reproduce": "reproduce/reproduce.json", "open": "speedrun-open.json", "profile": "speedrun-profile.json"}
SPECS: dict[str, Callable[[Any], str]] = {
    "seconds": _seconds,
    "timing": lambda q: f"{_seconds(q['median'])} ({_seconds(q['min'])} to {_seconds(q['max'])}, {q['runs']} runs)",
    "spread": lambda loss: f"{loss['mean']:.4f} ± {loss['std']:.4f}",
    "device": lambda source: f"{source['device']}, torch {source['versions']['torch']}",
    "count": lambda values: str(len(values)),
    "percent": lambda share: f"{100 * share:.0f}",
    "parts": lambda ms: ", ".join(f"{name} {100 * each / sum(ms.values()):.0f} %" for name, each in ms.items()),
}


def _mutants() -> str:
    found = re.search(r"Caught by the tests: (\d+ of \d+)", (README.parent / "tests/MUTANTS.md").read_text("utf-8"))
    assert found is not None
    return found[1]


def _checks() -> dict[str, Any]:
    checks = _read("certificate")["checks"]
    errors = [check["max_abs_error"] for check in checks if check["name"].startswith("trajectory")]
    return {"all": len(checks), "passed": sum(check["passed"] for check in checks), "trajectory": max(errors)}


def _post() -> dict[str, Any]:
    return {row["model"]: row for row in _read("reproduce")["rows"]}


def _headlines(found: Mapping[str, Documents]) -> tuple[list[str], list[list[str]]]:
    """Devices, and for every headline the question, the answer of every device, the command."""
    columns = {device_of(documents): headlines(documents) for documents in found.values()}
    questions = next(iter(columns.values()))
    if not any(row["device"] != "cpu" for d in found.values() for _, doc in d.values() for row in doc["rows"]):
        columns["GPU"] = [(question, NOT_MEASURED, study) for question, _, study in questions]
    rows = [
        [question, *(answers[i][1] for answers in columns.values()), f"`convwave bench {study}`"]
        for i, (question, _, study) in enumerate(questions)
    ]
    return list(columns), rows


def _bench() -> str:
    found = devices(RESULTS)
    columns, rows = _headlines(found)
    lines = [["speed-up, 5 to 95 % of the ratios within rounds; rate", *columns, "command"]]
    lines += [["---"] * len(lines[0]), *rows]
    every = [(name, *entry) for documents in found.values() for name, entry in documents.items()]
    short = ", ".join(name for name, _, document in every if not document["complete"])
    links = ", ".join(f"[{name}]({path.relative_to(README.parent).as_posix()})" for name, path, _ in every)
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + "\n\n~: may differ by more than 10 % in another run."
        + f" Cut short: {short}." * bool(short)
        + f"\nWith device, clocks, versions, commit, command, flags and quantiles: {links}."
    )


MADE: dict[str, Callable[[], Any]] = {"bench": _bench, "checks": _checks, "mutants": _mutants, "post": _post}
BLOCK = re.compile(r"<!-- begin (\w+) -->(.*?)<!-- end \1 -->", re.DOTALL)


def render(text: str) -> str:
    """The README with every block made anew from its template."""
    made = _Formatter().format(BLOCKS.read_text(encoding="utf-8"))
    blocks = {match[1]: match[0] for match in BLOCK.finditer(made)}
    return BLOCK.sub(lambda match: blocks[match[1]], text)


# ---------------------------------------------------------------------------------------------------------------------
# The page

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")


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
    """The page as text: a function of the files in `results` alone.

    Raises:
        UsageError: no study was ever written there.
    """
    found = devices(results)
    if not found:
        raise UsageError(f"--report: expected results of 'convwave bench' in {results}, found none")
    columns, rows = _headlines(found)
    summary = _html([["", *columns, ""], *([cell.strip("`") for cell in row] for row in rows)])
    sections = [
        f"<h2>{escape(device_of(documents))}</h2>" + "".join(_study(results, name, documents) for name in STUDIES)
        for documents in found.values()
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(summary=summary, studies="".join(sections))


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
