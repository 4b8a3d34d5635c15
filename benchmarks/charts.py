"""Pictures of a study: one description of what is drawn, for the PNG (matplotlib) and for the report's SVG."""

from __future__ import annotations

import html
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.studies import STUDIES, Figure

Document = Mapping[str, Any]

# readable on white and on black; the report's style sheet has a set for each theme under the same numbers
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d", "#6b7280")


class Series(NamedTuple):
    """What one provider measured: medians over x with their 5 and 95 % quantiles."""

    label: str
    x: list[float]
    median: list[float]
    low: list[float]
    high: list[float]
    colour: int


class Chart(NamedTuple):
    """A figure with its numbers."""

    title: str
    x_label: str
    y_label: str
    kind: str
    series: list[Series]


def charts(document: Document) -> list[Chart]:
    """The pictures of a study for which it has numbers."""
    found = []
    providers = list(dict.fromkeys(row["provider"] for row in document["rows"]))
    for figure in STUDIES[document["study"]].figures:
        chart = _chart(figure, document["rows"], providers)
        if chart.series:
            found.append(chart)
    return found


def _chart(figure: Figure, rows: Sequence[Mapping[str, Any]], providers: Sequence[str]) -> Chart:
    chosen = [
        row
        for row in rows
        if row["metric"] == figure.metric and row["mode"] == figure.mode and row["median"] is not None
    ]
    x_name = next((str(row["x_name"]) for row in chosen if row["x_name"]), "")
    several = len({row["x"] for row in chosen}) > 1
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in chosen:
        label = str(row["provider"])
        if figure.kind == "bars" and several:
            label = f"{row['x']}" if isinstance(row["x"], str) else f"{label}, {row['x']:,} {x_name}"
        grouped.setdefault(label, []).append(row)
    series = []
    for label, points in grouped.items():
        if figure.kind == "lines":
            points = sorted(points, key=lambda row: row["x"])
        xs = [float(row["x"]) if figure.kind == "lines" else 0.0 for row in points]
        low, high = ([row[q] if row[q] is not None else row["median"] for row in points] for q in ("p05", "p95"))
        colour = providers.index(points[0]["provider"]) % len(COLOURS)  # the same in every picture of a study
        series.append(Series(label, xs, [row["median"] for row in points], low, high, colour))
    return Chart(figure.title, x_name, figure.label, figure.kind, series)


