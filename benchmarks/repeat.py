"""Whether the harness repeats: two runs of the same studies, median against median.

    convwave bench names width --out runs/a && convwave bench names width --out runs/b
    python -m benchmarks.repeat runs/a runs/b

A time that both runs called quiet must differ by at most 10 %; one that either called too noisy is counted, not judged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.documents import read_documents
from benchmarks.harness import TOO_NOISY


class Difference(NamedTuple):
    """How far two medians of one time are apart, relative to the smaller."""

    where: str
    relative: float
    noisy: bool


def differences(first: Path, second: Path) -> list[Difference]:
    """Of every time that both folders hold, the largest first."""
    before, after = _times(first), _times(second)
    found = []
    for where in before.keys() & after.keys():
        a, b = before[where], after[where]
        low, high = sorted((a["median"], b["median"]))
        noisy = max(a["noise"], b["noise"]) > TOO_NOISY
        found.append(Difference(", ".join(map(str, where)), high / low - 1, noisy))
    return sorted(found, key=lambda d: -d.relative)


def _times(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {
        tuple(part for part in (name, row["mode"], row["x"], row["provider"]) if part is not None): row
        for name, (_, document) in read_documents(folder).items()
        for row in document["rows"]
        if row["metric"] == "seconds" and row["median"] is not None and row["noise"] is not None
    }


def main(arguments: list[str] | None = None) -> int:
    """0 if all quiet times repeat, 1 if one does not, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description="Compare the medians of two runs of the same studies.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args(arguments)
    found = differences(args.first, args.second)
    if not found:
        print(f"repeat: expected two folders of the same studies, got {args.first} and {args.second}", file=sys.stderr)
        return 2
    quiet = [d for d in found if not d.noisy]
    apart = [d for d in quiet if d.relative > TOO_NOISY]
    for d in apart:
        print(f"{d.where}: {d.relative:.1%} apart")
    noisy = len(found) - len(quiet)
    print(f"{len(found)} times: {len(quiet) - len(apart)} repeat within {TOO_NOISY:.0%}, {len(apart)} do not, ", end="")
    print(f"{noisy} were called too noisy")
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main())
