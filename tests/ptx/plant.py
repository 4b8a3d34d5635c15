"""Faults planted in compiled kernels, one at a time: does the interpreter notice?

    python -m tests.ptx.plant                                   all, into benchmarks/results/ptx.json (minutes)
    python -m tests.ptx.plant --target sm_90 --kind "no wait of cp.async" --verbose

A stack is run forward, in evaluation mode and backward, and each of its launches is repeated with a fault: a barrier,
wait, fence or commit left out or weakened, an atomic that orders less, a mask that lets one more lane through, an
address that is off by an element. It is noticed as

- a *problem*, if the interpreter names a broken rule, or a *trap*, if it cannot go on;
- a wrong *value*, if a result differs by more than `TOLERANCE` roundings;

else it survives. Survivors are faults that change nothing, or something that the interpreter does not model: each kind
of them is judged in `JUDGED`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("plant: TRITON_INTERPRET=1 is set: nothing is compiled, unset it")

import torch
from torch import Tensor

import convwave as cw

from .. import test_kernels
from .launch import Compiled, Launch, on_emulator
from .machine import How
from .scalars import PtxError
from .table import write_section

TOLERANCE = 64
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/ptx.json"
# target, precision, graph: every kernel, and every way of using it
STACKS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("sm_80", "tf32x3", cw.dense_graph),
    ("sm_80", "ieee", cw.distinct_graph),
    ("sm_80", "bf16", cw.distinct_graph),
    ("sm_90", "tf32x3", cw.distinct_graph),
    ("sm_90", "bf16", cw.dense_graph),
    ("sm_90", "ieee", cw.dense_graph),
)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: lines of PTX that it applies to, and what it makes of one."""

    name: str
    pattern: re.Pattern[str]
    change: Callable[[re.Match[str]], str]


def kind(name: str, pattern: str, change: str | Callable[[re.Match[str]], str]) -> Kind:
    """`change` replaces the match; groups as in re.sub."""
    replace = change if callable(change) else lambda found: found.expand(change)
    return Kind(name, re.compile(pattern), replace)


def weaker(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1};"


def item(found: re.Match[str]) -> str:
    """An address further on by what one lane reads or writes."""
    size = int(found["bits"]) // 8 * int(found["lanes"] or 1)
    return f"{found[1]}{int(found['offset']) + size}]"


def row(found: re.Match[str]) -> str:
    return f"{found[1]}+{int(found[2] or 0) + 16}]"


LOAD, STORE = r"ld\.global\.(?:c[ag]\.)?", r"st\.global\."
TYPE = r"(?:v(?P<lanes>\d)\.)?b(?P<bits>\d+)"
OFFSET = r"\[\s*%r?d?\d+\s*\+\s*)(?P<offset>\d+)\s*\]"
COMPARISON = r"setp\.[lg]t\.(s32|s64|u32)(\s+%p\d+, )(%\w+), "
KINDS = (  # setp.lt a, b becomes setp.le a, a
    kind("no barrier", r"^\s*bar\.sync\s+0;", ""),
    kind("no wait of cp.async", r"^\s*cp\.async\.wait_group\s+\d+;", ""),
    kind("a wait of cp.async that leaves one more", r"(cp\.async\.wait_group\s+)(\d+);", weaker),
    kind("no commit of cp.async", r"^\s*cp\.async\.commit_group;", ""),
    kind("no proxy fence", r"^\s*fence\.proxy\.async\S*;", ""),
    kind("no wgmma.fence", r"^\s*wgmma\.fence\.sync\.aligned;", ""),
    kind("no wait of wgmma", r"^\s*wgmma\.wait_group\.sync\.aligned \d+;", ""),
    kind("a wait of wgmma that leaves one more", r"(wgmma\.wait_group\.sync\.aligned )(\d+);", weaker),
    kind("no commit of wgmma", r"^\s*wgmma\.commit_group\.sync\.aligned;", ""),
    kind("an atomic that only acquires", r"acq_rel", "acquire"),
    kind("an atomic that only releases", r"acq_rel", "release"),
    kind("an atomic that orders nothing", r"acq_rel", "relaxed"),
    kind("an atomic for one program", r"atom\.global\.gpu", "atom.global.cta"),
    kind("an atomic that adds 2", r"(atom\.global\.gpu\.acq_rel\.add\.u32\s+%r\d+,\s+\[.*?\],\s+)1;", r"\g<1>2;"),
    kind("a load without its mask", rf"@%p\d+\s+({LOAD})", r"\1"),
    kind("a store without its mask", rf"@%p\d+\s+({STORE})", r"\1"),
    kind("a store with the opposite mask", rf"@(%p\d+)\s+({STORE})", r"@!\1 \2"),
    kind("a store that is left out", rf"^\s*(?:@%p\d+\s+)?{STORE}[^;]*;", ""),
    kind("a copy without its mask", r"(cp\.async\.c[ag]\.shared\.global [^;]*, )(0x\d+|\d+), %r\d+;", r"\1\2;"),
    kind("a comparison that always holds", COMPARISON, r"setp.le.\1\2\3, \3; //"),
    kind("a comparison that never holds", COMPARISON, r"setp.lt.\1\2\3, \3; //"),
    kind("a load one further on", rf"({LOAD}{TYPE}\s+\{{[^}}]*\}},\s*{OFFSET}", item),
    kind("a store one further on", rf"({STORE}{TYPE}\s+{OFFSET}", item),
    kind("a shared load one further on", rf"(ld\.shared\.{TYPE}\s+(?:%r\d+|\{{[^}}]*\}}),\s*{OFFSET}", item),
    kind("a shared store one further on", rf"(st\.shared\.{TYPE}\s+{OFFSET}", item),
    kind("an ldmatrix one row further on", r"(ldmatrix\.[^;]*\[%r\d+)(?:\+(\d+))?\]", row),
)  # fmt: skip


