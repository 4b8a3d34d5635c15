"""The same question of the machine code: is a register of A written while an HGMMA that reads it is in flight?

ptxas may move instructions, so what the PTX asks for is looked at again in what it made: ``nvdisasm``, which triton
brings, prints it. In each innermost loop with an HGMMA, and the round after it, every write to a register of A is held
against the WARPGROUP.DEPBAR that ends the wait for it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"BRA.*?\((\.L_x_\d+)\)")
_HGMMA = re.compile(r"HGMMA\.\S+ R(\d+), (?:R(\d+), )?gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)")
_RESULT = re.compile(r"(\S+) R(\d+)")
_NO_RESULT = ("ST", "BAR", "LDGSTS", "RED")
_A = 4  # registers of A that a thread holds for an HGMMA


class Overwrite(NamedTuple):
    """A write to a register of A in flight.

    Attributes:
        hgmma, write: addresses of the two instructions.
        distance: instructions between them.
        text: of the write.
    """

    hgmma: str
    write: str
    distance: int
    text: str


def tool() -> Path | None:
    """nvdisasm as triton ships it; None where it does not."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return path if path.is_file() else None


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin."""
    nvdisasm = tool()
    assert nvdisasm is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def overwrites(text: str) -> list[Overwrite]:
    """All of a kernel's SASS, nearest first."""
    instructions: list[tuple[str, str]] = []  # address, text
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[3]))
    hits: set[Overwrite] = set()
    for start, end in _loops(instructions, labels):
        hits |= _in_loop(instructions[start : end + 1] * 2)
    return sorted(hits, key=lambda hit: hit.distance)


def _loops(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of the innermost loops that hold an HGMMA."""
    loops = []
    for end, (_, text) in enumerate(instructions):
        branch = _BRANCH.search(text)
        start = labels.get(branch[1], end) if branch else end
        if start < end and any("HGMMA" in inner for _, inner in instructions[start:end]):
            loops.append((start, end))
    return [one for one in loops if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in loops)]


def _in_loop(body: list[tuple[str, str]]) -> set[Overwrite]:
    flying: list[tuple[int, str, frozenset[int], bool]] = []  # place, address, registers of A, whether it ends a group
    hits: set[Overwrite] = set()
    for n, (address, text) in enumerate(body):
        if hgmma := _HGMMA.match(text):
            first = int(hgmma[2]) if hgmma[2] else 0
            a = frozenset(range(first, first + _A)) if hgmma[2] else frozenset()
            flying.append((n, address, a, "gsb0" in text))
        elif wait := _WAIT.match(text):
            leave = int(wait[1], 16)
            ends = [i for i, (_, _, _, last) in enumerate(flying) if last]
            if leave == 0:
                flying = []
            elif len(ends) > leave:
                flying = flying[ends[len(ends) - leave - 1] + 1 :]
        elif (result := _RESULT.match(text)) and not result[1].startswith(_NO_RESULT):
            width = 4 if ".128" in result[1] else 2 if ".64" in result[1] or ".WIDE" in result[1] else 1
            written = frozenset(range(int(result[2]), int(result[2]) + width))
            hits |= {Overwrite(hg, address, n - k, text[:40]) for k, hg, a, _ in flying if written & a}
    return hits
