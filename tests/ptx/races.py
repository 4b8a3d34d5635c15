"""Who wrote and read what, and whether anything orders two accesses ("Memory Consistency Model").

Time is counted in *epochs*: a barrier ends one for every agent that takes part. Two accesses of one program are ordered
if their epochs differ or one thread made both; accesses of two programs are ordered if the reader has acquired what
the writer released ("Release and Acquire Patterns", "Causality Order"): store, barrier, atomic with release | atomic
with acquire on the same address, barrier, load.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .scalars import Array, i4

NOBODY = -1
MANY = -2  # threads of several warps, or several programs; ``-3 - w``: several threads of warp w


class Now(NamedTuple):
    """When something happens: the epoch, and how often bar.warp.sync has ordered the warp within all epochs."""

    epoch: int
    sync: int


def warp_of(thread: Array) -> Array:
    """The warp of a thread, or of several threads of one warp; below 0 for nobody, or several warps."""
    return np.where(thread >= 0, thread >> 5, np.where(thread < MANY, MANY - 1 - thread, NOBODY))


class Shadow:
    """The last writer and the readers of every place in a piece of memory, and when that was."""

    def __init__(self, n: int) -> None:
        self.writer = np.full(n, NOBODY, i4)
        self.written = np.full(n, NOBODY, i4)  # the epoch
        self.written_sync = np.zeros(n, i4)
        self.reader = np.full(n, NOBODY, i4)
        self.read_at = np.full(n, NOBODY, i4)
        self.read_sync = np.zeros(n, i4)

    def written_by_others(self, index: Array, threads: Array, now: Now) -> Array:
        """Where another thread wrote, and nothing orders that before now."""
        writer = self.writer[index]
        found = (self.written[index] == now.epoch) & (writer != threads)
        if now.sync and found.any():
            found &= (self.written_sync[index] == now.sync) | (warp_of(writer) != threads >> 5)
        return found

    def read_by_others(self, index: Array, threads: Array, now: Now) -> Array:
        """Where another thread read, and nothing orders that before now."""
        reader = self.reader[index]
        found = (self.read_at[index] == now.epoch) & (reader != threads)
        if now.sync and found.any():
            found &= (self.read_sync[index] == now.sync) | (warp_of(reader) != threads >> 5)
        return found

    def read(self, index: Array, threads: Array, now: Now) -> None:
        """Note a read by these threads, one for each index."""
        before = self.read_by_others(index, threads, now)
        own = threads >> 5
        several = np.where(warp_of(self.reader[index]) == own, MANY - 1 - own, MANY)
        new = np.where(before, several, threads)
        self.reader[index] = new
        collide = self.reader[index] != new  # lanes of one instruction that read the same place: rarely of two warps
        if collide.any():
            last = self.reader[index]
            same = warp_of(last) == own
            self.reader[index[collide & same]] = (MANY - 1 - own)[collide & same]
            self.reader[index[collide & ~same]] = MANY
        self.read_at[index], self.read_sync[index] = now

    def write(self, index: Array, threads: Array, now: Now) -> None:
        self.writer[index] = threads
        self.written[index], self.written_sync[index] = now


class Known:
    """What is known of every program: all up to an epoch, and one thread's accesses of that epoch."""

    def __init__(self, epochs: Array, threads: Array) -> None:
        self.epochs, self.threads = epochs, threads

    @classmethod
    def nothing(cls, programs: int) -> Known:
        return cls(np.full(programs, NOBODY, i4), np.full(programs, NOBODY, i4))

    def __or__(self, other: Known) -> Known:
        newer = other.epochs > self.epochs
        return Known(np.where(newer, other.epochs, self.epochs), np.where(newer, other.threads, self.threads))

    def plus(self, program: int, epoch: int, thread: int) -> Known:
        """With all that a thread of a program has seen so far."""
        epochs, threads = self.epochs.copy(), self.threads.copy()
        epochs[program], threads[program] = epoch, thread
        return Known(epochs, threads)

    def covers(self, program: Array, epoch: Array, thread: Array) -> Array:
        known = self.epochs[program]
        return (epoch < known) | ((epoch == known) & (thread == self.threads[program]))
