"""One page of all studies, self-contained: no script, nothing loaded from elsewhere, pictures as inline SVG.

    convwave bench --report

It follows the reader's theme, fits a phone, and links every picture and table to the JSON that it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.command import cells
from benchmarks.documents import RESULTS, Document
from benchmarks.headlines import NOT_MEASURED, device_of, devices, headlines
from benchmarks.studies import STUDIES
from convwave.files import write_atomic
from convwave.train.loop import UsageError

PAGE = "report.html"

LIGHT = ("#2563eb", "#c2620a", "#047857", "#9333ea", "#dc2626", "#0e7490", "#4d7c0f", "#be185d", "#64748b")
DARK = ("#7aa7ff", "#f5a54a", "#3ddba4", "#c99bff", "#ff8080", "#4fd3ea", "#a9d65c", "#ff86b8", "#a3b1c6")

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --text: #1b1f24; --quiet: #59636e; --rule: #dfe2e6; --panel: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --text: #e4e7eb; --quiet: #9aa5b1; --rule: #30363d; --panel: #1b1f24; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 2.25rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
a { color: var(--s0); }
code { font-size: .9em; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .875rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .25rem; }
figcaption span { font-weight: 400; color: var(--quiet); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
svg text.strong { fill: var(--text); }
.grid { stroke: var(--rule); }
.line { fill: none; stroke: var(--c); stroke-width: 2; }
.dot, .bar { fill: var(--c); }
.band { fill: var(--c); opacity: .16; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .25rem 0 0; padding: 0; }
.legend li { font-size: .85rem; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.key { background: var(--c); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { color: var(--quiet); font-weight: 500; }
td.number { white-space: nowrap; }
td.absent { color: var(--quiet); white-space: nowrap; }
.stack code { white-space: nowrap; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  .stack thead { display: none; }
  .stack tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--rule); }
  .stack td, .stack th { display: block; padding: 0; border: 0; }
  .stack th { font-weight: 600; }
  .stack td[data-device]::before { content: attr(data-device) ": "; color: var(--quiet); }
}
"""


def write_report(results: Path = RESULTS) -> list[Path]:
    """Write the page into a folder of results, and where that is the checkout's own, the README's tables too.

    Raises:
        UsageError: no study was ever written there.
    """
    text = page(results)
    path = results / PAGE
    write_atomic(path, text.encode())
    written = [path]
    if results.resolve() == RESULTS:
        from benchmarks.readme import README, render

        write_atomic(README, render(README.read_text(encoding="utf-8")).encode())
        written.append(README)
    return written


def page(results: Path) -> str:
    """The page as text: a function of the files in `results` alone.

    Raises:
        UsageError: no study was ever written there.
    """
    found = devices(results)
    if not found:
        raise UsageError(f"--report: expected results of 'convwave bench' in {results}, found none")
    sections = "".join(_device(name, documents) for name, documents in found.items())
    body = f"<h1>convwave: benchmarks</h1>{_introduction()}{_headlines(found)}{sections}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>convwave: benchmarks</title><style>{STYLE}{_colours()}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _colours() -> str:
    def variables(colours: Sequence[str]) -> str:
        return ":root { " + " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours)) + " }\n"

    classes = "".join(f".s{i} {{ --c: var(--s{i}); }}\n" for i in range(len(LIGHT)))
    return f"{variables(LIGHT)}@media (prefers-color-scheme: dark) {{ {variables(DARK)} }}\n{classes}"


def _introduction() -> str:
    return (
        "<p>When is a dilated convolution faster than windows, and how close is each kernel to the hardware's limit? "
        "Every competitor's result is checked against float64 before it is timed; one that is wrong has no time. "
        "All are timed in turn, round by round; a figure is a median, with its 5 and 95 % quantiles (the bands in the "
        "pictures), and a speed-up is the median of the ratios within rounds. Times marked ~ may differ by more than "
        "10 % in another run, judging by their spread and by how the later rounds differ from the earlier ones.</p>"
    )


def _headlines(found: dict[str, Any]) -> str:
    columns = {name: headlines(documents) for name, documents in found.items()}
    gpu = any(row["device"].startswith("cuda") for d in found.values() for _, doc in d.values() for row in doc["rows"])
    heads = [*(device_of(documents) for documents in found.values()), *([] if gpu else ["GPU"])]
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = []
    for i, (question, _, study) in enumerate(next(iter(columns.values()))):
        values = [_linked(answers[i][1], folder, found[folder], study) for folder, answers in columns.items()]
        values += [] if gpu else [NOT_MEASURED]
        shown = "".join(
            f'<td data-device="{escape(name)}"{" class=absent" * (value == NOT_MEASURED)}>{value}</td>'
            for name, value in zip(heads, values, strict=True)
        )
        lines.append(
            f'<tr><th scope="row">{escape(question)}</th>{shown}<td><code>convwave bench {study}</code></td></tr>'
        )
    return (
        f'<div class="scroll"><table class="stack"><thead><tr><th></th>{head}<th></th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _linked(value: str, folder: str, documents: Any, study: str) -> str:
    """A headline as a link to its JSON."""
    if value == NOT_MEASURED:
        return value
    return f'<a href="{escape(_link(folder, documents[study][0]))}">{escape(value)}</a>'


def _link(folder: str, path: Path) -> str:
    return path.name if folder == "." else f"{folder}/{path.name}"


def _device(folder: str, documents: Any) -> str:
    parts = [f"<h2>{escape(device_of(documents))}</h2>"]
    for name, study in STUDIES.items():
        parts.append(f'<h3 id="{escape(folder)}-{name}">{escape(study.question)}</h3>')
        if name not in documents:
            parts.append(f'<p class="quiet">{name}: {NOT_MEASURED}</p>')
            continue
        path, document = documents[name]
        parts.append(_study(document, _link(folder, path)))
    return f"<section>{''.join(parts)}</section>"


def _study(document: Document, link: str) -> str:
    provenance = document["provenance"]
    versions = provenance["versions"]
    facts = [
        f"<code>{escape(provenance['command'])}</code>",
        f"commit {escape(str(provenance['commit']))}",
        escape(provenance["date"][:10]),
        f"torch {escape(str(versions['torch']))}",
        f"{provenance['flags']['threads']} CPU threads",
        f"float32 products: {escape(provenance['flags']['float32_matmul_precision'])}",
        *(f"{escape(str(key))} {escape(str(value))}" for key, value in provenance["clocks"].items() if value),
    ]
    source = f'<a href="{escape(link)}">{escape(link)}</a>'
    notes = []
    if not document["complete"]:
        notes.append("This run was cut short.")
    if document["noisy"]:
        notes.append(f"Machine too noisy for {len(document['noisy'])} of its times, marked ~.")
    pictures = "".join(
        f"<figure><figcaption>{escape(chart.title)} <span>({escape(chart.y_label)})</span></figcaption>"
        f'{charts.svg(chart)}{charts.legend(chart)}<div class="quiet">{source}</div></figure>'
        for chart in charts.charts(document)
    )
    return (
        f'<p class="quiet">{" · ".join(facts)}. {escape(" ".join(notes))}</p>'
        f'<div class="pictures">{pictures}</div>'
        f"<details><summary>All figures</summary>{_table(document)}<p>{source}</p></details>"
    )


def _table(document: Document) -> str:
    lines = cells(document)
    head = "".join(f"<th>{escape(column)}</th>" for column in lines[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
