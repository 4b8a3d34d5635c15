"""Tests that need compiled kernels: run by `python -m tests.ptx`, in processes with CONVWAVE_PTX set.

Products of matrices against float64; the hazards of pipelined wgmma; planted faults.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
import triton
import triton.language as tl
from convwave.kernels import configs, stack

import convwave as cw

from .. import test_kernels
from . import plant
from .launch import Log, on_emulator
from .machine import How

TARGET = os.environ["CONVWAVE_PTX"]
on_sm_90 = pytest.mark.skipif(TARGET != "sm_90", reason="wgmma is of sm_90 only")


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    a_ptr,  # (M, K)
    b_ptr,  # (K, N), or (N, K) if TRANSPOSED
    c_ptr,  # (M, N)
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_c = tl.zeros([M, N], dtype=tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_a = tl.load(a_ptr + o_m[:, None] * K + o_k[None, :])
        if TRANSPOSED:
            b_b = tl.load(b_ptr + o_k[:, None] + o_n[None, :] * K)
        else:
            b_b = tl.load(b_ptr + o_k[:, None] * N + o_n[None, :])
        b_c = tl.dot(b_a, b_b, b_c, input_precision=PRECISION)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], b_c)


# of one product, relative to the largest: float32 sums of K = 128 terms at most; TF32 keeps 11 bits of each operand
FLOAT32 = 128**0.5 * 4 * 2.0**-24
PRODUCTS = [
    (torch.float32, "ieee", FLOAT32),
    (torch.float32, "tf32x3", FLOAT32 + 2.0**-21),
    (torch.float32, "tf32", 2 * 2.0**-10),
    (torch.bfloat16, "ieee", FLOAT32),
    (torch.float16, "ieee", FLOAT32),
]


@pytest.mark.parametrize(("M", "N", "K", "BK", "warps", "stages"), [(64, 64, 64, 32, 4, 2), (128, 128, 128, 64, 8, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "precision", "bound"), PRODUCTS, ids=lambda value: str(value))
def test_products(
    dtype: torch.dtype,
    precision: str,
    bound: float,
    transposed: bool,
    M: int,
    N: int,
    K: int,
    BK: int,
    warps: int,
    stages: int,
) -> None:
    """mma and wgmma, their fragments, swizzles and transposes, on random matrices."""
    if dtype == torch.float32 and precision == "ieee" and M > 64:
        pytest.skip("no matrix units, and half a minute")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(M, K, generator=generator).to(dtype)
    b = torch.randn((N, K) if transposed else (K, N), generator=generator).to(dtype)
    c = torch.empty(M, N)
    product_kernel[(1,)](a, b, c, M, N, K, BK, transposed, precision, num_warps=warps, num_stages=stages)
    truth = a.double() @ (b.double().T if transposed else b.double())
    assert float((c.double() - truth).norm() / truth.norm()) <= bound


def training(precision: str, width: int, make: object = cw.dense_graph) -> tuple[test_kernels.Problem, str]:
    """A training problem of two levels, and how it is multiplied."""
    names = test_kernels.words_of([3, 9, 0, 14])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    graph = make(names, 2, test_kernels.random_counts(names))  # type: ignore[operator]
    problem = test_kernels.of_graph(graph, [width, width, width], dtype=dtype)
    return problem, precision if dtype == torch.float32 else "ieee"


def hazards(log: Log) -> set[str]:
    """Kernels whose wgmma lack a proxy fence, or lose their registers."""
    words = ("fence.proxy.async", "a register of A is written", "an accumulator of a wgmma")
    return {name for name, kind, _ in log.problems() if any(word in kind for word in words)}


# Triton's pipelining of products whose left operand is computed in registers: from two stages on, 3.6.0 and 3.7.0 let
# wgmma read what cp.async wrote without a proxy fence, 3.7.1 overwrites A's registers under a wgmma in flight; 3.9.0
# does neither. `configs._stages` asks for one stage.
AFFECTED = (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9)


@on_sm_90
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_pipelined_wgmma_is_a_hazard_and_not_what_is_launched(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, multiplied = training(precision, 64)
    with on_emulator("sm_90") as shipped:
        test_kernels.with_kernels(problem, multiplied)
    assert not shipped.problems(), shipped.summary()
    assert "wgmma" in "".join(launch.compiled.kernel.ptx for launch in shipped.launches)
    monkeypatch.setattr(configs, "_stages", lambda *_: 2)
    with on_emulator("sm_90") as pipelined:
        stack.stack_forward(problem.x, problem.levels, problem.rows, multiplied)
    # TF32 operands are rounded before a product, and as compiled so far that has never had the hazard
    expected = {"conv_forward_kernel"} if AFFECTED and precision != "tf32" else set()
    assert hazards(pipelined) == expected, (triton.__version__, pipelined.summary())


KINDS = ("no barrier", "no wait of cp.async", "an atomic that only releases", "a store without its mask",
         "a store that is left out", "a load one further on", "no wait of wgmma", "a store one further on")  # fmt: skip


def test_planted_faults_are_noticed() -> None:
    """A few, in every kernel of one stack; all kinds in all kernels: `python -m tests.ptx.plant`."""
    make = cw.distinct_graph if TARGET == "sm_90" else cw.dense_graph
    rng = random.Random(0)
    came: dict[str, list[str]] = {kind: [] for kind in KINDS}
    precision = "bf16" if TARGET == "sm_90" else "tf32x3"  # of tf32x3, most waits for wgmma are doubled by others
    launches = plant.launches_of(TARGET, precision, make, modes=(True,))
    for launch, planted in zip(launches, plant.faults(launches, TARGET, precision, 3, rng, KINDS), strict=True):
        how = How(seed=1, most=5 * launch.report.instructions)
        _, truth = launch.again(launch.compiled, how)
        for fault in planted:
            came[fault.kind].append(plant.noticed(launch, fault, truth, how))
        launch.again(launch.compiled, how)
    for kind in KINDS:
        if came[kind]:  # single ones may change nothing: a barrier after a barrier, a mask that holds everywhere
            assert set(came[kind]) & {"problem", "value", "trap"}, (kind, came[kind])
    survived = sum(result in plant.SURVIVED for results in came.values() for result in results)
    assert survived <= sum(map(len, came.values())) // 4, came
