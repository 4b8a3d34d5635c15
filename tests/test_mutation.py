"""Every planted fault must be caught; see mutation.py."""

from __future__ import annotations

import json

import pytest

from tests.conftest import PLANTED
from tests.generate_mutants import candidates
from tests.mutation import (
    CONTROL,
    GENERATED,
    IN_SUITE,
    MUTANTS,
    TABLE,
    UNJUDGED,
    Mutant,
    Outcome,
    generated,
    published,
    source_of,
)

ENTRIES = json.loads(GENERATED.read_text(encoding="utf-8"))
EVERYTHING = [*MUTANTS, *generated()]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Of `run_all`, which conftest.py has begun."""
    return request.config.stash[PLANTED].result()  # type: ignore[return-value]


@pytest.mark.parametrize("mutant", EVERYTHING, ids=lambda mutant: mutant.name)
def test_the_fault_is_where_the_list_says(mutant: Mutant) -> None:
    """Once, so that one place is changed; what stands there then is Python, and something else."""
    text = source_of(mutant.module).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    changed = text.replace(mutant.old, mutant.new)
    assert changed != text
    compile(changed, mutant.module, "exec")


@pytest.mark.parametrize("name", [mutant.name for mutant in IN_SUITE])
def test_the_fault_is_caught(name: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[name].caught, outcomes[name].by


def test_without_a_fault_the_tests_pass(outcomes: dict[str, Outcome]) -> None:
    """Those that MUTANTS.md names, the kernels' among them."""
    assert outcomes[CONTROL.name] == Outcome(False, "survived")


def test_the_published_list_is_this_list() -> None:
    assert len(MUTANTS) >= 150
    assert len({mutant.name for mutant in EVERYTHING}) == len(EVERYTHING)
    assert published().keys() == {mutant.name for mutant in EVERYTHING}
    table = TABLE.read_text(encoding="utf-8")
    assert f"Caught by the tests: {len(EVERYTHING)} of {len(EVERYTHING)}" in table
    assert all(f"| {mutant.name} | {mutant.module} |" in table for mutant in EVERYTHING)


def test_every_generated_fault_that_survives_is_judged() -> None:
    table = TABLE.read_text(encoding="utf-8")
    for entry in ENTRIES:
        if "survives" in entry:
            assert not entry["survives"].startswith(UNJUDGED), entry["name"]
            assert entry["survives"] in table


def test_changes_of_arithmetic_are_found() -> None:
    text = "def f(a, b):\n    if a < b:\n        return a[0] + 2 * b\n    raise ValueError(a - b)\n"
    lines = text.splitlines()
    found = {lines[n - 1][:begin] + new + lines[n - 1][end:] for n, begin, end, new in candidates(text)}
    assert {line.strip() for line in found} == {
        "if a <= b:",
        "return a[0] - 2 * b",
        "return a[0] + 2 / b",
        "return a[1] + 2 * b",
        "return a[0] + 3 * b",
    }
