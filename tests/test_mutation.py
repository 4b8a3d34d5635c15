"""Every planted fault must be caught; see mutation.py."""

from __future__ import annotations

import pytest

from tests.mutation import CONTROL, MUTANTS, ROOT, Outcome, run_all


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return run_all()


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_the_fault_is_caught(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].caught, outcomes[name].by


def test_without_a_fault_the_tests_pass(outcomes: dict[str, Outcome]) -> None:
    assert outcomes[CONTROL.name] == Outcome(False, "survived")


def test_the_published_list_is_this_list() -> None:
    assert len(MUTANTS) >= 25
    table = (ROOT / "tests/MUTANTS.md").read_text(encoding="utf-8")
    assert f"Caught by the tests: {len(MUTANTS)} of {len(MUTANTS)}" in table
    assert all(f"| {mutant.name} | {mutant.module} |" in table for mutant in MUTANTS)
