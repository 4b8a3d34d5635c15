"""Compiled kernels, executed without a GPU: what `make test` runs of `make ptx`, in processes of its own.

This process may run triton's own interpreter (conftest.py), so nothing is compiled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import convwave as cw
from convwave import cli
from convwave.cli import checkout

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/ptx.json"
KERNELS = {
    "conv_forward",
    "conv_backward",
    "conv_weight",
    "block_sums",
    "norm_activate_forward",
    "norm_activate_backward",
}
IN_CHILD = bool(os.environ.get("CONVWAVE_PTX"))

pytestmark = pytest.mark.skipif(IN_CHILD, reason="this is a process that such a test has started")


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_a_choice_of_the_kernels_tests_passes_as_compiled_for_sm_80_and_sm_90(tmp_path: Path) -> None:
    """Every kernel, in the precisions in use; a planted fault or a hazard that returns fails it too."""
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed here")
    out = tmp_path / "ptx.json"
    command = [sys.executable, "-m", "tests.ptx", "--choice", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    executed = json.loads(out.read_text())["executed"]
    for target in ("sm_80", "sm_90"):
        rows = [row for row in executed["rows"] if row["target"] == target]
        # of sm_90, conv_weight is for levels that are too wide for the fused kernel, or have other than two taps
        assert {row["kernel"] for row in rows} >= KERNELS | {"score_names"}
        assert {row["kernel"] for row in rows if row["by_warp"]} >= KERNELS
        assert {"ieee", "tf32x3", "bf16"} <= {row["precision"] for row in rows}
        assert sum(row["reads_across"] for row in rows) > 0
        assert executed["tests"][target]["passed"] > 10


def test_the_published_results_are_of_every_kernel_and_at_least_100_faults() -> None:
    results = json.loads(RESULTS.read_text())
    for target in ("sm_80", "sm_90"):
        assert {row["kernel"] for row in results["executed"]["rows"] if row["target"] == target} >= KERNELS
        assert "failed" not in results["executed"]["tests"][target]
    faults = results["faults"]
    assert faults["planted"] >= 100
    assert faults["planted"] == faults["noticed"] + len(faults["survivors"])
    assert all(survivor["judged"] for survivor in faults["survivors"])


def test_verify_compiled_adds_rows_to_the_certificate(
    words: cw.Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is not installed here")
    monkeypatch.setattr(checkout, "COMPILED_NAMES", 6)
    vocabulary = cw.Vocabulary.from_words(words.words)
    network = cw.ConvWave(len(vocabulary), 6, [12], factors=(2,), vocabulary=vocabulary)
    checks = checkout.compiled_checks(network, vocabulary, words.words[:100], "sm_90", 0)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    names = [check.name for check in checks]
    assert "logits, evaluation, dense, f32 kernels tf32x3, compiled sm_90" in names
    assert "gradients, training, distinct, random counts, f32 kernels ieee, compiled sm_90" in names
    assert names[-1] == "bounds, races and orders, compiled sm_90"
    assert "0 launches" not in checks[-1].compared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setattr(checkout, "find", lambda part: None), "needs a checkout of convwave"),
        (lambda patch: patch.setitem(sys.modules, "triton", None), "the package triton is not installed"),
    ],
)
def test_verify_compiled_says_what_it_lacks(
    change: Callable[[pytest.MonkeyPatch], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(monkeypatch)
    assert cli.main(["verify", "--compiled", "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()
