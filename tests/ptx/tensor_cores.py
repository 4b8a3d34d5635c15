"""Tensor cores: mma on fragments in registers, wgmma on matrices in shared memory.

Products are exact in float64; the sum of one instruction and its accumulator is rounded to float32 once, to nearest, or
towards 0 where `Machine.truncate` is set, which is closer to what tensor cores do.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .races import MANY, NOBODY
from .scalars import SHARED_BASE, Array, PtxError, f2, f4, f8, from_bf16, truncated_tf32, u2, u4
from .shared import SharedMemory

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE >> 2, _LANE & 3  # "groupID" and "threadID_in_group" of the ISA


def widened(bits: Array, kind: str) -> Array:
    """Registers -> float64 elements along a last axis of 1 (tf32) or 2."""
    if kind == "tf32":
        return truncated_tf32(bits).view(f4).astype(f8)[..., None]
    halves = np.ascontiguousarray(bits)[..., None].view(u2)
    return (from_bf16(halves) if kind == "bf16" else halves.view(f2)).astype(f8)


def fragment_a(registers: list[Array], kind: str, warp: int) -> Array:
    """(16, K) float64 of one warp ("Matrix Fragments for mma.m16n8k16"; of wgmma the same, "Register Fragments")."""
    per = 1 if kind == "tf32" else 2
    out = np.zeros((16, 2 * per * len(registers)))
    for r, register in enumerate(registers):
        column = (_IN_GROUP * per + 4 * per * (r >> 1))[:, None] + np.arange(per)
        out[(_GROUP + 8 * (r & 1))[:, None], column] = widened(register[warp : warp + 32], kind)
    return out


def fragment_b(registers: list[Array], kind: str, warp: int) -> Array:
    """(K, 8) float64 of one warp."""
    per = 1 if kind == "tf32" else 2
    out = np.zeros((4 * per * len(registers), 8))
    for r, register in enumerate(registers):
        row = (_IN_GROUP * per + 4 * per * r)[:, None] + np.arange(per)
        out[row, _GROUP[:, None]] = widened(register[warp : warp + 32], kind)
    return out


def descriptor_addresses(bits: int, rows: int, K: int, width: int, transposed: bool) -> Array:
    """(rows, K) addresses in shared memory ("Matrix Descriptor", "Strides", "Swizzling Modes")."""
    start, leading, stride = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = bits >> 62 & 3
    if bits >> 49 & 7:
        raise PtxError("matrix descriptor with a base offset")
    row_bytes = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    r, k = np.arange(rows)[:, None], np.arange(K)[None, :]
    if transposed:  # rows lie side by side: a core is 8 k by row_bytes / width rows
        if mode == 0:
            raise PtxError("transposed matrix without swizzle")
        per = row_bytes // width
        address = start + r // per * leading + k // 8 * stride + k % 8 * row_bytes + r % per * width
    elif mode == 0:
        column = k * width
        address = start + r // 8 * stride + r % 8 * 16 + column // 16 * leading + column % 16
    else:
        if K * width > row_bytes:
            raise PtxError("matrix wider than a swizzled row")
        address = start + r // 8 * stride + r % 8 * row_bytes + k * width
    return address ^ ((address >> 7 & {0: 0, 1: 7, 2: 3, 3: 1}[mode]) << 4)


class TensorCores(SharedMemory):
    """ "mma", and "Asynchronous Warpgroup Level Matrix Instructions"."""

    def __init__(self, cta: Any, first: int, size: int) -> None:
        super().__init__(cta, first, size)
        self.reads: list[Array] = []  # bytes that wgmma reads, not yet committed
        self.read_groups: list[list[Array]] = []  # committed, not yet waited for

    def accumulated(self, c: Array, product: Array) -> Array:
        exact = c.astype(f8) + product
        out = exact.astype(f4)
        if self.machine.truncate:
            out = np.where(np.abs(out.astype(f8)) > np.abs(exact), np.nextafter(out, f4(0)), out)
        return out.view(u4)

    def mma(self, shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
        if not shape.startswith("m16n8"):
            raise PtxError(f"mma of shape {shape}")
        self.report.products += self.size // 32
        if self.machine.counting:
            return list(c)
        i = np.arange(4)[:, None]
        row, column = _GROUP + 8 * (i >> 1), 2 * _IN_GROUP + (i & 1)
        products = np.empty((4, self.size))
        for warp in range(0, self.size, 32):
            products[:, warp : warp + 32] = (fragment_a(a, kind, warp) @ fragment_b(b, kind, warp))[row, column]
        return list(self.accumulated(np.stack(c).view(f4), products))

    def wgmma(
        self,
        shape: str,
        kind: str,
        a: list[Array] | Array,
        b: Array,
        d: list[Array],
        scale: Array,
        transposed_a: int,
        transposed_b: int,
        place: str,
    ) -> list[Array]:
        """Four warps, 64 rows; A from registers or, by a descriptor, from shared memory, B always from there."""
        self.report.products += self.size // 128
        if self.machine.counting:
            return list(d)
        _, N, K = (int(n) for n in re.findall(r"\d+", shape))
        i = np.arange(len(d))[:, None]
        row, column = _GROUP + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * _IN_GROUP + (i & 1)
        right: dict[int, Array] = {}
        products = np.empty((len(d), self.size))
        for warp in range(0, self.size, 32):
            bits = int(b[warp])
            if bits not in right:
                right[bits] = self._matrix(bits, N, K, kind, bool(transposed_b), place).T
            if isinstance(a, list):
                left = fragment_a(a, kind, warp)
            else:
                quarter = (self.first + warp) // 32 % 4
                left = self._matrix(int(a[warp]), 64, K, kind, bool(transposed_a), place)[16 * quarter :][:16]
            products[:, warp : warp + 32] = (left @ right[bits])[row, column]
        old = np.stack(d).view(f4) if bool(scale[0]) else np.zeros(products.shape, f4)
        return list(self.accumulated(old, products))

    def wgmma_fence(self) -> None:
        """Orders registers and shared memory before a wgmma: registers.py holds its rules."""

    def wgmma_commit(self) -> None:
        self.read_groups.append(self.reads)
        self.reads = []

    def wgmma_wait(self, leave: int) -> None:
        while len(self.read_groups) > leave:
            for index in self.read_groups.pop(0):
                self.shared.under_wgmma[index] -= 1

    def _matrix(self, bits: int, rows: int, K: int, kind: str, transposed: bool, place: str) -> Array:
        """(rows, K) float64 that a descriptor names."""
        width = 4 if kind == "tf32" else 2
        address = descriptor_addresses(bits, rows, K, width, transposed)
        index = (address.reshape(-1)[:, None] - SHARED_BASE) + np.arange(width)
        if (index < 0).any() or (index >= self.shared.size).any():
            self.report.problem("wgmma out of bounds", place)
            index = np.clip(index, 0, self.shared.size - 1)
        if self.machine.checks:
            self._check_wgmma(index, place)
        values = self.shared.data[index].view(u4 if width == 4 else u2).reshape(rows, K)
        return widened(values, kind)[..., 0] if width == 4 else self._halves(values, kind)

    @staticmethod
    def _halves(values: Array, kind: str) -> Array:
        return (from_bf16(values) if kind == "bf16" else values.view(f2)).astype(f8)

    def _check_wgmma(self, index: Array, place: str) -> None:
        """The async proxy reads what a proxy fence and a barrier put in front of it ("Async proxy")."""
        shared, problem = self.shared, self.report.problem
        writer, written = shared.writer[index], shared.written[index]
        if (writer == NOBODY).any():
            problem("wgmma reads shared memory that nobody has written", place, int((writer == NOBODY).sum()))
        recent = written == self.now.epoch
        if self.machine.by_warp:
            recent &= (writer >> 5) != (self.first >> 5)
        if recent.any():
            problem("shared race: wgmma reads what was written since the last barrier", place, int(recent.sum()))
        unfenced = shared.unfenced[index] & (written >= self.fenced_at)
        if unfenced.any():
            problem("wgmma reads what was written without fence.proxy.async", place, int(unfenced.sum()))
        if shared.in_flight[index].any():
            problem("shared race: wgmma reads while cp.async writes", place)
        flat = index.ravel()
        shared.reader[flat] = MANY
        shared.read_at[flat], shared.read_sync[flat] = self.now
        np.add.at(shared.under_wgmma, flat, 1)
        self.reads.append(flat)
