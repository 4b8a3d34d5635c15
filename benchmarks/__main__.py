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
from benchmarks.results import BUNDLE, RESULTS, Document, new_document, noisy_rows, read_documents, write_document
from benchmarks.studies import STUDIES, Plan, Step
from convwave.cli.console import stderr
from convwave.data import DataError
from convwave.files import write_atomic
from convwave.runs.registry import device_name
from convwave.train import UsageError, threads


def run_studies(
    names: Sequence[str],
    words: cw.Words,
    out: Path,
    console: Console,
    *,
    device: str = "cpu",
    quick: bool = False,
    budget: float = math.inf,
    bundle: bool = False,
    resume: bool = False,
) -> list[Document]:
    """Run studies one after the other; ``STUDY.json`` is written after every step, then ``STUDY.png``.

    Args:
        names: of studies.
        words: of the vocabulary and the batches.
        out: folder of the files.
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
    names = [name for name in names if not (resume and _is_done(out, name, device, quick, console))]
    options = f"--device {device} --threads {torch.get_num_threads()}" + " --quick" * quick
    options += "" if budget == math.inf else f" --budget {budget:g}"
    ends = time.monotonic() + budget
    short: dict[str, Any] = {"rounds": 8, "seconds": 1.0, "sample_seconds": 0.001} if quick else {}
    documents = []
    for i, name in enumerate(names):
        now = time.monotonic()
        deadline = now + (ends - now) / (len(names) - i)
        plan = Plan(device, deadline=deadline, words=words.words, quick=quick, **short)
        document = new_document(name, plan, f"convwave bench {name} {options}", words)
        documents.append(document)
        console.print(f"{name}: {STUDIES[name].question}")
        write_document(document, out, bundle)
        steps = list(STUDIES[name].steps(plan))
        for number, step in enumerate(steps, 1):
            point = Row(name, *step.point, device)
            if time.monotonic() <= deadline:
                console.print(f"  {number} of {len(steps)}: {report.place(point.mode, point.x_name, point.x)}")
            document["rows"] += [vars(row) for row in _measure(step, point, deadline)]
            document["noisy"] = noisy_rows(document["rows"])
            document["complete"] = number == len(steps) and not any(r["note"] == TIME_UP for r in document["rows"])
            path = write_document(document, out, bundle)
        report.show(document, console)
        drawn = report.draw([d for _, d in read_documents(out).values()] if bundle else [document], "png")
        if drawn:
            write_atomic(path.with_suffix(".png"), drawn)
        console.print(f"written: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))
    return documents


def _measure(step: Step, point: Row, deadline: float) -> list[Row]:
    """The rows of a step; one that fails as a whole must not take the others with it."""
    if time.monotonic() > deadline:
        return [point.absent("all", TIME_UP)]
    torch.compiler.reset()  # a function compiled too often silently runs uncompiled
    try:
        return step.measure(*step.arguments, point)
    except Exception as error:
        return [point.absent("all", error)]


def _is_done(out: Path, name: str, device: str, quick: bool, console: Console) -> bool:
    """Whether a folder holds this study complete, measured on the same device at the same sizes."""
    _, document = read_documents(out).get(name, (out, None))
    if document is None or not document["complete"]:
        return False
    same = document["provenance"]["device"] == device_name(device) and document["settings"]["quick"] == quick
    if same:
        console.print(f"{name}: done on {document['provenance']['date'][:16]}, passed over")
    return bool(same)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parser() -> argparse.ArgumentParser:
    p = _Parser("convwave bench", description="Measure convwave against the windowed MLP and torch.nn.")
    p.add_argument("studies", nargs="*", metavar="STUDY", help="which (default: all); --list shows them")
    p.add_argument("--list", action="store_true", help="measure nothing: list the studies and what they answer")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/bench; with --report benchmarks/results")
    p.add_argument("--resume", action="store_true", help="pass over studies that --out holds complete")
    p.add_argument("--quick", action="store_true", help="small sizes, few samples, nothing compiled")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, the steadiest)")
    p.add_argument(
        "--budget", type=float, default=math.inf, metavar="S", help="seconds for all studies; the rest is not measured"
    )
    p.add_argument("--bundle", action="store_true", help=f"all studies in one {BUNDLE} and one PNG")
    p.add_argument("--report", action="store_true", help="measure nothing: make the page and the README's tables")
    p.add_argument("--data", type=Path, metavar="FILE", help="one word a line (default: names.txt or the bundled list)")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    return p


def run(args: argparse.Namespace, console: Console) -> tuple[int, dict[str, object]]:
    """Exit status and what --json prints."""
    if args.list:
        console.print("\n".join(f"{study.name:<10} {study.question}" for study in STUDIES.values()))
        return 0, {"studies": {study.name: study.question for study in STUDIES.values()}}
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
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {args.device!r} is not available: {why(str(error))}") from None
    words = cw.load_words(args.data)
    console.print(f"data: {words.source}, {len(words.words):,} words")
    kept = {name: getattr(args, name) for name in ("device", "quick", "budget", "bundle", "resume")}
    with threads(args.threads):
        documents = run_studies(names, words, args.out or Path("runs/bench"), console, **kept)
    wrong = any(row["status"] == "wrong" for document in documents for row in document["rows"])
    return int(wrong), {"studies": {document["study"]: document for document in documents}}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if a result is wrong; 2, with one line, for bad use or bad input; 130 for Ctrl-C."""
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
