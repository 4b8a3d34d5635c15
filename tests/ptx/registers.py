"""Rules about the registers of wgmma, along every path through a kernel.

wgmma works while the threads go on. The ISA says of the registers that it uses ("wgmma.fence", "wgmma.wait_group"):

- after a register of an accumulator or of A is changed, or before its first use, a wgmma.fence comes before the wgmma
  that uses it; between wgmma's on one accumulator none is needed;
- an accumulator is not read or written, and a register of A not written, until a wgmma.wait_group covers the wgmma.

Executing the PTX cannot show a breach, because here a wgmma is done at once. So every state that a path can be in is
followed: which registers have changed since the last fence, which wgmma are in flight.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .parse import Instruction, Program
from .scalars import PtxError
from .translate import group

_REGISTER = re.compile(r"%[a-z]+\d+")
_NO_RESULT = ("st", "stmatrix", "bra", "ret", "exit", "bar", "barrier", "cp", "red", "fence", "membar", "wgmma")
_MOST_STATES = 100_000

Registers = frozenset[str]


class InFlight(NamedTuple):
    """Registers of wgmma that have been issued: accumulators, and those of A."""

    accumulators: Registers = frozenset()
    a: Registers = frozenset()

    def __or__(self, other: InFlight) -> InFlight:  # type: ignore[override]
        return InFlight(self.accumulators | other.accumulators, self.a | other.a)


class State(NamedTuple):
    """Between instructions: registers changed since the last fence, wgmma in committed groups, wgmma not committed."""

    changed: Registers
    groups: tuple[InFlight, ...]
    issued: InFlight

    def in_flight(self) -> InFlight:
        whole = self.issued
        for one in self.groups:
            whole |= one
        return whole


class Breach(NamedTuple):
    """A rule that a path breaks: line of the PTX text, place, what."""

    line: int
    place: str
    what: str


def breaches(program: Program) -> list[Breach]:
    """Every instruction that breaks a rule on some path, in order.

    Raises:
        PtxError: a kernel with too many states to follow.
    """
    if not any(ins.opcode.startswith("wgmma.mma") for ins in program.instructions):
        return []
    operands = _operands(program)
    found: set[Breach] = set()
    seen: set[tuple[int, State]] = set()
    waiting = [(0, State(operands, (), InFlight()))]  # nothing is fenced at first
    while waiting:
        at, state = waiting.pop()
        while at < len(program.instructions):
            ins = program.instructions[at]
            if ins.name == "bra":
                if (at, state) in seen:
                    break
                seen.add((at, state))
                if len(seen) > _MOST_STATES:
                    raise PtxError(f"{program.name}: more than {_MOST_STATES} states of wgmma's registers")
                waiting.append((program.labels[ins.operands[0]], state))
                if ins.guard is None:
                    break
            elif ins.name in ("ret", "exit") and ins.guard is None:
                break
            else:
                state = _after(ins, state, operands, found)
            at += 1
    return sorted(found)


def _operands(program: Program) -> Registers:
    """All registers that some wgmma uses."""
    names: set[str] = set()
    for ins in program.instructions:
        if ins.opcode.startswith("wgmma.mma"):
            names |= {*_named(ins.operands[0]), *_fragments_of_a(ins)}
    return frozenset(names)


def _named(text: str) -> Registers:
    return frozenset(_REGISTER.findall(text))


def _fragments_of_a(ins: Instruction) -> Registers:
    return _named(ins.operands[1]) if ins.operands[1].startswith("{") else frozenset()


def _after(ins: Instruction, state: State, operands: Registers, found: set[Breach]) -> State:
    """The state after an instruction; what it breaks is added to `found`."""

    def breach(what: str, registers: Registers) -> None:
        found.add(Breach(ins.line, ins.place, f"{what} ({', '.join(sorted(registers)[:2])})"))

    flying = state.in_flight()
    if ins.opcode.startswith("wgmma.mma"):
        accumulators, a = frozenset(group(ins.operands[0])), _fragments_of_a(ins)
        stale = (accumulators | a) & state.changed - flying.accumulators
        if stale:
            breach("wgmma uses registers that changed after the last wgmma.fence", stale)
        if a & flying.accumulators:
            breach("wgmma takes an accumulator in flight for A", a & flying.accumulators)
        return state._replace(issued=state.issued | InFlight(accumulators, a))
    if ins.opcode.startswith("wgmma.fence"):
        return state._replace(changed=frozenset())
    if ins.opcode.startswith("wgmma.commit"):
        return state._replace(groups=(*state.groups, state.issued), issued=InFlight())
    if ins.opcode.startswith("wgmma.wait"):
        leave = int(ins.operands[0], 0)
        return state._replace(groups=state.groups[len(state.groups) - leave :] if leave else ())
    touched = _named(" ".join(ins.operands)) | ({ins.guard} if ins.guard else set())
    results = frozenset() if ins.name in _NO_RESULT or not ins.operands else _named(ins.operands[0])
    if touched & flying.accumulators:
        breach("an accumulator of a wgmma in flight is read or written", touched & flying.accumulators)
    if results & flying.a:
        breach("a register of A is written while a wgmma in flight reads it", results & flying.a)
    return state._replace(changed=state.changed | (results & operands))
