"""What `convwave verify --compiled` runs in a checkout: a trained network's kernels, compiled and executed.

    python -m tests.ptx.certify MODEL NAMES sm_90 SEED OUT

Writes the checks of `convwave.verify` that the kernels take part in, on the names of a file, to OUT as JSON, with one
more: the accesses, races and orders of all launches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partialmethod
from pathlib import Path
from unittest import mock

import torch

import convwave as cw
from convwave.ops import library
from convwave.verify import certificate

from .launch import Log, on_emulator
from .machine import How

GRAPHS = {"dense": cw.dense_graph, "distinct": cw.distinct_graph}


def order(log: Log, target: str) -> certificate.Check:
    """No launch broke a rule."""
    problems = log.problems()
    number = sum(problems.values())
    instructions = sum(launch.report.instructions for launch in log.launches)
    across = sum(launch.report.reads_across for launch in log.launches)
    return certificate.Check(
        f"bounds, races and orders, compiled {target}",
        f"{len(log.launches):,} launches, {instructions:,} instructions, {across:,} words read across programs",
        float(number),
        float(number),
        0.0,
        "no rule of the PTX memory model is broken",
        "; ".join(f"{name}: {kind} at {place}" for name, kind, place in list(problems)[:3]),
    )


def checks(model: cw.ConvWave, names: list[str], target: str, seed: int = 0) -> list[certificate.Check]:
    """Evaluation, training and statistics of the kernels on a few names, as on a GPU of `target`; then `order`."""
    assert model.vocabulary is not None
    small = mock.patch.multiple(certificate, GRAPHS=GRAPHS, MOST_TOKENS=8 * model.context * len(names))
    statistics = certificate._Verifier._statistics
    short = mock.patch.object(certificate._Verifier, "_statistics", partialmethod(statistics, steps=2))
    interpreting = mock.patch.object(library, "_interpreting", return_value=True)  # the ops take CPU tensors
    found = []
    with small, short, interpreting, on_emulator(target, How(seed), first_by_warp=True) as log:
        library._why_not_triton.cache_clear()
        verifier = certificate._Verifier(
            model, cw.Splits(names, [], []), model.vocabulary, "", torch.device("cpu"), seed, certificate.KERNELS
        )
        for check in (*verifier.evaluation(), *verifier.training()):
            found.append(dataclasses.replace(check, name=f"{check.name}, compiled {target}"))
    return [*found, order(log, target)]


def main() -> None:
    model, names, target, seed, out = sys.argv[1:]
    words = Path(names).read_text(encoding="utf-8").split("\n")
    rows = [dataclasses.asdict(check) for check in checks(cw.load(model), words, target, int(seed))]
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
