"""PTX text -> instructions. Only what Triton writes: one entry, no functions, no local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .scalars import PtxError


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers, "ld.global.v4.b32".
        operands: as written; a vector is one operand, "{%r1, %r2}".
        guard: the predicate register in front, or None; `negated` if it is "@!".
        line: of the PTX text, from 1.
        place: file and line of the Python source, line of the PTX text and opcode, for messages.
    """

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    place: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Program:
    """An entry function: parameters as (type, name), threads of a program, instructions, labels that branches name."""

    name: str
    target: str
    threads: int
    params: list[tuple[str, str]]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_COMMA = re.compile(r",(?![^{\[]*[}\]])")  # not inside braces or brackets
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_DIRECTIVES = re.compile(r"^(\.(?:reqntid|maxntid|minnctapersm)\s+\d+\s*)+")


def parse(ptx: str) -> Program:
    """Parse a module with one kernel.

    Raises:
        PtxError: no entry, or an entry without its number of threads.
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.S)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    target = re.search(r"\.target\s+(\w+)", ptx)
    if entry is None or threads is None or target is None:
        raise PtxError("expected a kernel with .entry, .reqntid and .target")
    params = re.findall(r"\.param\s+\.(\w+)\s+(?:\.ptr[^,]*?)?(\w+_param_\d+)", entry[2])
    program = Program(entry[1], target[1], int(threads[1]), params)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx))
    body = ptx[entry.end() :]
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+(\$\w+)", body))
    place, statement = "?", ""
    for number, raw in enumerate(body.split("\n"), ptx[: entry.end()].count("\n") + 1):
        text = raw.split("//")[0].strip()
        if text.startswith((".section", ".file")):  # debug information, after the code
            break
        if text.startswith(".loc"):
            file, line = text.split()[1:3]
            place = f"{files.get(file, file).rsplit('/', 1)[-1]}:{line}"
            continue
        label = re.fullmatch(r"(\$\w+):", text)
        if label is not None:
            if label[1] in targets:
                program.labels[label[1]] = len(program.instructions)
            continue
        statement = f"{statement} {text}".strip()
        while ";" in statement:
            one, _, statement = statement.partition(";")
            _add(program, one, number, place)
        statement = _DIRECTIVES.sub("", statement.strip()).lstrip("{} ") if "%" not in statement else statement
    return program


def _add(program: Program, text: str, line: int, place: str) -> None:
    """One statement: an instruction, unless it declares something."""
    text = text.strip()
    while text.startswith(("{", "}")) and not text.startswith("{%"):
        text = text[1:].strip()
    if not text or text.startswith("."):
        return
    found = _GUARD.match(text)
    guard, negated = (found[2], bool(found[1])) if found else (None, False)
    text = text[found.end() :] if found else text
    opcode, *rest = text.split(None, 1)
    operands = [operand.strip() for operand in _COMMA.split(rest[0].strip())] if rest and rest[0].strip() else []
    program.instructions.append(Instruction(opcode, operands, guard, negated, line, f"{place} (ptx {line}: {opcode})"))
