"""An agent's registers: arithmetic that numpy lacks, and exchanges between the lanes of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .races import Now
from .scalars import UNSIGNED, Array, PtxError, i4, i8, u4, u8

if TYPE_CHECKING:
    from .machine import Cta


class Lanes:
    """Threads `first` to ``first + size`` of a program, which run in lockstep; size is a multiple of 32."""

    def __init__(self, cta: Cta, first: int, size: int) -> None:
        self.cta, self.machine, self.first, self.size = cta, cta.machine, first, size
        self.kernel = self.machine.kernel
        self.report = self.machine.report
        self.threads = np.arange(first, first + size, dtype=i4)
        self.now = Now(0, 0)

    def taking_part(self, guard: Array | None) -> Array | None:
        """Indices of the lanes whose guard holds; None for all."""
        if guard is None or guard.all():
            return None
        return np.nonzero(guard)[0]

    def full(self, dtype: Any, value: Any) -> Array:
        return np.full(self.size, value, dtype)

    def spread(self, value: Any) -> Array:
        """One value for each lane."""
        return np.broadcast_to(value, self.size)

    def fit(self, value: Any, dtype: Any) -> Array:
        """As an array over the lanes, with the bits of `dtype`."""
        if not isinstance(value, np.ndarray) or value.ndim == 0:
            value = np.full(self.size, value)
        if value.dtype == dtype:
            return value
        if value.dtype.itemsize == np.dtype(dtype).itemsize:
            return value.view(dtype)
        if value.dtype.kind in "iu":
            return value.astype(dtype)
        raise PtxError(f"{value.dtype} into a register of {np.dtype(dtype).itemsize} bytes")

    def special(self, name: str) -> Array:
        """ "Special Registers"."""
        base, _, axis = name.partition(".")
        i = "xyz".index(axis) if axis else 0
        if base == "%tid":
            return self.threads.astype(u4) if i == 0 else self.full(u4, 0)
        if base == "%ctaid":
            return self.full(u4, self.cta.index[i])
        if base == "%nctaid":
            return self.full(u4, self.machine.grid[i])
        if base == "%ntid":
            return self.full(u4, self.kernel.program.threads if i == 0 else 1)
        if base == "%laneid":
            return (self.threads & 31).astype(u4)
        raise PtxError(f"special register {name}")

    def param(self, name: str, offset: int) -> Array:
        if offset:
            raise PtxError(f"a part of parameter {name}")
        width, value = self.machine.params[name]
        return np.full(self.size, value, UNSIGNED[width])

    def uniform(self, guard: Array, place: str) -> bool:
        """A branch's condition, which all threads of an agent have to share."""
        first = bool(guard[0])
        if (guard != first).any():
            many = f"{int(guard.sum())} of {self.size}"
            raise PtxError(f"{place}: branch that differs between the threads of an agent ({many})")
        return first

    # "Integer Arithmetic", "Logic and Shift"

    def shl(self, x: Any, amount: Any, width: int) -> Array:
        x, amount = self.spread(x), self.spread(amount)
        shifted = x << np.minimum(amount, width - 1).astype(x.dtype)
        return np.where(amount >= width, x.dtype.type(0), shifted)

    def shr(self, x: Any, amount: Any, width: int) -> Array:
        x, amount = self.spread(x), self.spread(amount)
        shifted = x >> np.minimum(amount, width - 1).astype(x.dtype)
        return shifted if x.dtype.kind == "i" else np.where(amount >= width, x.dtype.type(0), shifted)

    def div(self, x: Any, y: Any) -> Array:
        """Towards 0; by 0, the result is unspecified, here all ones."""
        x, y = self.spread(x), self.spread(y)
        zero = y == 0
        safe = np.where(zero, y.dtype.type(1), y)
        quotient = x // safe
        if x.dtype.kind == "i":
            quotient += ((x % safe != 0) & ((x < 0) != (safe < 0))).astype(x.dtype)
        return np.where(zero, ~x.dtype.type(0), quotient)

    def rem(self, x: Any, y: Any) -> Array:
        return self.spread(x) - self.div(x, y) * self.spread(y)

    def bfe(self, x: Any, position: int, length: int, signed: bool) -> Array:
        value = (self.spread(x) >> u4(position)) & u4((1 << length) - 1)
        top = u4(1 << (length - 1)) if signed else u4(0)
        return ((value ^ top) - top).astype(u4)

    def prmt(self, x: Any, y: Any, selector: int) -> Array:
        both = self.spread(x).astype(u8) | (self.spread(y).astype(u8) << u8(32))
        out = np.zeros(self.size, u4)
        for i in range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (both >> u8(8 * (nibble & 7))) & u8(255)
            if nibble & 8:  # its sign, eight times
                byte = np.where(byte & u8(128), u8(255), u8(0))
            out |= byte.astype(u4) << u4(8 * i)
        return out

    def lop3(self, x: Any, y: Any, z: Any, table: int) -> Array:
        out = np.zeros(self.size, u4)
        for i in range(8):
            if table >> i & 1:
                out |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return out

    # "shfl.sync", "redux.sync"

    def shuffle(self, mode: str, value: Array, b: Any, clamp: int) -> Array:
        other = self.spread(b).astype(i8)
        lane = (self.threads & 31).astype(i8)
        mask, limit = (clamp >> 8) & 31, clamp & 31
        last = (lane & mask) | limit
        if mode == "up":
            source = lane - other
            inside = source >= last
        else:
            source = {"bfly": lane ^ other, "down": lane + other, "idx": (lane & mask) | (other & ~mask & 31)}[mode]
            inside = source <= last
        source = np.where(inside, source, lane)
        return value[(np.arange(self.size) & ~31) + source]

    def redux(self, how: str, value: Array) -> Array:
        reduce = {"add": np.add, "max": np.maximum, "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or}[how]
        return np.repeat(reduce.reduce(value.reshape(-1, 32), axis=1, dtype=value.dtype), 32)