# Why a fault of this kind may change nothing. The interpreter follows every access and every path of wgmma's registers,
# so what it does not name in these launches is ordered, or covered, by something else.
_COVERED = "equivalent here: another {} orders the same accesses, each of which was checked"
JUDGED = {
    "no barrier": _COVERED.format("barrier"),
    "no wait of cp.async": _COVERED.format("wait"),
    "a wait of cp.async that leaves one more": _COVERED.format("wait"),
    "no commit of cp.async": "equivalent here: the copies join the next group, and are read after its wait",
    "no proxy fence": _COVERED.format("proxy fence"),
    "no wgmma.fence": "equivalent: on every path another wgmma.fence comes between a change and the use",
    "no wait of wgmma": "equivalent: on every path another wait comes before the registers are touched",
    "a wait of wgmma that leaves one more": "equivalent: on every path another wait comes before that",
    "no commit of wgmma": "equivalent: they join the next group, and every path waits for it first",
    **dict.fromkeys(
        ("a load without its mask", "a copy without its mask"),
        "equivalent here: the mask holds for all lanes, or what is read besides lies in the tensor and is masked later",
    ),
    **dict.fromkeys(
        ("a store without its mask", "a store with the opposite mask", "a store that is left out"),
        "equivalent here: the mask holds for all lanes or none, or other lanes hold the same values, "
        "or a later store, behind a barrier, puts the right ones over the wrong ones",
    ),
    **dict.fromkeys(
        ("a comparison that always holds", "a comparison that never holds"),
        "equivalent here: the comparison comes out so for all lanes, or its result is masked by another one",
    ),
    **dict.fromkeys(
        (
            "a load one further on",
            "a store one further on",
            "a shared load one further on",
            "a shared store one further on",
            "an ldmatrix one row further on",
        ),
        "equivalent here: no lane's mask holds, or the value is multiplied by the zeros of channels beyond the width",
    ),
}


@dataclass(frozen=True)
class Fault:
    """One fault: in which kernel, what, at which line of its PTX and of its source."""

    target: str
    precision: str
    kernel: str
    kind: str
    line: int
    place: str
    old: str
    new: str

    def planted(self, ptx: str) -> str:
        lines = ptx.split("\n")
        lines[self.line - 1] = self.new
        return "\n".join(lines)


def faults(
    launches: Sequence[Launch], target: str, precision: str, most: int, rng: random.Random, kinds: Sequence[str]
) -> list[list[Fault]]:
    """Faults for each launch: so many of every kind in all, at random places."""
    found: list[list[Fault]] = [[] for _ in launches]
    for one in (one for one in KINDS if one.name in kinds):
        sites: list[tuple[int, int, str, str]] = []
        for n, launch in enumerate(launches):
            lines = launch.compiled.kernel.ptx.split("\n")
            code = next(i for i, line in enumerate(lines) if ".entry" in line)
            places = _places(lines)
            sites += [
                (n, i, lines[i], places[i])
                for i in range(code, len(lines))
                if one.pattern.search(lines[i].split("//")[0])
            ]
        for n, i, line, place in rng.sample(sites, min(most, len(sites))):
            name = launches[n].name.removesuffix("_kernel")
            new = one.pattern.sub(one.change, line, count=1)
            found[n].append(Fault(target, precision, name, one.name, i + 1, place, line.strip(), new))
    return found


def _places(lines: list[str]) -> list[str]:
    """File and line of the source, for every line of PTX."""
    places, here = [], "?"
    for line in lines:
        found = re.search(r"\.loc\s+\d+\s+(\d+).*?//\s*(\S+?\.py)", line)
        if found:
            here = f"{Path(found[2]).name}:{found[1]}"
        places.append(here)
    return places


