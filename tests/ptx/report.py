"""What a launch met: problems, notes, counts, and the bytes that it moved."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .scalars import Array

SECTOR = 32  # bytes of what the L2 cache delivers at a time


@dataclass
class Report:
    """What a launch met.

    Attributes:
        problems: how often, by kind and place.
        notes: the same for what is worth knowing and not wrong.
        instructions: executed by an agent (a program, or a warp where warps run by themselves).
        barriers, atomics: executed.
        reads_across: words that one program read and another had written.
        requested: bytes asked for, by tensor and "read" or "write".
        sectors: (program, sector) that were touched, in the same way.
        products: instructions of tensor cores, by a warp (mma) or by four (wgmma).
        wavefronts: passes over shared memory's 32 banks, each of which gives one word a pass.
        conflicts: those of them beyond the fewest that such accesses can take.
    """

    problems: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: dict[tuple[str, str], int] = field(default_factory=dict)
    instructions: int = 0
    barriers: int = 0
    atomics: int = 0
    reads_across: int = 0
    requested: dict[tuple[str, str], int] = field(default_factory=dict)
    sectors: dict[tuple[str, str], set[tuple[int, int]]] = field(default_factory=dict)
    products: int = 0
    wavefronts: int = 0
    conflicts: int = 0

    def problem(self, kind: str, place: str, n: int = 1) -> None:
        self.problems[kind, place] = self.problems.get((kind, place), 0) + int(n)

    def note(self, kind: str, place: str, n: int = 1) -> None:
        self.notes[kind, place] = self.notes.get((kind, place), 0) + int(n)

    def move(self, tensor: str, way: str, program: int, offset: Array, size: int) -> None:
        """Count an access of `size` bytes at each of these byte offsets into a tensor."""
        key = tensor, way
        self.requested[key] = self.requested.get(key, 0) + offset.size * size
        sectors = np.unique(np.concatenate([offset // SECTOR, (offset + size - 1) // SECTOR]))
        self.sectors.setdefault(key, set()).update((program, int(sector)) for sector in sectors)

    def bank(self, offset: Array, size: int, threads: Array) -> None:
        """Count an access of `size` bytes at each of these byte offsets into shared memory.

        A warp goes over the banks once for every 128 bytes that it asks for, and again where words share a bank.
        """
        phase = threads // (128 // max(size, 4))
        word = (offset[:, None] + np.arange(0, max(size, 4), 4)) // 4
        different = np.unique((phase[:, None].astype(np.int64) << 32) | word)  # lanes at one word take it together
        bank, counts = np.unique(different >> 32 << 5 | different & 31, return_counts=True)
        phases, first = np.unique(bank >> 5, return_index=True)
        passes = int(np.maximum.reduceat(counts, first).sum())
        self.wavefronts += passes
        self.conflicts += passes - phases.size
