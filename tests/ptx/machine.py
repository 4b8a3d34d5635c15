"""A kernel and its launches: programs in random order, barriers, and the agents that execute their instructions.

kernel = Kernel(ptx, shared_bytes)
report = kernel.launch(grid, arguments, buffers, seed=0)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import Buffer
from .parse import parse
from .races import Known, Now
from .report import Report
from .scalars import UNSIGNED, Array, PtxError, f4, u4, u8
from .shared import SharedBytes
from .tensor_cores import TensorCores
from .translate import Translation, width_of

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class How:
    """How a launch is executed.

    Attributes:
        seed: of the order of programs and warps.
        by_warp: every warp by itself, in random order between barriers; else a whole program in lockstep.
        resident: programs at a time.
        truncate: tensor cores round their sums towards 0.
        checks: whether accesses are checked; values alone are faster.
        counting: only count: tensor cores do not multiply, which no address depends on, and bank conflicts are counted.
        most: instructions of all agents, after which a launch is given up as endless.
    """

    seed: int = 0
    by_warp: bool = False
    resident: int = 4
    truncate: bool = False
    checks: bool = True
    counting: bool = False
    most: int = 10**9


PLAIN = How()


class Kernel:
    """A kernel, parsed and translated.

    Args:
        ptx: the text of its module.
        shared: bytes of shared memory that a program has.
    """

    def __init__(self, ptx: str, shared: int) -> None:
        self.ptx, self.shared = ptx, shared
        self.program = parse(ptx)
        self.translation = Translation(self.program)

    def launch(self, grid: Grid, arguments: Sequence[Any], buffers: Sequence[Buffer], how: How = PLAIN) -> Report:
        """Run all programs of a grid.

        Args:
            grid: programs along x, y and z.
            arguments: one number for each parameter; a pointer is an address.
            buffers: all that the kernel may touch.
            how: order and checks.

        Raises:
            PtxError: what a GPU would trap on, an instruction that is not known, or too many instructions.
        """
        machine = Machine(self, grid, arguments, buffers, how)
        rng, live = machine.rng, list[Cta]()
        waiting = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        rng.shuffle(waiting)
        with np.errstate(all="ignore"):
            while waiting or live:
                while waiting and len(live) < how.resident:
                    live.append(Cta(machine, waiting.pop()))
                cta = rng.choice(live)
                if not cta.advance():
                    live.remove(cta)
        return machine.report


class Machine:
    """What all programs of a launch share."""

    def __init__(
        self, kernel: Kernel, grid: Grid, arguments: Sequence[Any], buffers: Sequence[Buffer], how: How
    ) -> None:
        self.kernel, self.grid = kernel, grid
        self.by_warp, self.truncate, self.most = how.by_warp, how.truncate, how.most
        self.checks, self.counting = how.checks and not how.counting, how.counting
        self.rng = random.Random(how.seed)
        self.report = Report()
        self.buffers = sorted(buffers, key=lambda buffer: buffer.base)
        self.bases = np.array([buffer.base for buffer in self.buffers], u8)
        self.programs = grid[0] * grid[1] * grid[2]
        self.released: dict[int, Known] = {}  # by the atomic's address
        self.params = {}
        for (kind, name), value in zip(kernel.program.params, arguments, strict=True):
            bits = int(f4(value).view(u4)) if kind == "f32" else int(value)
            width = int(kind[1:]) // 8
            self.params[name] = width, bits & ((1 << 8 * width) - 1)


class Cta:
    """A program ("cooperative thread array"): its shared memory, its agents, and what it knows of other programs."""

    def __init__(self, machine: Machine, index: Grid) -> None:
        self.machine, self.index = machine, index
        self.number = index[0] + machine.grid[0] * (index[1] + machine.grid[1] * index[2])
        self.shared = SharedBytes(machine.kernel.shared, self.number)
        self.known = Known.nothing(machine.programs)
        threads = machine.kernel.program.threads
        size = 32 if machine.by_warp else threads
        self.agents = [Agent(self, first, size) for first in range(0, threads, size)]

    def advance(self) -> bool:
        """Let one agent run for a while. False: there is none left."""
        ready = [agent for agent in self.agents if agent.waiting is None and not agent.finished]
        if ready:
            self.machine.rng.choice(ready).run()
            return True
        stuck = [agent for agent in self.agents if not agent.finished]
        if stuck:
            self.machine.report.problem("barrier that not all warps reach: deadlock", stuck[0].place)
        return False

    def arrive(self, agent: Agent, number: int, count: int) -> None:
        """ "bar, barrier": the last to arrive lets all go on, and what one has acquired, all know."""
        report, threads = self.machine.report, self.machine.kernel.program.threads
        if count not in (0, threads):
            raise PtxError(f"{agent.place}: barrier of {count} of {threads} threads: not known to the interpreter")
        agent.waiting = number
        there = [other for other in self.agents if other.waiting == number]
        if len(there) < len(self.agents):
            return
        if len({other.place for other in there}) > 1:
            report.problem("warps meet at different barrier instructions", agent.place)
        now = Now(agent.now.epoch + 1, 0)
        for other in there:
            other.waiting, other.now = None, now
            for _, known in other.acquired:
                self.known |= known
            other.acquired = []
        report.barriers += 1


class Agent(TensorCores):
    """Threads that run in lockstep. Their registers hold junk at first."""

    def __init__(self, cta: Cta, first: int, size: int) -> None:
        super().__init__(cta, first, size)
        junk = np.full(size, 0xDEADBEEFDEADBEEF, u8)
        self.registers: list[Array] = [
            np.zeros(size, np.bool_) if name.startswith("%p") else junk.astype(UNSIGNED[width_of(name)])
            for name in self.kernel.translation.registers
        ]
        self.at = 0  # the segment to run next
        self.waiting: int | None = None  # at this barrier
        self.finished = False
        self.place = "?"  # of the barrier

    def run(self) -> None:
        """Until a barrier or the end, or a random stop in between."""
        segments, sizes = self.kernel.translation.segments, self.kernel.translation.sizes
        while True:
            self.report.instructions += sizes[self.at]
            if self.report.instructions > self.machine.most:
                raise PtxError(
                    f"{self.kernel.program.name}: more than {self.machine.most} instructions: an endless loop"
                )
            self.at = segments[self.at](self, self.registers)
            if self.finished or self.waiting is not None or self.machine.rng.random() < 0.05:
                return

    def leave(self) -> int:
        self.finished = True
        if self.groups or self.copies:
            self.report.note("cp.async in flight at the end of a program", self.place)
        return 0

    def barrier(self, number: int, count: int, place: str) -> None:
        self.place = place
        self.cta.arrive(self, number, count)

    def warp_sync(self, place: str) -> None:
        """ "bar.warp.sync": a barrier for the threads of a warp, for all where a program has one warp."""
        if self.kernel.program.threads == 32:
            self.barrier(0, 0, place)
        else:
            self.now = self.now._replace(sync=self.now.sync + 1)

    def fence(self, opcode: str) -> None:
        self.report.note("fence, taken for nothing", opcode)
