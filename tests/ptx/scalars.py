"""Scalar types of PTX as numpy has them, and conversions that numpy lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UNSIGNED: dict[int, Any] = {1: u1, 2: u2, 4: u4, 8: u8}  # by bytes
SIGNED: dict[int, Any] = {1: i1, 2: i2, 4: i4, 8: i8}
FLOAT: dict[int, Any] = {2: f2, 4: f4, 8: f8}

SHARED_BASE = 1024  # address at which shared memory begins: a multiple of what swizzles repeat after


class PtxError(Exception):
    """An instruction that the interpreter does not know, or something that a GPU would trap on."""


def rounded_bf16(x: Array) -> Array:
    """float32 -> bits of bfloat16, to nearest even ("cvt", .rn)."""
    bits = x.astype(f4).view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def from_bf16(bits: Array) -> Array:
    """Bits of bfloat16 -> float32."""
    return (bits.astype(u4) << u4(16)).view(f4)


def rounded_tf32(bits: Array) -> Array:
    """Bits of float32 -> those of TF32, to nearest, ties away from 0, NaN of any kind to one ("cvt.rna.tf32.f32")."""
    return np.where(np.isnan(bits.view(f4)), u4(0x7FFFFFFF), (bits + u4(0x1000)) & u4(0xFFFFE000))


def truncated_tf32(bits: Array) -> Array:
    """What tensor cores read of a float32: the 13 lowest bits are ignored ("Matrix Data-types", .tf32)."""
    return bits & u4(0xFFFFE000)
