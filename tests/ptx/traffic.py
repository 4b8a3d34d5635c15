"""Bytes that a launch moved, by tensor."""

from __future__ import annotations

from typing import NamedTuple

from .report import SECTOR, Report


class Traffic(NamedTuple):
    """Bytes.

    Attributes:
        requested: by all threads' instructions.
        a_program: 32-byte sectors, each once a program: what the L2 cache delivers at least.
        once: 32-byte sectors, each once in all: what memory moves at least.
    """

    requested: int
    a_program: int
    once: int

    def __add__(self, other: object) -> Traffic:
        assert isinstance(other, Traffic)
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


def traffic(report: Report) -> dict[tuple[str, str], Traffic]:
    """By tensor and "read" or "write"."""
    return {
        key: Traffic(report.requested[key], SECTOR * len(seen), SECTOR * len({sector for _, sector in seen}))
        for key, seen in report.sectors.items()
    }


def total(report: Report) -> Traffic:
    """Of all tensors."""
    return sum(traffic(report).values(), Traffic(0, 0, 0))