def short_number(value: float) -> str:
    """Three digits and a unit of a thousand: 1.23 k, 45.6 M."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.2e}"


# ---------------------------------------------------------------------------------------------------------------------
# PNG


def png(documents: Sequence[Document]) -> bytes | None:
    """All pictures of some studies, side by side, as a PNG; None where there is nothing to draw, or no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure as Canvas

    drawn = [(document, chart) for document in documents for chart in charts(document)]
    if not drawn:
        return None
    columns = min(2, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    canvas = Canvas(figsize=(6.6 * columns, 4.2 * lines), layout="constrained")
    grid = canvas.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, (document, chart) in zip(grid.flat, drawn, strict=False):
        if chart.kind == "lines":
            for series in chart.series:
                colour = COLOURS[series.colour]
                axes.plot(
                    series.x, series.median, "o-", color=colour, label=series.label, markersize=3.5, linewidth=1.3
                )
                axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
            axes.set(xscale="log", yscale="log", xlabel=chart.x_label, ylabel=chart.y_label)
            axes.set_xscale("log", base=2)
            axes.legend(frameon=False, fontsize=8)
        else:
            labels = [series.label for series in chart.series]
            values = [series.median[0] for series in chart.series]
            axes.barh(labels, values, color=COLOURS[0])
            for y, value in enumerate(values):
                axes.annotate(
                    short_number(value), (value, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
                )
            axes.invert_yaxis()
            axes.margins(x=0.18)
            axes.tick_params(axis="y", labelsize=8 if len(labels) < 16 else 5)
            axes.set(xlabel=chart.y_label)
        axes.set_title(f"{document['study']}: {chart.title}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# SVG

WIDTH, LEFT, RIGHT, TOP, PLOT, BOTTOM = 460, 52, 20, 10, 230, 40


def svg(chart: Chart) -> str:
    """A picture whose colours are the page's: classes s0, s1, .. and `currentColor`."""
    return _lines(chart) if chart.kind == "lines" else _bars(chart)


def _lines(chart: Chart) -> str:
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for values in (series.median, series.low, series.high) for y in values if y > 0]
    x0, x1 = _span(min(xs), max(xs), 2)
    y0, y1 = _span(min(ys), max(ys), 10)

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (math.log(x) - math.log(x0)) / (math.log(x1) - math.log(x0))
        down = TOP + PLOT * (1 - (math.log(max(y, y0)) - math.log(y0)) / (math.log(y1) - math.log(y0)))
        return right, down

    parts = []
    for y in _ticks(y0, y1, 10):
        _, down = at(x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{_escape(short_number(y))}</text>')
    ticks = sorted(set(xs))
    for x in ticks:
        right, _ = at(x, y0)
        crowded = len(ticks) > 8 and ticks.index(x) % 2 == 1
        if not crowded:
            text = f"{x:,.0f}"
            parts.append(f'<text x="{right:.1f}" y="{TOP + PLOT + 16}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    height = TOP + PLOT + BOTTOM
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{_escape(chart.x_label)}</text>')
    for series in chart.series:
        points = [at(x, y) for x, y in zip(series.x, series.median, strict=True)]
        band = [at(x, y) for x, y in zip(series.x, series.high, strict=True)]
        band += [at(x, y) for x, y in zip(reversed(series.x), reversed(series.low), strict=True)]
        kind = f"s{series.colour}"
        parts.append(f'<polygon class="band {kind}" points="{_points(band)}"/>')
        parts.append(f'<polyline class="line {kind}" points="{_points(points)}"/>')
        for (right, down), x, y in zip(points, series.x, series.median, strict=True):
            title = _escape(f"{series.label}, {x:,.0f} {chart.x_label}: {short_number(y)} {chart.y_label}")
            parts.append(
                f'<circle class="dot {kind}" cx="{right:.1f}" cy="{down:.1f}" r="3"><title>{title}</title></circle>'
            )
    return _svg(chart, height, parts)


def _bars(chart: Chart) -> str:
    """Labels above their bars: there is room for them on a phone."""
    step = 34 if len(chart.series) <= 16 else 27
    largest = max((series.median[0] for series in chart.series), default=0.0) or 1.0
    parts = []
    for i, series in enumerate(chart.series):
        top = TOP + i * step
        value = series.median[0]
        length = max(1.0, (WIDTH - 90) * value / largest)
        parts.append(f'<text x="0" y="{top + 9}">{_escape(series.label)}</text>')
        parts.append(f'<rect class="bar s0" x="0" y="{top + 14}" width="{length:.1f}" height="{step - 22}" rx="2"/>')
        baseline = top + 14 + (step - 22) / 2 + 4
        parts.append(
            f'<text class="strong" x="{length + 6:.1f}" y="{baseline:.1f}">{_escape(short_number(value))}</text>'
        )
    return _svg(chart, TOP + step * len(chart.series), parts)


def legend(chart: Chart) -> str:
    """The series of a picture with lines, as HTML."""
    if chart.kind != "lines":
        return ""
    items = [f'<li><span class="key s{series.colour}"></span>{_escape(series.label)}</li>' for series in chart.series]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(chart: Chart, height: float, parts: list[str]) -> str:
    label = _escape(f"{chart.title} ({chart.y_label})")
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _span(low: float, high: float, base: float) -> tuple[float, float]:
    """The range of a logarithmic axis: never empty."""
    if high > low * 1.05:
        return (low, high) if base == 2 else (low / 1.25, high * 1.25)
    return low / base, high * base


def _ticks(low: float, high: float, base: float) -> list[float]:
    """Powers of the base, with 2 and 5 between them when there are few."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
        ticks = [s * base**power for power in range(first, last + 1) for s in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return ticks


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _escape(text: object) -> str:
    return html.escape(str(text), quote=True)
