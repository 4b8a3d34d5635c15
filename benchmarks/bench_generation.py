"""Reading 1,024 sequences letter by letter: `make bench`."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Measure
from benchmarks.studies import Plan, generation


@pytest.mark.parametrize("place", [0, 1, 2], ids=["windowed MLP", "dense, no cache", "cached"])
def bench_generation(plan: Plan, measure: Measure, place: int) -> None:
    competitors, expected = generation(plan, 1024)
    measure(competitors[place], expected)
