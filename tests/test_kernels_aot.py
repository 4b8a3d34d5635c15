"""Ahead-of-time compilation: every kernel as it is shipped, for GPUs that are not here.

Compiled in child processes, because this one may run triton's interpreter (conftest.py). The whole table takes half an
hour: `python -m benchmarks.resources`; here a part of it is compiled, and the committed one is held to what the
library would launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ptx.report import Report

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks/results/kernel_resources.json"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that a program can have
PRODUCTS = ("conv_forward", "conv_backward", "conv_weight", "score_names")
MEASURED = ("registers", "spilled", "shared", "matrix")
TRAFFIC = ("asked", "a_program", "once", "nodes", "conflicts", "products")


def child(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(row: dict[str, Any]) -> None:
    where = {name: row[name] for name in ("target", "kernel", "C", "H", "precision", "variant")}
    # ptxas may spill two to four numbers once, before a loop, to reach the next step of occupancy
    assert row["spilled"] <= 16, where
    assert row["shared"] <= SHARED[row["target"]], where
    assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255), where
    if row["kernel"] in PRODUCTS and (row["precision"] != "ieee" or row["target"] == "gfx942"):
        assert row["matrix"] > 0, where
    if row["kernel"] in PRODUCTS and row["precision"] == "ieee" and row["target"] != "gfx942":
        assert row["matrix"] == 0, where  # float32 itself, not TF32


@pytest.mark.parametrize(("target", "precision"), [("sm_80", "tf32"), ("sm_90", "tf32x3"), ("gfx942", "bf16")])
def test_kernels_compile_and_fit(target: str, precision: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--target", target, "--precision", precision, "--width", "68", "--out", str(out), "--compile-only"]
    child("-m", "benchmarks.resources", *options)
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {
        *PRODUCTS[:2],
        "norm_activate_forward",
        "norm_activate_backward",
        "block_sums",
        "score_names",
    }
    for row in rows:
        check(row)


def test_the_committed_table_is_of_the_shipped_kernels() -> None:
    """Nothing of it spills, and its tiles are those that the launchers choose today."""
    committed = json.loads(COMMITTED.read_text())["rows"]
    for row in committed:
        check(row)
    code = (
        "import json; from benchmarks.resources import *; "
        "print(json.dumps([row for row, _ in plan(list(TARGETS), WIDTHS)]))"
    )
    measured = {*MEASURED, *TRAFFIC}
    assert [{k: v for k, v in row.items() if k not in measured} for row in committed] == json.loads(child("-c", code))


def assert_counts(rows: list[dict[str, Any]]) -> None:
    """That levels of C to C channels on a dense graph move the C numbers a row that the README's table says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (a level \w+|the top|evaluation mode) \| ([^|]+) \|", readme, re.M))
    said = {name: [float(number) for number in re.findall(r"(\d) C", cell)] for name, cell in table.items()}
    separate: dict[tuple[str, str, int], float] = defaultdict(float)
    for row in rows:
        variant = row["variant"].split()
        if row["nodes"] is None or row["C"] != row["H"] or "order" in variant:
            continue
        expected = {
            "conv_forward": said["evaluation mode" if "activate" in variant else "a level forward"],
            "norm_activate_forward": said["the top"][:1],
            "norm_activate_backward": said["the top"][1:],
            "conv_backward": said["a level backward"][:1],
        }.get(row["kernel"])
        if row["kernel"] == "conv_weight" or (row["kernel"] == "conv_backward" and "fused" not in variant):
            if "prologue" in variant:
                separate[row["target"], row["precision"], row["C"]] += row["nodes"]
        elif "prologue" in variant or row["kernel"] != "conv_backward":
            assert expected is not None, row
            assert row["nodes"] == pytest.approx(expected[0], abs=0.02), row
    for where, moved in separate.items():
        assert moved == pytest.approx(said["a level backward"][1], abs=0.02), where


def test_the_readme_counts_as_the_committed_table_does() -> None:
    rows = json.loads(COMMITTED.read_text())["rows"]
    assert_counts(rows)
    said = r"float32 wider than (\d+) channels except with `tf32`, everything wider than (\d+), GPUs before Hopper"
    found = re.search(said, " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()))
    assert found is not None
    for row in rows:
        if row["kernel"] == "conv_backward":
            limit = int(found[1 if row["precision"] in ("ieee", "tf32x3") else 2])
            fits = row["target"] == "sm_90" and max(row["C"], row["H"]) <= limit
            assert ("fused" in row["variant"].split()) == fits, row


def test_what_the_default_moves_is_counted_again(tmp_path: Path) -> None:
    """At the post's width. Sectors once a program, which the L2 cache delivers, are not many more than once in all."""
    out = tmp_path / "rows.json"
    options = ["--target", "sm_90", "--precision", "tf32x3", "--width", "68", "--out", str(out)]
    child("-m", "benchmarks.resources", *options)
    rows = json.loads(out.read_text())["rows"]
    assert_counts(rows)
    committed = {row_key(row): row for row in json.loads(COMMITTED.read_text())["rows"]}
    for row in rows:
        if row["kernel"] in PRODUCTS:  # the others are the same in several precisions, and stand there once
            assert [row[name] for name in TRAFFIC] == [committed[row_key(row)][name] for name in TRAFFIC]
        if row["kernel"] not in ("conv_weight", "score_names") and "order" not in row["variant"]:
            assert row["a_program"] <= 1.5 * row["once"], row


def test_whole_names_move_and_execute_less_than_level_by_level() -> None:
    """As the README says of what was counted; the path by levels is without embedding, head and log_softmax."""
    table = json.loads((ROOT / "benchmarks/results/whole_names.json").read_text())["rows"]
    rows = {(row["target"], row["precision"], row["width"], row["path"]): row for row in table}
    for (*where, path), row in rows.items():
        if path == "one launch":
            by_level = rows[*where, "level by level"]
            assert row["memory"] < by_level["memory"] / 25
            assert row["a_program"] < by_level["a_program"] / 1.9
            assert row["asked"] < by_level["asked"] / 1.1
            assert row["instructions"] < 1.02 * by_level["instructions"]
    post = [rows["sm_90", "tf32x3", 68, path] for path in ("one launch", "level by level")]
    figures = [f"{row[name]:,.0f}" for name in ("memory", "a_program", "instructions") for row in post]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = (
        "moves {} bytes of memory a position instead of {}, {} of L2 instead of {}, and executes {} warp instructions"
    )
    assert f"{said} instead of {{}}".format(*figures) in readme


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(value for name, value in row.items() if name not in (*MEASURED, *TRAFFIC))


@pytest.mark.parametrize(
    ("size", "stride", "passes"),
    [(4, 4, 1), (4, 8, 2), (4, 128, 32), (4, 0, 1), (2, 2, 1), (8, 8, 2), (16, 16, 4), (16, 128, 32), (4, 132, 1)],
)
def test_bank_conflicts(size: int, stride: int, passes: int) -> None:
    """A warp's accesses, `stride` bytes apart: words of one bank wait for each other, and one word serves all."""
    report = Report()
    report.bank(np.arange(32) * stride, size, np.arange(32))
    fewest = max(1, size // 4)
    assert (report.wavefronts, report.conflicts) == (passes, passes - fewest)


def test_the_interpreter_is_refused_in_clear_words() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.resources"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 is set" in done.stderr
