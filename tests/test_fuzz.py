"""A short form of `make fuzz`: damaged files and odd command lines are used or refused in one line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.fuzz import MOST, Fuzz


@pytest.fixture
def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    monkeypatch.chdir(tmp_path)
    return Fuzz(tmp_path)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize(("kind", "count"), [("checkpoints", 240), ("files", 120), ("commands", 60)])
def test_no_traceback_no_hang_and_no_gigabyte(kind: str, count: int, fuzz: Fuzz) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(fuzz, kind)(count)
    assert fuzz.failures == []
    assert sum(fuzz.seen.values()) >= count
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST
    outcomes = {key.partition(": ")[2] for key in fuzz.seen}
    assert outcomes == {"used", "refused"}, "both must happen, or the cases are too tame or too wild"


def test_the_fuzzer_sees_what_it_is_for(fuzz: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that reaches the user, a second line, a case that never ends, another status."""
    from tests import fuzz as module
    from tests.fuzz import Case

    def tracebacks() -> int:
        raise IndexError("out of range")

    def two_lines() -> int:
        import sys

        print("convwave: one\nconvwave: two", file=sys.stderr)
        return 2

    def never_ends() -> int:
        while True:
            pass

    monkeypatch.setattr(module, "SECONDS", 0.1)
    for run, text in [
        (tracebacks, "IndexError"),
        (two_lines, "2 lines"),
        (never_ends, "hangs"),
        (lambda: 3, "status 3"),
    ]:
        wrong = Case(run).check()
        assert wrong is not None
        assert text in wrong
    assert Case(lambda: 0).check() is None
