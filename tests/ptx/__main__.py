"""Compiled kernels, executed: tests/test_kernels.py for sm_80 and sm_90, then planted faults. Needs triton, no GPU.

    python -m tests.ptx                           all, into benchmarks/results/ptx.json: what `make ptx` runs
    python -m tests.ptx --choice                  what `make test` runs of it
    python -m tests.ptx --target sm_90 -k widths  some of it

Tests run in as many processes as there are cores; what was compiled once is kept in the folder .ptx_cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/ptx.json"
TARGETS = ("sm_80", "sm_90")
WHOLE = ("tests/test_kernels.py", "tests/test_score_names.py", "tests/ptx/cases.py", "tests/ptx/machine_code.py")
# of tests/test_kernels.py: every kernel and every way of using one, in the precisions that are in use most
CHOICE = (
    "tests/ptx/cases.py",
    "tests/ptx/machine_code.py::test_the_machine_code_has_the_hazard_only_where_it_is_pipelined",
    "tests/test_score_names.py::test_widths[widths3-tf32x3]",
    "tests/test_score_names.py::test_contexts_and_names_longer_than_a_tile[factors2-ieee]",
    "tests/test_score_names.py::test_half_precision_storage[dtype0]",
    "tests/test_score_names.py::test_a_race_in_the_scratch_memory_would_be_seen",
    *(
        f"tests/test_kernels.py::{test}"
        for test in (
            "test_a_stack_on_real_names[training0-unbiased0-dense_graph-tf32x3]",
            "test_a_stack_on_real_names[training1-unbiased1-distinct_graph-ieee]",
            "test_a_stack_on_real_names[training3-unbiased3-distinct_graph-tf32x3]",
            "test_half_precision_storage[dtype0]",
            "test_one_row",
            "test_other_numbers_of_taps[3]",
            "test_rows_of_zeros_stand_before_a_sequence",
            "test_a_row_that_very_many_rows_read[nothing]",
            "test_a_row_that_counts_0_times_does_not_matter_whatever_it_holds[nan]",
            "test_more_programs_than_are_merged_at_once",
        )
    ),
)
PIECES = 4  # for each process, so that none waits long for the others
_SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|error)")


class Outcome(NamedTuple):
    """Of some tests: numbers by outcome, what pytest said if any failed, a row for each launch."""

    counts: Counter[str]
    output: str
    rows: list[dict[str, Any]]


def child(target: str, *arguments: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
    """pytest in a process whose kernels are compiled for a target."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CONVWAVE_PTX": target, "OMP_NUM_THREADS": "1"} | ({"CONVWAVE_PTX_OUT": str(out)} if out else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--benchmark-skip"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def collect(target: str, tests: Sequence[str], expression: str = "") -> list[str]:
    """The tests' full names."""
    done = child(target, "--collect-only", *tests, *(["-k", expression] if expression else []))
    names = [line for line in done.stdout.split("\n") if "::" in line]
    if done.returncode not in (0, 5):
        sys.exit(f"ptx: tests could not be collected:\n{done.stdout}{done.stderr}")
    return names


def run(target: str, names: Sequence[str]) -> Outcome:
    """Some tests in one process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        done = child(target, "--no-header", "-rfEs", *names, out=out)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    last = (done.stdout.strip().split("\n") or [""])[-1]
    counts = Counter({what: int(n) for n, what in _SUMMARY.findall(last)})
    if done.returncode and not counts["failed"]:
        counts["error"] += 1
    return Outcome(counts, done.stdout + done.stderr if done.returncode else "", rows)


def run_all(
    targets: Sequence[str], tests: Sequence[str], jobs: int, expression: str = "", progress: bool = False
) -> dict[str, list[Outcome]]:
    """All tests for all targets, in pieces that the processes take in turn; neighbours share compiled kernels."""
    pieces = []
    for target in targets:
        names = collect(target, tests, expression)
        size = max(1, -(-len(names) // (PIECES * jobs)))
        pieces += [(target, names[i : i + size]) for i in range(0, len(names), size)]
    outcomes: dict[str, list[Outcome]] = {target: [] for target in targets}
    with ThreadPoolExecutor(jobs) as pool:
        for (target, _), outcome in zip(pieces, pool.map(lambda piece: run(*piece), pieces), strict=True):
            outcomes[target].append(outcome)
            if progress:
                print(f"{target} {dict(outcome.counts)}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: both")
    parser.add_argument("--choice", action="store_true", help="what `make test` runs, without planted faults")
    parser.add_argument("--no-faults", action="store_true", help="tests only")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="some tests only, as pytest selects them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ptx.json, if all is run")
    args = parser.parse_args()
    given = [argument for argument in sys.argv[1:] if argument in ("--choice", *TARGETS, "--target")]
    partial = args.target or args.choice or args.k or args.no_faults
    out = args.out or (None if partial else RESULTS)
    started = time.perf_counter()
    tests = CHOICE if args.choice else WHOLE
    outcomes = run_all(args.target or TARGETS, tests, args.jobs, args.k, progress=True)
    failed = [outcome.output for pieces in outcomes.values() for outcome in pieces if outcome.output]
    print("\n".join(failed), end="")

    from .table import LINE, summed, write_section

    counts = {target: dict(sum((o.counts for o in pieces), Counter())) for target, pieces in outcomes.items()}
    rows = summed(row for pieces in outcomes.values() for outcome in pieces for row in outcome.rows)
    for row in rows:
        print(LINE.format(**row))
    total = {name: sum(row[name] for row in rows) for name in ("launches", "by_warp", "instructions", "reads_across")}
    print(f"{counts}: {total['launches']:,} launches, {total['by_warp']:,} of them warp by warp, "
          f"{total['instructions']:,} instructions, {total['reads_across']:,} words read across programs, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    if out is not None and not failed:
        write_section(
            out, "executed", " ".join(["python -m tests.ptx", *given]), {"tests": counts, "total": total, "rows": rows}
        )
    if not partial and not failed:
        return subprocess.run([sys.executable, "-m", "tests.ptx.plant", "--out", str(out)], cwd=ROOT).returncode
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
