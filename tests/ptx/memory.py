"""Global memory: the tensors of a launch, and the instructions that read and write them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .lanes import Lanes
from .races import MANY, NOBODY, Known, Shadow
from .scalars import UNSIGNED, Array, i4, i8, u1, u4, u8


class Buffer:
    """A tensor in memory.

    Args:
        name: of the kernel's argument.
        base: its address.
        size: bytes from its first element to the end of its last.
        item: bytes of an element.
        writable: whether the kernel may write it.
        initialised: whether it holds something before the launch.
        member: (items,) bool, which of them belong to the tensor; None for all. A slice of a table leaves some out.
    """

    def __init__(
        self, name: str, base: int, size: int, item: int, writable: bool, initialised: bool, member: Array | None = None
    ) -> None:
        self.name, self.base, self.size, self.item = name, base, size, item
        self.writable, self.initialised, self.member = writable, initialised, member
        self.end = base + size
        memory = (ctypes.c_uint8 * size).from_address(base)
        flat = np.frombuffer(memoryview(memory), dtype=u1)
        self.views = {
            width: flat[: size // width * width].view(UNSIGNED[width]) for width in (1, 2, 4, 8) if base % width == 0
        }
        if writable:
            n = size // item
            self.shadow = Shadow(n)
            self.written_by = np.full(n, NOBODY, i4)  # program
            self.read_by = np.full(n, NOBODY, i4)  # program, or MANY
            self.writes = np.zeros(n, i4)

    def missing(self) -> int:
        """Elements that a launch had to write and did not."""
        never = self.writes == 0
        return int((never if self.member is None else never & self.member).sum())


class GlobalMemory(Lanes):
    """ "ld", "st" and "atom" on global memory."""

    def __init__(self, cta: Any, first: int, size: int) -> None:
        super().__init__(cta, first, size)
        self.acquired: list[tuple[int, Known]] = []  # by a thread, since the last barrier

    def load_global(
        self, address: Array, width: int, count: int, guard: Array | None, old: list[Array], place: str
    ) -> list[Array]:
        lanes = self.taking_part(guard)
        if lanes is None:
            values = self.read_global(address, width, count, self.threads, place)
            return [values[:, i] for i in range(count)]
        out = [old[i].copy() for i in range(count)]
        if lanes.size:
            values = self.read_global(address[lanes], width, count, self.threads[lanes], place)
            for i in range(count):
                out[i][lanes] = values[:, i]
        return out

    def read_global(self, where: Array, width: int, count: int, threads: Array, place: str) -> Array:
        """(lanes, count) values of `width` bytes at these addresses; outside the tensors, all ones."""
        size = width * count
        values = np.full((where.size, count), ~UNSIGNED[width](0))
        for buffer, chosen, offset in self._located(where, size, place, "read"):
            self.report.move(buffer.name, "read", self.cta.number, offset, size)
            values[chosen] = buffer.views[width][(offset // width)[:, None] + np.arange(count)]
            if buffer.writable and self.machine.checks:
                self._check_global_read(buffer, offset, size, threads[chosen], place)
        return values

    def store_global(self, address: Array, width: int, values: list[Any], guard: Array | None, place: str) -> None:
        lanes = self.taking_part(guard)
        lanes = np.arange(self.size) if lanes is None else lanes
        if lanes.size == 0:
            return
        size = width * len(values)
        data = np.stack([self.spread(value)[lanes] for value in values], 1)
        for buffer, chosen, offset in self._located(address[lanes], size, place, "write"):
            if not buffer.writable:
                self.report.problem(f"global write to {buffer.name}, which is read only", place, chosen.size)
                continue
            self.report.move(buffer.name, "write", self.cta.number, offset, size)
            index = (offset // width)[:, None] + np.arange(len(values))
            if self.machine.checks:
                self._check_global_write(
                    buffer, offset, size, width, index, data[chosen], self.threads[lanes[chosen]], place
                )
            buffer.views[width][index] = data[chosen]

    def atomic_add(
        self, address: Array, value: Any, guard: Array | None, old: Array, semantics: str, scope: str, place: str
    ) -> Array:
        """Additions one lane after another; what a release has seen, an acquire at the same address knows."""
        lanes = self.taking_part(guard)
        out = old.copy()
        given = self.spread(value)
        for lane in range(self.size) if lanes is None else lanes.tolist():
            where = int(address[lane])
            for buffer, _, offset in self._located(address[lane : lane + 1], 4, place, "atomic"):
                if not buffer.writable:
                    self.report.problem(f"atomic on {buffer.name}, which is read only", place)
                    continue
                index = int(offset[0]) // 4
                out[lane] = buffer.views[4][index]
                buffer.views[4][index] += u4(given[lane])
                self.report.atomics += 1
                if scope in ("gpu", "sys"):
                    self._synchronise(where, int(self.threads[lane]), semantics)
                else:
                    self.report.problem(f"atomic of scope {scope}, which orders nothing between programs", place)
        return out

    def _synchronise(self, where: int, thread: int, semantics: str) -> None:
        released = self.machine.released.get(where, Known.nothing(self.machine.programs))
        if semantics in ("acquire", "acq_rel"):
            self.acquired.append((thread, released))
        if semantics in ("release", "acq_rel"):
            seen = self.cta.known.plus(self.cta.number, self.now.epoch, thread)
            self.machine.released[where] = released | seen

    def _located(self, where: Array, size: int, place: str, what: str) -> list[tuple[Buffer, Array, Array]]:
        """Buffers that are accessed, by which lanes, at which byte offsets; lanes that miss are reported, left out."""
        if (where % u8(size)).any():
            self.report.problem(f"misaligned global {what} of {size} bytes", place)
        machine = self.machine
        which = np.searchsorted(machine.bases, where, side="right") - 1
        found = []
        for i in np.unique(which).tolist():
            chosen = np.nonzero(which == i)[0]
            buffer = machine.buffers[max(i, 0)]
            offset = where[chosen].astype(i8) - buffer.base
            inside = (offset >= 0) & (offset + size <= buffer.size)
            if buffer.member is not None and inside.any():
                items = (offset[inside] // buffer.item)[:, None] + np.arange(max(1, size // buffer.item))
                inside[inside] = buffer.member[items].all(1)
            if not inside.all():
                near = f"near {buffer.name} of {buffer.size} bytes"
                self.report.problem(f"global {what} out of bounds, {near}", place, int((~inside).sum()))
                chosen, offset = chosen[inside], offset[inside]
            if chosen.size:
                found.append((buffer, chosen, offset))
        return found

    def _items(self, buffer: Buffer, offset: Array, size: int) -> Array:
        return (offset // buffer.item)[:, None] + np.arange(max(1, size // buffer.item))

    def _check_global_read(self, buffer: Buffer, offset: Array, size: int, threads: Array, place: str) -> None:
        index, me, number = self._items(buffer, offset, size), threads[:, None], self.cta.number
        shadow, by = buffer.shadow, buffer.written_by[index]
        if not buffer.initialised and (by == NOBODY).any():
            self.report.problem(f"read of {buffer.name} that nobody has written", place, int((by == NOBODY).sum()))
        race = (by == number) & shadow.written_by_others(index, me, self.now)
        if race.any():
            self.report.problem(f"global race on {buffer.name}: read after write, no barrier", place, int(race.sum()))
        other = (by != NOBODY) & (by != number)
        if other.any():
            self.report.reads_across += int(other.sum())
            program = np.where(other, by, 0)
            written, writer = shadow.written[index], shadow.writer[index]
            ordered = self.cta.known.covers(program, written, writer)
            for thread, known in self.acquired:
                ordered |= known.covers(program, written, writer) & (me == thread)
            bad = other & ~ordered
            if bad.any():
                self.report.problem(f"read of {buffer.name}, another program's, unordered", place, int(bad.sum()))
        reader = buffer.read_by[index]
        buffer.read_by[index] = np.where((reader == NOBODY) | (reader == number), number, MANY)
        shadow.read(index, np.broadcast_to(me, index.shape), self.now)

    def _check_global_write(
        self,
        buffer: Buffer,
        offset: Array,
        size: int,
        width: int,
        index: Array,
        data: Array,
        threads: Array,
        place: str,
    ) -> None:
        items = self._items(buffer, offset, size)
        me, number, shadow, problem = threads[:, None], self.cta.number, buffer.shadow, self.report.problem
        by = buffer.written_by[items]
        foreign = (by != NOBODY) & (by != number)
        if foreign.any():
            problem(f"two programs write {buffer.name}", place, int(foreign.sum()))
        reader = buffer.read_by[items]
        read = (reader != NOBODY) & (reader != number)
        if read.any():
            problem(f"write of {buffer.name}, which another program has read", place, int(read.sum()))
        same = (buffer.views[width][index] == data).all(1)[:, None]
        again = (by == number) & shadow.written_by_others(items, me, self.now)
        if (again & ~same).any():
            problem(f"global race on {buffer.name}: two threads write differently", place, int((again & ~same).sum()))
        after = (reader == number) & shadow.read_by_others(items, me, self.now) & ~same
        if after.any():
            problem(f"global race on {buffer.name}: write after read, no barrier", place, int(after.sum()))
        flat, values = index.ravel(), data.ravel()
        buffer.writes[items] += 1
        if np.unique(flat).size < flat.size:  # lanes of one instruction at one address
            last = dict(zip(flat.tolist(), values.tolist(), strict=True))
            if any(last[at] != value for at, value in zip(flat.tolist(), values.tolist(), strict=True)):
                problem(f"lanes of one instruction write {buffer.name} differently", place)
        buffer.written_by[items] = number
        shadow.write(items, np.broadcast_to(me, items.shape), self.now)
