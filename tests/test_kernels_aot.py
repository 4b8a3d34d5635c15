"""Ahead-of-time compilation: every kernel as it is shipped, for GPUs that are not here.

Compiled in child processes, because this one may run triton's interpreter (conftest.py). The whole table takes half an
hour: `python -m benchmarks.resources`; here a part of it is compiled, and the committed one is held to what the
library would launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks/results/kernel_resources.json"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that a program can have
PRODUCTS = ("conv_forward", "conv_backward", "conv_weight")


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
    options = ["--target", target, "--precision", precision, "--width", "68", "--out", str(out)]
    child("-m", "benchmarks.resources", *options)
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} >= {
        *PRODUCTS[:2],
        "norm_activate_forward",
        "norm_activate_backward",
        "block_sums",
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
    measured = {"registers", "spilled", "shared", "matrix"}
    assert [{k: v for k, v in row.items() if k not in measured} for row in committed] == json.loads(child("-c", code))


def test_the_interpreter_is_refused_in_clear_words() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.resources"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 is set" in done.stderr
