"""Shared memory: ld and st, ldmatrix and stmatrix, cp.async; every byte with its last writer and its readers."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np

from .memory import GlobalMemory
from .races import NOBODY, Shadow
from .scalars import SHARED_BASE, UNSIGNED, Array, i4, i8, u1, u2, u4, u8


class SharedBytes(Shadow):
    """A program's shared memory: bytes, and for each of them what is known of it.

    Attributes:
        data: the bytes; junk at first.
        in_flight: whether a cp.async will write it.
        under_wgmma: how many wgmma in flight read it.
        unfenced: written by the generic proxy, and no fence.proxy.async since.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self.size = size
        self.data = np.frombuffer(random.Random(seed).randbytes(size), u1).copy()
        self.in_flight = np.zeros(size, np.bool_)
        self.under_wgmma = np.zeros(size, i4)
        self.unfenced = np.zeros(size, np.bool_)


class Copy(NamedTuple):
    """A cp.async: (lanes, bytes) where to and what, and the threads that issued it."""

    where: Array
    data: Array
    threads: Array


class SharedMemory(GlobalMemory):
    """ "ld", "st", "ldmatrix", "stmatrix" and "cp.async" on shared memory."""

    def __init__(self, cta: Any, first: int, size: int) -> None:
        super().__init__(cta, first, size)
        self.shared = cta.shared
        self.fenced_at = NOBODY  # epoch of the last fence.proxy.async
        self.copies: list[Copy] = []  # issued, not yet committed
        self.groups: list[list[Copy]] = []  # committed, not yet waited for

    def fence_proxy(self) -> None:
        """ "membar, fence": a writer's proxy fence covers its own stores; a reader's, those ordered before it."""
        mine = (self.shared.writer >= self.first) & (self.shared.writer < self.first + self.size)
        self.shared.unfenced[mine] = False
        self.fenced_at = self.now.epoch

    def span(self, where: Array, size: int, place: str, what: str) -> Array:
        """(lanes, size) indices into shared memory."""
        if (where % u4(size)).any():
            self.report.problem(f"misaligned shared {what} of {size} bytes", place)
        offset = where.astype(i8) - SHARED_BASE
        outside = (offset < 0) | (offset + size > self.shared.size)
        if outside.any():
            self.report.problem(f"shared {what} out of bounds", place, int(outside.sum()))
            offset = np.where(outside, 0, offset)
        return offset[:, None] + np.arange(size)

    def _bank(self, index: Array, threads: Array) -> None:
        if self.machine.counting:
            self.report.bank(index[:, 0], index.shape[1], threads)

    def _count_matrices(self, address: Array, count: int, place: str) -> None:
        """Rows of 16 bytes, eight lanes a matrix: values are left alone, since no address depends on them."""
        lanes = np.nonzero(np.arange(self.size) % 32 < 8 * count)[0]
        self._bank(self.span(address[lanes], 16, place, "matrix"), lanes)

    def load_shared(
        self, address: Any, width: int, count: int, guard: Array | None, old: list[Array], place: str
    ) -> list[Array]:
        lanes = self.taking_part(guard)
        where, threads = self.spread(address), self.threads
        if lanes is not None:
            where, threads = where[lanes], threads[lanes]
        if where.size == 0:
            return [value.copy() for value in old]
        index = self.span(where, width * count, place, "read")
        self._bank(index, threads)
        self._check_shared_read(index, threads, place) if self.machine.checks else None
        values = np.ascontiguousarray(self.shared.data[index]).view(UNSIGNED[width])
        if lanes is None:
            return [values[:, i].copy() for i in range(count)]
        out = [value.copy() for value in old]
        for i in range(count):
            out[i][lanes] = values[:, i]
        return out

    def store_shared(self, address: Any, width: int, values: list[Any], guard: Array | None, place: str) -> None:
        lanes = self.taking_part(guard)
        lanes = np.arange(self.size) if lanes is None else lanes
        if lanes.size == 0:
            return
        index = self.span(self.spread(address)[lanes], width * len(values), place, "write")
        self._bank(index, self.threads[lanes])
        data = np.stack([self.spread(value)[lanes] for value in values], 1)
        self._write_shared(index, np.ascontiguousarray(data).view(u1), self.threads[lanes], place)

    def ldmatrix(self, address: Array, count: int, transposed: bool, place: str) -> list[Array]:
        """ "ldmatrix": 8 x 8 halves, whose rows eight lanes name; thread l gets two neighbours of row l / 4."""
        out = [np.zeros(self.size, u4) for _ in range(count)]
        if self.machine.counting:
            self._count_matrices(address, count, place)
            return out
        for warp in range(0, self.size, 32):
            for m in range(count):
                index = self.span(address[warp + 8 * m : warp + 8 * m + 8], 16, place, "ldmatrix")
                if self.machine.checks:
                    self._check_shared_read(index.reshape(32, 4), self.threads[warp : warp + 32], place)
                halves = self.shared.data[index].view(u2)
                halves = np.ascontiguousarray(halves.T) if transposed else halves
                out[m][warp : warp + 32] = halves.view(u4).reshape(32)
        return out

    def stmatrix(self, address: Array, values: list[Array], count: int, transposed: bool, place: str) -> None:
        """ "stmatrix": the reverse of ldmatrix."""
        if self.machine.counting:
            self._count_matrices(address, count, place)
            return
        for warp in range(0, self.size, 32):
            for m in range(count):
                index = self.span(address[warp + 8 * m : warp + 8 * m + 8], 16, place, "stmatrix")
                halves = np.ascontiguousarray(values[m][warp : warp + 32]).view(u2).reshape(8, 8)
                data = np.ascontiguousarray(halves.T if transposed else halves).view(u1)
                self._write_shared(index.reshape(32, 4), data.reshape(32, 4), self.threads[warp : warp + 32], place)

    # "cp.async": what is written arrives when the thread waits for its group, and others see it after a barrier

    def cp_async(self, target: Any, source: Any, size: int, taken: Any, guard: Array | None, place: str) -> None:
        """Copy `size` bytes for each lane, of which the first `taken` are read and the rest are 0."""
        lanes = self.taking_part(guard)
        lanes = np.arange(self.size) if lanes is None else lanes
        if lanes.size == 0:
            return
        shared, threads = self.shared, self.threads[lanes]
        index = self.span(self.spread(target)[lanes], size, place, "cp.async")
        self._bank(index, threads)
        if self.machine.checks:
            self._check_shared_write(index, threads, None, place)
        lengths = np.full(lanes.size, size) if taken is None else self.spread(taken)[lanes].astype(i8)
        sources = self.spread(source)[lanes]
        data = np.zeros((lanes.size, size), u1)
        for length in np.unique(lengths[lengths > 0]).tolist():
            some = np.nonzero(lengths == length)[0]
            if (sources[some] % u8(size)).any():
                self.report.problem(f"misaligned cp.async of {size} bytes", place)
            words = self.read_global(sources[some], 4, length // 4, threads[some], place)
            data[some, :length] = np.ascontiguousarray(words).view(u1)
        shared.in_flight[index] = True
        if self.machine.rng.random() < 0.5:  # until the data are there, anything may be
            shared.data[index] = 0xFF
        self.copies.append(Copy(index, data, threads))

    def cp_commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def cp_wait(self, leave: int) -> None:
        while len(self.groups) > leave:
            for copy in self.groups.pop(0):
                self.shared.data[copy.where] = copy.data
                self.shared.in_flight[copy.where] = False
                self._written(copy.where, copy.threads)

    def _write_shared(self, index: Array, data: Array, threads: Array, place: str) -> None:
        if self.machine.checks:
            self._check_shared_write(index, threads, data, place)
        self.shared.data[index] = data
        if (self.shared.data[index] != data).any():
            self.report.problem("lanes of one instruction write shared memory differently", place)
        self._written(index, threads)

    def _written(self, index: Array, threads: Array) -> None:
        self.shared.write(index, threads[:, None], self.now)
        self.shared.unfenced[index] = True

    def _check_shared_read(self, index: Array, threads: Array, place: str) -> None:
        shared, me = self.shared, np.broadcast_to(threads[:, None], index.shape)
        writer = shared.writer[index]
        if (writer == NOBODY).any():
            self.report.problem("read of shared memory that nobody has written", place, int((writer == NOBODY).sum()))
        recent = shared.written_by_others(index, me, self.now)
        if recent.any():
            self.report.problem("shared race: read after write, no barrier", place, int(recent.sum()))
        if shared.in_flight[index].any():
            self.report.problem("shared race: read while cp.async writes", place)
        shared.read(index, me, self.now)

    def _check_shared_write(self, index: Array, threads: Array, data: Array | None, place: str) -> None:
        shared, me = self.shared, np.broadcast_to(threads[:, None], index.shape)
        changes = np.ones(index.shape, np.bool_) if data is None else shared.data[index] != data
        again = shared.written_by_others(index, me, self.now) & changes
        if again.any():
            self.report.problem("shared race: two threads write differently, no barrier", place, int(again.sum()))
        after = shared.read_by_others(index, me, self.now) & changes
        if after.any():
            self.report.problem("shared race: write after read, no barrier", place, int(after.sum()))
        if shared.in_flight[index].any():
            self.report.problem("shared race: write while cp.async writes", place)
        if shared.under_wgmma[index].any():
            self.report.problem("shared race: write while wgmma reads", place)
