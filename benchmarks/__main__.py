"""`python -m benchmarks`, the command behind `convwave bench`: run studies, or make the report of what they wrote."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

import convwave as cw
from benchmarks import report
from benchmarks.harness import TIME_UP, Row, why
from benchmarks.results import RESULTS, Document, is_noisy, new_document, read_documents, where, write_json
from benchmarks.studies import STUDIES, Plan, Step
from convwave.cli.console import check_device, stderr
from convwave.data import DataError
from convwave.files import write_atomic
from convwave.runs.registry import device_name
from convwave.train import UsageError, threads

POINT = ("study", "mode", "x_name", "x", "device")


def run_studies(
    names: Sequence[str],
    words: cw.Words,
    out: Path,
    console: Console,
    *,
    device: str = "cpu",
    quick: bool = False,
    budget: float = math.inf,
    resume: bool = False,
) -> list[Document]:
    """Run studies one after the other; ``STUDY.json`` is written after every step, then ``STUDY.png``.

    The options are those of the command. Each study gets an equal share of what is left of the budget, in seconds, when
    it begins; what does not fit is recorded as not measured. Returns the documents as they were written.
    """
    names = [name for name in names if not (resume and _is_done(out, name, device, quick, console))]
    options = f"--device {device} --threads {torch.get_num_threads()}" + " --quick" * quick
    options += "" if budget == math.inf else f" --budget {budget:g}"
    ends = time.monotonic() + budget
    short: dict[str, Any] = {"rounds": 8, "seconds": 1.0, "sample_seconds": 0.001} if quick else {}
    documents = []
    for i, name in enumerate(names):
        now = time.monotonic()
        plan = Plan(device, deadline=now + (ends - now) / (len(names) - i), words=words.words, quick=quick, **short)
        document, path = new_document(name, plan, f"convwave bench {name} {options}", words), out / f"{name}.json"
        documents.append(document)
        console.print(f"{name}: {STUDIES[name].question}")
        write_json(path, document)
        steps = list(STUDIES[name].steps(plan))
        for number, step in enumerate(steps, 1):
            rows = _measure(step, Row(zip(POINT, (name, *step.point, device), strict=True)), plan, console)
            document["rows"] += rows
            document["noisy"] += [where(row) for row in rows if row["metric"] == "seconds" and is_noisy(row)]
            document["complete"] = number == len(steps) and not any(r["note"] == TIME_UP for r in document["rows"])
            write_json(path, document)
        report.show(document, console)
        if drawn := report.draw(document, "png"):
            write_atomic(path.with_suffix(".png"), drawn)
        console.print(f"written: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))
    return documents


def _measure(step: Step, point: Row, plan: Plan, console: Console) -> list[Row]:
    """The rows of a step; one that fails as a whole must not take the others with it."""
    if time.monotonic() > plan.deadline:
        return [point.absent("all", TIME_UP)]
    console.print(f"  {report.place(*step.point)}")
    torch.compiler.reset()  # a function compiled too often silently runs uncompiled
    try:
        return step.measure(point)
    except Exception as error:
        return [point.absent("all", error)]


def _is_done(out: Path, name: str, device: str, quick: bool, console: Console) -> bool:
    """Whether a folder holds this study complete, measured on the same device at the same sizes."""
    _, document = read_documents(out).get(name, (out, None))
    if document is None or not document["complete"] or document["settings"]["quick"] != quick:
        return False
    same = bool(document["provenance"]["device"] == device_name(device))
    console.print(f"{name}: done on {document['provenance']['date'][:16]}, passed over" * same, end="\n" * same)
    return same


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {study.name:<10} {study.question}" for study in STUDIES.values())
    p = _Parser(
        "convwave bench",
        description=f"Measure convwave against the windowed MLP and torch.nn. Studies:\n\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("studies", nargs="*", metavar="STUDY", help="which (default: all)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/bench; with --report benchmarks/results")
    p.add_argument("--resume", action="store_true", help="pass over studies that --out holds complete")
    p.add_argument("--quick", action="store_true", help="small sizes, few samples, nothing compiled")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, the steadiest)")
    text = "seconds for all studies; the rest is not measured"
    p.add_argument("--budget", type=float, default=math.inf, metavar="S", help=text)
    p.add_argument("--report", action="store_true", help="measure nothing: make the page and the README's tables")
    p.add_argument("--data", type=Path, metavar="FILE", help="one word a line (default: names.txt or the bundled list)")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    return p


def run(args: argparse.Namespace, console: Console) -> tuple[int, dict[str, object]]:
    """Exit status and what --json prints."""
    if args.report:
        if args.studies:
            raise UsageError("--report: makes the report of all studies, takes no STUDY")
        written = [str(path) for path in report.write_report(args.out or RESULTS)]
        console.print("\n".join(f"written: {path}" for path in written))
        return 0, {"written": written}
    unknown = [name for name in args.studies if name not in (*STUDIES, "all")]
    if unknown:
        raise UsageError(f"STUDY: expected some of {', '.join(STUDIES)}, or all, got {unknown[0]!r}")
    names = list(STUDIES) if "all" in args.studies or not args.studies else list(dict.fromkeys(args.studies))
    if args.threads < 1:
        raise UsageError(f"--threads: expected at least 1, got {args.threads}")
    if not args.budget > 0:
        raise UsageError(f"--budget: expected more than 0 seconds, got {args.budget:g}")
    check_device(args.device)
    words = cw.load_words(args.data)
    console.print(f"data: {words.source}, {len(words.words):,} words")
    kept = {name: getattr(args, name) for name in ("device", "quick", "budget", "resume")}
    with threads(args.threads):
        documents = run_studies(names, words, args.out or Path("runs/bench"), console, **kept)
    wrong = any(row["status"] == "wrong" for document in documents for row in document["rows"])
    return int(wrong), {"studies": {document["study"]: document for document in documents}}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if a result is wrong; 2, with one line, for bad usage or bad input; 130 for Ctrl-C."""
    try:
        args = parser().parse_args(arguments)
        status, found = run(args, stderr())
    except (UsageError, DataError, OSError) as error:
        stderr().print(f"convwave bench: {why(str(error))}")
        return 2
    except KeyboardInterrupt:
        stderr().print("interrupted")
        return 130
    if args.json:
        print(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
