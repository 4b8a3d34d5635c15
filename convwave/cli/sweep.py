"""``convwave sweep``: one worker, or several as processes of their own, and what came of it."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convwave.sweep.report import described
from convwave.sweep.study import Progress
from convwave.train.config import Interrupted, UsageError
from convwave.train.recipes import parse_field

if TYPE_CHECKING:
    from convwave.sweep.plan import Plan
    from convwave.sweep.study import Row

_KILLED = 100  # times that workers of one sweep are started again
_SHOWN = 30  # configurations of a report on the terminal


def sweep(args: argparse.Namespace) -> None:
    """``convwave sweep``."""
    if args.file == "report":
        _report(args)
        return
    from convwave.sweep.plan import read_plan

    plan = read_plan(Path(args.file))
    if args.out is None:
        raise UsageError("--out: needed, the folder of the sweep")
    if args.baseline or args.folder is not None:
        raise UsageError("--baseline, DIR: are for 'convwave sweep report DIR'")
    from convwave.cli.console import check_device, corpus, print_json
    from convwave.data.packing import Corpus
    from convwave.data.words import load_words
    from convwave.runs.registry import provenance
    from convwave.sweep.study import Prepared, Worker, open_storage, open_study, results_json, rows_of, write_results
    from convwave.train.loop import interruptible

    check_device(plan.device)
    words = corpus(args) if args.worker is None else Corpus(load_words(args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    source = provenance(re.sub(r"//[^/@\s]*@", "//", args.command_line))  # without a storage's password
    if args.workers > 1:
        open_study(args.out, open_storage(args.out, args.storage), plan, words.sha256)  # refusals come once
        _workers(args)
        rows = rows_of(open_study(args.out, open_storage(args.out, args.storage))[0])
        write_results(args.out, plan, rows, source)
    else:
        prepared = Prepared(words)
        with interruptible() as interrupted:
            progress = SweepProgress(args.worker)
            worker = Worker(plan, prepared, args.out, args.storage, progress, interrupted, source)
            try:
                rows = worker.work()
            except Interrupted as error:
                raise Interrupted(f"{error}; the same command continues") from None
    if args.worker is None and _first_of_many():
        _table(plan, rows)
        print_json(args, results_json(plan, rows))


class SweepProgress(Progress):
    """A line a worker: trials done by all, the best so far, time left. On a terminal it is overwritten, elsewhere
    there is another one every two seconds at first, later whenever 5 % of the elapsed time has passed.

    Args:
        worker: its number, if there are several.
    """

    def __init__(self, worker: int | None) -> None:
        from convwave.cli.console import stderr

        self.console, self.started = stderr(), time.perf_counter()
        self.name = "" if worker is None else f"worker {worker}: "
        self.single = worker is None and self.console.is_terminal
        self.shown, self.first, self.widest = 0.0, -1, 0

    def trial(self, rows: Sequence[Row], plan: Plan) -> None:
        now = time.perf_counter() - self.started
        self.first = len(rows) if self.first < 0 else self.first
        last = len(rows) == plan.number
        if not last and now - self.shown < (0.1 if self.single else max(2.0, 0.05 * now)):
            return
        self.shown = now
        text = f"{self.name}{len(rows):,} of {plan.number:,} trials"
        if losses := [(row.loss, row) for row in rows if row.loss is not None]:
            loss, row = min(losses, key=lambda pair: pair[0])
            text += f"  best {loss:.4f} ({described(row.parameters)}, seed {row.seed})"
        if len(rows) > self.first and not last:
            text += f"  {now / (len(rows) - self.first) * (plan.number - len(rows)):.0f} s left"
        self.widest = max(self.widest, len(text))  # what is longer is overwritten too
        self.console.print(text.ljust(self.widest), end="\r" if self.single and not last else "\n")

    def message(self, text: str) -> None:
        self.console.print(text)


def _workers(args: argparse.Namespace) -> None:
    """Run the workers of ``--workers`` to their end; one that was killed is started again."""
    from convwave.cli.console import stderr
    from convwave.train.loop import interruptible

    command = [sys.executable, "-m", "convwave", "sweep", args.file, "--out", str(args.out)]
    for option in ("data", "storage"):
        if getattr(args, option) is not None:
            command += [f"--{option}", getattr(args, option)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.workers))}

    def begin(number: int) -> subprocess.Popen[bytes]:
        given = [*command, "--worker", str(number)]
        # of its own group: Ctrl-C comes here, and goes to each worker once
        return subprocess.Popen(given, env={**threads, **os.environ}, start_new_session=True)

    workers = {number: begin(number) for number in range(1, args.workers + 1)}
    statuses: dict[int, int] = {}
    killed, stopping = 0, False
    try:
        with interruptible() as interrupted:
            while workers:
                if interrupted() and not stopping:
                    stopping = True
                    for process in workers.values():
                        process.send_signal(signal.SIGINT)
                for number, process in list(workers.items()):
                    with suppress(subprocess.TimeoutExpired):
                        statuses[number] = process.wait(0.1)
                        del workers[number]
                        if statuses[number] < 0 and not stopping and killed < _KILLED:
                            killed += 1
                            stderr().print(f"worker {number} was killed and is started again")
                            workers[number] = begin(number)
    finally:
        for process in workers.values():
            process.kill()
    if stopping:
        raise Interrupted("stopped; the same command continues")
    if any(statuses.values()):
        raise UsageError(f"sweep: a worker ended with status {max(statuses.values(), key=abs)}; its reason is above")


def _first_of_many() -> bool:
    """Whether this is the process that prints, where torchrun, srun or mpirun began several."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def _table(plan: Plan, rows: Sequence[Row], most: int = 10) -> None:
    """The best configurations, briefly."""
    from convwave.cli.console import number, stderr, table

    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(described(row.parameters), []).append(row)
    means = {name: [row.loss for row in group if row.loss is not None] for name, group in by.items()}
    order = sorted(by, key=lambda name: sum(means[name]) / len(means[name]) if means[name] else float("inf"))
    shown = []
    for name in order[:most]:
        losses, group = means[name], by[name]
        other = ", ".join(
            f"{sum(r.state == s for r in group)} {s}"
            for s in ("pruned", "diverged")
            if any(r.state == s for r in group)
        )
        mean = sum(losses) / len(losses) if losses else None
        shown.append([name, number(mean), str(len(losses)), other or "-", number(min(r.seconds for r in group), 2)])
    title = f"{len(rows)} trials of {len(by)} configurations, the best {len(shown)} (held-out loss in nats)"
    stderr().print(table(title, ["", "mean loss", "seeds", "not complete", "seconds, least"], shown))


