"""Tile sizes by shape and precision.

Fixed tables instead of autotuning: the same shape always takes the same kernel, so results repeat from run to run, and
every entry is compiled ahead of time by tests/test_kernels_aot.py (registers, spills, shared memory:
benchmarks/results/kernel_resources.json). None of them has been timed on a GPU yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut.

    Attributes:
        rows: rows of a tile.
        depth: channels multiplied at a time.
        columns: output channels of a tile.
        warps, stages: triton's num_warps and num_stages.
        per_sm: programs for each multiprocessor; a program works through tiles until none is left.
        fused: of `conv_backward`: the matrices' gradients in the same kernel.
    """

    rows: int
    depth: int
    columns: int
    warps: int = 4
    stages: int = 2
    per_sm: int = 2
    fused: bool = False

    def programs(self, tiles: int, copies: int, device: torch.device) -> int:
        """Programs that share the tiles of rows, when each tile of columns has programs of its own."""
        return max(1, min(tiles, multiprocessors(device) * self.per_sm // copies))


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter, enough for programs to share work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def resolve_precision(precision: str, dtype: torch.dtype) -> str:
    """How float32 is multiplied: what "auto" means under torch.set_float32_matmul_precision.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in ("auto", "ieee", "tf32x3", "tf32"):
        raise ValueError(f"precision: expected 'auto', 'ieee', 'tf32x3' or 'tf32', got {precision!r}")
    if dtype != torch.float32:
        return "ieee"  # products of bfloat16 and float16 are exact in float32
    if precision != "auto":
        return precision
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


def by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(H, C, K) -> (K, H, C) contiguous, the layout that kernels read: neighbouring channels side by side."""
    return weight.detach().permute(2, 0, 1).to(dtype).contiguous()


def _pad(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


def forward_launch(C: int, H: int, dtype: torch.dtype, precision: str) -> Launch:
    """For `conv_forward`: columns up to 128, so that the rows below are read once for H <= 128."""
    columns = _pad(H, 16, 128)
    depth = _pad(C, 16, 32)
    if interpreting():  # few, large programs: each costs milliseconds
        return Launch(64, depth, columns)
    if dtype == torch.float32 and precision == "ieee":
        return Launch(64, min(depth, 16), columns, warps=8 if columns == 128 else 4)
    if C >= 512 and H >= 128 and precision != "tf32x3":
        return Launch(128, 64 if dtype != torch.float32 else 32, 128, warps=8, stages=3, per_sm=1)
    return Launch(128 if columns < 128 else 64, depth, columns, warps=8 if columns == 128 else 4)


def elementwise_launch(C: int) -> Launch:
    """For `norm_tanh_forward` and `norm_tanh_backward`: 4,096 numbers a tile."""
    columns = _pad(C, 16, 128)
    return Launch(64 if interpreting() else 4096 // columns, 0, columns, per_sm=4)


def backward_launch(C: int, H: int, K: int, dtype: torch.dtype, precision: str) -> Launch:
    """For `conv_backward`: ``depth`` channels H at a time, all of them where the matrices' gradients fit too."""
    columns, depth = _pad(C, 16, 128), _pad(H, 16, 32)
    fused = K == 2 and C <= 128 and H <= 128
    if fused:
        depth = _pad(H, 16, 128)
    if interpreting():
        return Launch(64, depth, columns, fused=fused)
    return Launch(32 if depth > 64 else 64, depth, columns, warps=8 if depth * columns > 64 * 64 else 4, fused=fused)


def weight_launch(C: int, H: int, dtype: torch.dtype, precision: str) -> Launch:
    """For `conv_weight_kernel`: tiles of ``depth`` channels H by ``columns`` channels C."""
    columns, depth = _pad(C, 16, 128), _pad(H, 16, 64)
    return Launch(64 if interpreting() else 32, depth, columns, warps=8 if depth * columns > 64 * 64 else 4)
