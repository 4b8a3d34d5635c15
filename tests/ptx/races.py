"""Who wrote and read what, and whether anything orders two accesses ("Memory Consistency Model").

Time is counted in *epochs*: a barrier ends one for every agent that takes part. Two accesses of one program are ordered
if their epochs differ or one thread made both; accesses of two programs are ordered if the reader has acquired what
the writer released ("Release and Acquire Patterns", "Causality Order"): store, barrier, atomic with release | atomic
with acquire on the same address, barrier, load.
"""

from __future__ import annotations

import numpy as np

from .scalars import Array, i4

NOBODY = -1
MANY = -2  # several threads, or several programs


class Shadow:
    """The last writer and the readers of every place in a piece of memory, with their epochs."""

    def __init__(self, n: int) -> None:
        self.writer = np.full(n, NOBODY, i4)
        self.written = np.full(n, NOBODY, i4)  # the epoch
        self.reader = np.full(n, NOBODY, i4)
        self.read_at = np.full(n, NOBODY, i4)

    def written_by_others(self, index: Array, threads: Array, epoch: int) -> Array:
        """Where another thread wrote in this epoch."""
        return (self.written[index] == epoch) & (self.writer[index] != threads)

    def read_by_others(self, index: Array, threads: Array, epoch: int) -> Array:
        """Where another thread read in this epoch."""
        return (self.read_at[index] == epoch) & (self.reader[index] != threads)

    def read(self, index: Array, threads: Array, epoch: int) -> None:
        new = np.where(self.read_by_others(index, threads, epoch), MANY, threads)
        self.reader[index] = new
        for _ in range(2):  # lanes of one instruction that read the same place; MANY may have been overwritten
            collide = (self.reader[index] != new) | (self.reader[index] == MANY)
            if collide.any():
                self.reader[index[collide]] = MANY
        self.read_at[index] = epoch

    def write(self, index: Array, threads: Array, epoch: int) -> None:
        self.writer[index] = threads
        self.written[index] = epoch


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