def noticed(launch: Launch, fault: Fault, truth: dict[str, Tensor], how: How) -> str:
    """ "problem", "trap" or "value"; else "same bits" or, as little as `TOLERANCE`, "rounding"."""
    compiled = launch.compiled
    try:
        broken = Compiled.of(fault.planted(compiled.kernel.ptx), compiled.kernel.shared, compiled.params)
        # what it writes is what it wrote: a store left out is an output not written
        report, got = launch.again(broken._replace(outputs=compiled.outputs), how)
    except PtxError:
        return "trap"
    if report.problems:
        return "problem"
    if any(_differ(got[name], truth[name]) for name in got):
        return "value"
    same = all(torch.equal(got[name].view(torch.uint8), truth[name].view(torch.uint8)) for name in got)
    return "same bits" if same else "rounding"


SURVIVED = ("same bits", "rounding")


def _differ(got: Tensor, truth: Tensor) -> bool:
    if not truth.is_floating_point():
        return not torch.equal(got, truth)
    if bool((got.isnan() != truth.isnan()).any()):
        return True
    error = (got.double() - truth.double()).abs().nan_to_num(nan=0.0).max()
    return float(error) > TOLERANCE * torch.finfo(truth.dtype).eps * float(truth.double().abs().nan_to_num().max())


def launches_of(
    target: str, precision: str, make: Callable[..., Any], modes: Sequence[bool] = (True, False)
) -> list[Launch]:
    """One launch of every kernel that a stack of two levels uses: several programs, tiles that end in the middle."""
    names = test_kernels.words_of([3, 7, 0, 12, 5, 9, 2, 11] * 3)
    dtype = {"bf16": torch.bfloat16}.get(precision, torch.float32)
    multiplied = precision if dtype == torch.float32 else "ieee"
    seen: set[int] = set()
    launches = []
    for training in modes:
        graph = make(names, 2, test_kernels.random_counts(names))
        stack = test_kernels.of_graph(graph, [20, 36, 52], dtype=dtype, training=(training, training))
        with on_emulator(target, multiprocessors=3) as log:
            test_kernels.with_kernels(stack, multiplied)
        assert not log.problems(), log.summary()
        for launch in log.launches:
            if id(launch.compiled) not in seen:
                seen.add(id(launch.compiled))
                launches.append(launch)
    return launches


def plant(
    targets: list[str], kinds: list[str], most: int, seed: int = 0, show: Callable[[Fault, str], None] | None = None
) -> list[tuple[Fault, str]]:
    """Plant so many faults of each kind in each stack; each with what came of it."""
    rng = random.Random(seed)
    results = []
    for target, precision, make in STACKS:
        if target not in targets:
            continue
        launches = launches_of(target, precision, make)
        for launch, planted in zip(launches, faults(launches, target, precision, most, rng, kinds), strict=True):
            how = How(seed=rng.randrange(2**31), most=5 * launch.report.instructions)
            _, truth = launch.again(launch.compiled, how)
            for fault in planted:
                results.append((fault, noticed(launch, fault, truth, how)))
                if show:
                    show(*results[-1])
            launch.again(launch.compiled, how)  # later launches read what it wrote
    return results


def _judged(fault: Fault, came: str) -> dict[str, Any]:
    described = asdict(fault)
    names = ("kind", "kernel", "target", "precision", "place", "line", "old")
    return {**{name: described[name] for name in names}, "outputs": came, "judged": JUDGED.get(fault.kind, "")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.plant", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=("sm_80", "sm_90"), help="default: both")
    parser.add_argument("--kind", action="append", choices=[one.name for one in KINDS], help="default: all")
    parser.add_argument("--most", type=int, default=3, help="faults of a kind in a stack (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show every fault")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ptx.json, if all are planted")
    args = parser.parse_args()
    names = [one.name for one in KINDS]

    def show(fault: Fault, came: str) -> None:
        if args.verbose or came in SURVIVED:
            print(f"{came:9} {fault.target} {fault.precision:7} {fault.kernel:22} {fault.kind}: {fault.place} "
                  f"(ptx {fault.line}: {fault.old[:70]})", flush=True)  # fmt: skip

    results = plant(args.target or ["sm_80", "sm_90"], args.kind or names, args.most, args.seed, show)
    tally = {name: Counter(came for fault, came in results if fault.kind == name) for name in names}
    for name, counts in tally.items():
        if counts:
            print(f"{name:42} {dict(counts)}")
    survived = [(fault, came) for fault, came in results if came in SURVIVED]
    print(f"{len(results) - len(survived)} of {len(results)} faults noticed")
    whole = not (args.target or args.kind)
    if args.out or whole:
        values = {
            "planted": len(results),
            "noticed": len(results) - len(survived),
            "kinds": {name: dict(counts) for name, counts in tally.items() if counts},
            "survivors": [_judged(fault, came) for fault, came in survived],
        }
        write_section(args.out or RESULTS, "faults", f"python -m tests.ptx.plant --most {args.most}", values)


if __name__ == "__main__":
    main()
