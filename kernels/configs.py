"""Tile sizes by shape and precision.

Fixed tables instead of autotuning: a shape always gets the same kernel, so results are reproducible, and
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
    """Tile sizes and launch parameters of a kernel.

    Attributes:
        rows: rows of a tile.
        depth: channels multiplied at a time.
        columns: output channels of a tile.
        warps, stages: triton's num_warps and num_stages.
        per_sm: programs per multiprocessor; each loops over tiles.
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
        """Number of programs that share the row tiles of one column tile."""
        return max(1, min(tiles, multiprocessors(device) * self.per_sm // copies))


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 in the interpreter, enough that programs share work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether matrix units read operands from shared memory, as on Hopper; elsewhere from registers."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def resolve_precision(precision: str, dtype: torch.dtype) -> str:
    """How float32 is multiplied: what "auto" means under torch's settings of TF32, the older ones and the newer.

    Raises:
        ValueError: an unknown name.
    """
    if precision not in ("auto", "ieee", "tf32x3", "tf32"):
        raise ValueError(f"precision: expected 'auto', 'ieee', 'tf32x3' or 'tf32', got {precision!r}")
    if dtype != torch.float32:
        return "ieee"  # products of bfloat16 and float16 are exact in float32
    if precision != "auto":
        return precision
    # the older settings write here too, while reading them raises where the newer ones were used
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if torch.version.hip else "tf32x3"


def by_tap(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(H, C, K) -> (K, H, C) contiguous, the layout that kernels read, with channels contiguous."""
    return weight.detach().permute(2, 0, 1).to(dtype).contiguous()


def _pad(n: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(n)))


def _vectorised(C: int, dtype: torch.dtype) -> bool:
    """Whether every row is 16-byte aligned; otherwise each number is loaded separately, from its own 64-bit address."""
    return C * dtype.itemsize % 16 == 0


def _stages(dtype: torch.dtype, precision: str, device: torch.device) -> int:
    """What a product with operands in registers may be pipelined to: 1 stage on Hopper, but for tf32x3 and ieee.

    Further stages let triton 3.6.0 and 3.7.0 read shared memory that cp.async filled without a proxy fence, and
    triton 3.7.1 overwrite the operands of a wgmma in flight. The code of triton 3.9.0 does neither.
    """
    one_product = dtype != torch.float32 or precision == "tf32"
    return 1 if has_wgmma(device) and one_product else 2


def forward_launch(C: int, H: int, dtype: torch.dtype, precision: str, device: torch.device) -> Launch:
    """For `conv_forward`: columns up to 128, so that the rows below are read once for H <= 128."""
    columns = _pad(H, 16, 128)
    depth = _pad(C, 16, 32)
    if interpreting():  # few, large programs: each costs milliseconds
        return Launch(64, depth, columns)
    if dtype == torch.float32 and precision == "ieee":
        return Launch(32, min(depth, 16), columns, warps=4)
    if has_wgmma(device) and C >= 512 and H >= 128 and precision != "tf32x3":
        half = dtype != torch.float32
        return Launch(128, 64 if half else 32, 128, warps=8, stages=1, per_sm=1)
    rows = 64 if _vectorised(C, dtype) or columns == 128 else 32
    stages = _stages(dtype, precision, device)
    return Launch(rows, depth, columns, warps=8 if columns == 128 else 4, stages=stages)


def score_launch(width: int, dtype: torch.dtype, precision: str, device: torch.device) -> Launch:
    """For `score_names`: columns beyond 64 in a second tile where that is less than 128 in one, or spills less."""
    ieee = dtype == torch.float32 and precision == "ieee"
    columns = 64 if 64 < width <= 96 or ieee else 128
    columns = min(columns, _pad(width, 16, 128))
    return Launch(128, 16, columns, warps=8, stages=_stages(dtype, precision, device), per_sm=1)


def elementwise_launch(C: int) -> Launch:
    """For `norm_activate_forward` and `norm_activate_backward`: 4,096 numbers a tile."""
    columns = _pad(C, 16, 128)
    return Launch(64 if interpreting() else 4096 // columns, 0, columns, per_sm=4)


# Rows of a `conv_backward` tile of 64 columns that holds the gradients of both matrices and spills nothing on sm_90, by
# precision ("half" is bfloat16 and float16) and by channels H, rounded up; what is not here spills. With three TF32
# products and 128 channels it is 72 to 88 bytes (16 rows), on sm_80 at least 128: benchmarks/LOG.md.
_FUSED_ROWS = {
    ("ieee", 64): 16,
    ("tf32x3", 64): 16,
    ("tf32", 64): 32,
    ("half", 64): 32,
    ("tf32", 128): 16,
    ("half", 128): 32,
}


def backward_launch(C: int, H: int, K: int, dtype: torch.dtype, precision: str, device: torch.device) -> Launch:
    """For `conv_backward`: ``depth`` channels H at a time, all of them if the matrices' gradients fit too."""
    if interpreting():
        fused = K == 2 and C <= 128 and H <= 128
        return Launch(64, _pad(H, 16, 128 if fused else 32), _pad(C, 16, 128), fused=fused)
    multiplied = precision if dtype == torch.float32 else "half"
    depth = _pad(H, 64, 256)
    if has_wgmma(device) and K == 2 and C <= 128 and (multiplied, depth) in _FUSED_ROWS:
        return Launch(_FUSED_ROWS[multiplied, depth], depth, 64, warps=8, stages=1, fused=True)
    columns = _pad(C, 32, 128)
    rows, depth = (16, 16) if multiplied == "ieee" else (64 if _vectorised(H, dtype) else 16, 32)
    return Launch(rows, depth, columns, warps=8 if columns == 128 and multiplied != "ieee" else 4)


def weight_launch(C: int, H: int, dtype: torch.dtype, precision: str, device: torch.device) -> Launch:
    """For `conv_weight_kernel`: tiles of ``depth`` channels H by ``columns`` channels C."""
    if interpreting():
        return Launch(64, _pad(H, 16, 64), _pad(C, 16, 128))
    if dtype == torch.float32 and precision == "ieee":
        return Launch(16, _pad(H, 16, 64), _pad(C, 16, 64))
    single = dtype == torch.float32
    wide = has_wgmma(device) or (single and precision == "tf32")  # more spills: tf32x3 on sm_80, bfloat16 on gfx942
    columns, depth = _pad(C, 16, 128), _pad(H, 16, 128 if wide else 64)
    stages = _stages(dtype, precision, device)
    rows = 16 if single and depth == columns == 128 else 32
    return Launch(rows, depth, columns, warps=8 if depth * columns > 64 * 64 else 4, stages=stages)