def _report(args: argparse.Namespace) -> None:
    """``convwave sweep report``."""
    if args.folder is None:
        raise UsageError("report: needs DIR, a sweep's folder or its .json")
    from convwave.cli.console import number, print_json, stderr, table
    from convwave.runs.plots import drawn
    from convwave.sweep import report as reports
    from convwave.sweep.statistics import LEVEL
    from convwave.sweep.study import JOURNAL, RESULTS, open_storage, open_study, rows_of

    path: Path = args.folder
    if path.is_file() or (args.storage is None and not (path / JOURNAL).exists()):
        plan, rows = reports.read_results(path if path.is_file() else path / RESULTS)
    else:
        study, plan = open_study(path, open_storage(path, args.storage))
        rows = rows_of(study)
    out: Path = args.out or (path.parent if path.is_file() else path)
    found = reports.make_report(plan, rows, _asked(args.baseline, plan))
    console, shown = stderr(), []
    for place, line in enumerate(found.lines[:_SHOWN]):
        difference = line.comparison and line.comparison.difference
        shown.append(
            [
                described(line.parameters),
                number(line.loss and line.loss.mean),
                number(line.loss and line.loss.deviation),
                str(len(line.losses)),
                f"{difference.mean:+.4f}" if difference else "-",
                f"{difference.low:+.4f} to {difference.high:+.4f}"
                if difference and difference.low is not None
                else "-",
                f"{line.comparison.p:.2g}" if line.comparison else "-",
                number(line.cpu_seconds, 2),
                "the baseline" if place == 0 else reports.sentence(line, found.comparisons),
            ]
        )
    columns = ["", "mean", "deviation", "n", "difference", "95 % interval", "p", "CPU s", ""]
    title = f"{plan.recipe.name}: held-out loss in nats, {len(rows)} trials of {len(found.lines)} configurations"
    console.print(table(title, columns, shown))
    if len(found.lines) > _SHOWN:
        console.print(f"{len(found.lines) - _SHOWN} more configurations: --json has all")
    console.print(
        f"Differences are by seed; p of a permutation test, corrected for {found.comparisons} comparisons (Holm)."
    )
    least = max((found.comparisons * 2 / 2 ** len(line.losses) for line in found.lines[1:]), default=0.0)
    if least > LEVEL:
        console.print(f"With so few seeds and {found.comparisons} comparisons p cannot fall below {min(least, 1):.2g}.")
    if found.importance:
        parts = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.importance.items())
        console.print(f"Importance (PED-ANOVA over all trials): {parts}")
    pictures = {"pareto": reports.pareto_plot, "differences": reports.differences_plot, "curves": reports.curves_plot}
    if plan.parameters:
        pictures["slices"] = reports.slices_plot
    files = {name: out / f"{name}.png" for name in pictures}
    for name, draw in pictures.items():
        console.print(drawn(files[name], partial(draw, found, files[name])) or str(files[name]))
    written = {name: str(file) for name, file in files.items()}
    print_json(args, {**reports.report_values(found), "pictures": written})


def _asked(texts: Sequence[str], plan: Plan) -> dict[str, Any] | None:
    """The values of ``--baseline``; None where none are given."""
    asked: dict[str, Any] = {}
    for text in texts:
        try:
            name, value = ("recipe", text[7:]) if text.startswith("recipe=") else parse_field(text)
        except ValueError as error:
            raise UsageError(f"--baseline: {error}") from None
        if name not in plan.parameters:
            raise UsageError(f"--baseline: expected one of {', '.join(plan.parameters)}, got {name}")
        asked[name] = value
    return asked or None
