"""Every kernel against its float64 twin: in triton's interpreter on a CPU, compiled where there is a CUDA device.

A tolerance is never chosen: a kernel may err, against float64, at most four times as much as PyTorch does in the same
precision on the same inputs, or four times what independent roundings of the longest sum's terms come to: u sqrt(n).
(PyTorch alone would not do: among a few numbers it is sometimes exact.) Inputs are slices out of NaN, memory that
kernels allocate is poisoned with NaN and fenced with canaries.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convwave as cw
from convwave.data.graph import Consumers, find_consumers
from convwave.ops import fold
from convwave.ops import stack as twin

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from convwave.kernels import activate, backward, forward, stack  # noqa: E402
from convwave.kernels.configs import Launch, interpreting  # noqa: E402
from convwave.kernels.primitives import tanh  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ["ieee"] if interpreting() else ["ieee", "tf32x3"]
LOOSE = [] if interpreting() else ["tf32"]
CANARY = 12345.0
FENCE = 64


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every float tensor that is allocated without a value is NaN inside and fenced with canaries."""
    fenced: list[Tensor] = []
    empty = torch.empty

    def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        whole = empty(size + 2 * FENCE, dtype=dtype, device=device).fill_(CANARY)
        fenced.append(whole)
        inside = whole[FENCE : FENCE + size]
        inside.fill_(float("nan") if dtype.is_floating_point else 123)
        return inside.view(shape)

    def flat(size: tuple[object, ...]) -> tuple[int, ...]:
        return tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list)) else size  # type: ignore[return-value, arg-type]

    def new_empty(self: Tensor, *size: object, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        return poisoned(flat(size), dtype or self.dtype, self.device)

    def empty_like(other: Tensor, **_: object) -> Tensor:
        return poisoned(other.shape, other.dtype, other.device)

    def plain(*size: object, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        return poisoned(flat(size), dtype, torch.device(device))

    for module in (forward, backward, activate):
        monkeypatch.setattr(module.torch, "empty", plain)
        monkeypatch.setattr(module.torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for whole in fenced:
        for fence in (whole[:FENCE], whole[-FENCE:]):
            assert (fence == torch.tensor(CANARY, dtype=whole.dtype)).all(), "a kernel wrote beside its output"


def in_nan(tensor: Tensor) -> Tensor:
    """The same values as a slice of a larger tensor that is NaN (or an impossible row number) everywhere else."""
    shape = [n + 3 for n in tensor.shape]
    filling = float("nan") if tensor.is_floating_point() else 2**40
    whole = torch.full(shape, filling, dtype=tensor.dtype, device=tensor.device)
    inside = whole[tuple(slice(1, 1 + n) for n in tensor.shape)]
    return inside.copy_(tensor)


@dataclass
class Problem:
    """A stack with inputs; `x`, `dh` and parameters in the storage precision."""

    x: Tensor
    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    taps: list[Tensor]
    counts: list[Tensor]
    dh: Tensor
    fixed: list[Tensor]
    consumers: Sequence[Consumers]
    unbiased: bool
    eps: list[float]

    def floats(self, dtype: torch.dtype) -> Problem:
        def cast(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(dtype) for t in tensors]

        return Problem(
            self.x.to(dtype), cast(self.weights), cast(self.gammas), cast(self.betas), self.taps, self.counts,
            self.dh.to(dtype), [f.double() if dtype == torch.float64 else f for f in self.fixed], (), self.unbiased,
            self.eps,
        )  # fmt: skip


def problem(
    taps: Sequence[Tensor],
    rows_below: int,
    widths: Sequence[int],
    *,
    counts: Sequence[Tensor] | None = None,
    training: bool = True,
    unbiased: bool = True,
    dtype: torch.dtype = torch.float32,
    consumers: Sequence[Consumers] = (),
    seed: int = 0,
    offset: float = 0.0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    pairs = list(itertools.pairwise(widths))
    weights = [in_nan(normal(h, c, tap.shape[0]) * c**-0.5) for tap, (c, h) in zip(taps, pairs, strict=True)]
    gammas = [in_nan(1 + 0.3 * normal(h)) for _, h in pairs]
    fixed = (
        []
        if training
        else [
            fold.fixed_stats(normal(h), 0.5 + normal(h) ** 2, g, 1e-5) for (_, h), g in zip(pairs, gammas, strict=True)
        ]
    )
    return Problem(
        in_nan(normal(rows_below, widths[0]) + offset),
        weights,
        gammas,
        [in_nan(normal(h)) for _, h in pairs],
        [in_nan(tap.to(DEVICE)) for tap in taps],
        [in_nan(c.to(DEVICE)) for c in counts] if counts is not None else [],
        in_nan(normal(taps[-1].shape[1], widths[-1])),
        fixed,
        consumers,
        unbiased,
        [1e-5] * len(pairs),
    )  # fmt: skip


def of_graph(graph: cw.Graph, widths: Sequence[int], **options: object) -> Problem:
    given = {"consumers": graph.to(DEVICE).consumers, "counts": graph.weights, **options}
    return problem(graph.taps, graph.tokens.numel(), widths, **given)  # type: ignore[arg-type]


def with_kernels(p: Problem, precision: str) -> list[Tensor]:
    h, zs, stats = stack.stack_forward(
        p.x, p.weights, p.gammas, p.betas, p.fixed, p.taps, p.counts, p.eps, p.unbiased, precision
    )
    dx, *gradients = stack.stack_backward(
        p.dh, p.x, p.weights, p.betas, zs, stats, p.taps, p.counts, not p.fixed, p.unbiased, precision, p.consumers
    )
    results = [h, *zs, *(s[:4] for s in stats), dx, *(t for tensors in gradients for t in tensors)]
    if p.fixed:
        results.append(stack.stack_inference(p.x, p.weights, p.gammas, p.betas, p.fixed, p.taps, p.eps, precision))
    return results


def with_twin(p: Problem) -> list[Tensor]:
    h, zs, stats = twin.stack_forward(p.x, p.weights, p.gammas, p.betas, p.fixed, p.taps, p.counts, p.eps, p.unbiased)
    dx, *gradients = twin.stack_backward(
        p.dh, p.x, p.weights, p.betas, zs, stats, p.taps, p.counts, not p.fixed, p.unbiased
    )
    results = [h, *zs, *(s[:4] for s in stats), dx, *(t for tensors in gradients for t in tensors)]
    return [*results, h] if p.fixed else results


UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(p: Problem, precision: str = "ieee", results: int | None = None) -> None:
    """Kernels err at most four times as much as the twin in the same precision does; both against float64."""
    truth, plain, got = with_twin(p.floats(torch.float64)), with_twin(p), with_kernels(p, precision)
    longest = max(p.x.shape[0], *(tap.shape[1] for tap in p.taps), *(w[0].numel() for w in p.weights))
    independent = UNIT[p.x.dtype] * longest**0.5
    for index, (ours, theirs, expected) in list(enumerate(zip(got, plain, truth, strict=True)))[:results]:
        assert ours.shape == expected.shape
        scale = float(expected.abs().max()) or 1.0
        error = float((ours.double() - expected).abs().max()) / scale
        bound = 4 * max(float((theirs.double() - expected).abs().max()) / scale, independent)
        assert error <= bound, f"result {index}: error {error:.2e}, at most {bound:.2e} expected"


def words_of(lengths: Sequence[int], seed: int = 0) -> cw.Packed:
    rng = random.Random(seed)
    return cw.pack_ids([[rng.randint(1, 26) for _ in range(n)] for n in lengths])


def random_counts(packed: cw.Packed, seed: int = 0) -> Tensor:
    counts = torch.randint(0, 4, (len(packed),), generator=torch.Generator().manual_seed(seed))
    counts[0] += 2  # a variance needs two
    return counts


def test_tanh_is_within_three_units_in_the_last_place() -> None:
    @triton.jit
    def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + o, tanh(tl.load(x_ptr + o)))

    magnitudes = torch.logspace(-30, 2, 2**15, dtype=torch.float64).float()
    near = torch.linspace(0.5, 0.6, 2**14)
    special = torch.tensor([0.0, float("inf"), 88.0, 1e30])
    x = torch.cat([magnitudes, near, special, torch.zeros(2**14 - len(special))])
    x = torch.cat([x, -x]).to(DEVICE)
    y = x.new_zeros(x.shape)
    kernel[(2,)](x, y, BLOCK=len(x) // 2)
    expected = x.double().tanh()
    unit = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(expected.abs().clamp(min=2.0**-126)))
    assert float(((y.double() - expected).abs() / unit).max()) <= (4 if DEVICE == "cuda" else 3)  # with ex2.approx
    nan = torch.full((64,), float("nan"), device=DEVICE)
    kernel[(1,)](nan, nan, BLOCK=64)
    assert nan.isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [cw.dense_graph, cw.distinct_graph, cw.windowed_graph])
@pytest.mark.parametrize(("training", "unbiased"), [(True, True), (True, False), (False, True)])
def test_a_stack_on_real_names(
    make: object, precision: str, training: bool, unbiased: bool, some_words: list[str], vocab: cw.Vocabulary
) -> None:
    packed = cw.pack([*some_words[:24], "a", ""], vocab)
    graph = make(packed, 3, random_counts(packed))  # type: ignore[operator]
    check(of_graph(graph, [10, 68, 27, 24], training=training, unbiased=unbiased), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("widths", [(1, 1), (10, 24), (24, 27), (27, 68), (68, 10), (130, 20), (20, 130), (100, 100)])
def test_widths(widths: tuple[int, int], precision: str) -> None:
    packed = words_of([3, 7, 1, 0, 12])
    check(of_graph(cw.dense_graph(packed, 1, random_counts(packed)), widths), precision)


@pytest.mark.parametrize("rows", [2, 3, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("counted", [True, False])
def test_numbers_of_rows(rows: int, counted: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    taps = torch.randint(0, 17, (2, rows), generator=generator)
    counts = [torch.randint(1, 5, (rows,), generator=generator)] if counted else None
    # two rows are equally far from their mean: their gradients cancel, and what is left is rounding
    check(problem([taps], 17, [11, 19], counts=counts, training=rows > 2))


def test_one_row() -> None:
    """One row has no unbiased variance: the biased one is 0, and in evaluation mode it does not matter."""
    taps = torch.tensor([[0], [1]])
    check(problem([taps], 2, [5, 7], unbiased=False))
    check(problem([taps], 2, [5, 7], training=False))


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_other_numbers_of_taps(taps: int) -> None:
    generator = torch.Generator().manual_seed(taps)
    check(problem([torch.randint(0, 30, (taps, 70), generator=generator)], 30, [12, 20]))


@pytest.mark.parametrize("length", range(0, 41, 4))
def test_sequences_of_every_length(length: int) -> None:
    packed = words_of([length, length + 1, length + 2, length + 3])
    check(of_graph(cw.dense_graph(packed, 2, random_counts(packed)), [6, 9, 7]))


@settings(max_examples=15)
@given(
    rows=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    taps=st.integers(1, 3),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_random_graphs(rows: list[int], taps: int, width: int, seed: int) -> None:
    """Rows that nobody reads, rows that all read, counts of 0."""
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randint(0, below, (taps, above), generator=generator) for below, above in itertools.pairwise(rows)]
    counts = [torch.randint(0, 3, (level.shape[1],), generator=generator) for level in levels]
    for c in counts:
        c[0] += 3
    widths = torch.randint(1, width + 1, (len(rows),), generator=generator).tolist()
    # few rows of few channels may all but agree, which amplifies rounding: evaluation mode has no such case
    check(problem(levels, rows[0], widths, counts=counts, training=False, seed=seed % 1000))


def test_rows_of_zeros_stand_before_a_sequence() -> None:
    taps = torch.tensor([[-1, -1, 0, 1, -1, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
    check(problem([taps], 7, [12, 20]))


@pytest.mark.parametrize("sorted_by", ["taps", "nothing"])
def test_a_row_that_very_many_rows_read(sorted_by: str) -> None:
    """Long sums are added up in blocks first, wherever in a block they begin and end."""
    sizes = torch.tensor([5, 1, 0, 700, 64, 63, 65, 128, 2, 0])
    taps = torch.arange(len(sizes)).repeat_interleave(sizes)[None]
    if sorted_by == "nothing":
        taps = taps[:, torch.randperm(taps.shape[1], generator=torch.Generator().manual_seed(0))]
    consumers = find_consumers(taps.to(DEVICE), len(sizes), sorted_by == "taps")
    check(problem([taps], len(sizes), [8, 10], consumers=[consumers]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (32, 16, 64), (128, 32, 32)])
def test_tiles_do_not_matter(rows: int, depth: int, columns: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_launch(*_: object) -> Launch:
        return Launch(rows, depth, columns)

    def backward_launch(*_: object) -> Launch:
        return Launch(rows, 64 if fused else depth, 64 if fused else columns, warps=8, fused=fused)

    monkeypatch.setattr(forward, "forward_launch", forward_launch)
    monkeypatch.setattr(backward, "backward_launch", backward_launch)
    monkeypatch.setattr(backward, "weight_launch", forward_launch)
    packed = words_of([3, 9, 0, 14, 22])
    check(of_graph(cw.dense_graph(packed, 2, random_counts(packed)), [20, 40, 50]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_storage(dtype: torch.dtype) -> None:
    packed = words_of([3, 9, 0, 14])
    check(of_graph(cw.dense_graph(packed, 2, random_counts(packed)), [20, 40, 30], dtype=dtype))


def test_statistics_of_numbers_far_from_zero() -> None:
    """Deviations, never the difference of two large squares."""
    generator = torch.Generator().manual_seed(0)
    check(problem([torch.randint(0, 80, (2, 200), generator=generator)], 80, [4, 20], offset=3000.0), results=3)


def test_results_repeat_to_the_last_bit() -> None:
    packed = words_of([3, 9, 0, 14, 30] * 3)
    p = of_graph(cw.dense_graph(packed, 2, random_counts(packed)), [20, 40, 30])
    for first, again in zip(with_kernels(p, "ieee"), with_kernels(p, "ieee"), strict=True):
        assert torch.equal(first, again)


def test_gradients_of_any_strides() -> None:
    packed = words_of([3, 9, 0, 14])
    p = of_graph(cw.dense_graph(packed, 1, random_counts(packed)), [20, 40])
    h, zs, stats = stack.stack_forward(p.x, p.weights, p.gammas, p.betas, [], p.taps, p.counts, p.eps, True, "ieee")
    for dh in (
        torch.ones((), device=DEVICE).expand(h.shape),  # what sum().backward() hands over
        torch.randn(1, h.shape[1], device=DEVICE).expand(h.shape),
        torch.randn(h.shape[::-1], device=DEVICE).T,
        torch.randn(h.shape[0], 2 * h.shape[1], device=DEVICE)[:, ::2],
    ):
        results = []
        for given_dh in (dh, dh.clone(memory_format=torch.contiguous_format)):
            dx, *gradients = stack.stack_backward(
                given_dh, p.x, p.weights, p.betas, zs, stats, p.taps, p.counts, True, True, "ieee", p.consumers
            )
            results.append([dx, *(t for tensors in gradients for t in tensors)])
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)


def test_no_gradient_of_x_where_nobody_asks() -> None:
    packed = words_of([3, 9])
    p = of_graph(cw.dense_graph(packed, 2), [20, 40, 30])
    _, zs, stats = stack.stack_forward(p.x, p.weights, p.gammas, p.betas, [], p.taps, p.counts, p.eps, True, "ieee")
    args = (p.dh, p.x, p.weights, p.betas, zs, stats, p.taps, p.counts, True, True, "ieee", p.consumers)
    dx, *with_dx = stack.stack_backward(*args)
    none, *without = stack.stack_backward(*args, needs_dx=False)
    assert none.numel() == 0
    assert dx.numel() > 0
    for ours, expected in zip(without, with_dx, strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", LOOSE)
def test_tf32(precision: str) -> None:
    """As PyTorch's own TF32."""
    packed = words_of([3, 9, 0, 14] * 20)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check(of_graph(cw.dense_graph(packed, 2, random_counts(packed)), [64, 128, 128]), precision)
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_names() -> None:
    with pytest.raises(ValueError, match="precision: expected 'auto'"):
        stack.resolve_precision("tf16", torch.float32)
    assert stack.resolve_precision("auto", torch.bfloat16) == "ieee"
    assert stack.resolve_precision("tf32", torch.float32) == "tf32"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "tf32x3"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert stack.resolve_precision("auto", torch.float32) == expected
    finally:
        torch.set_float32_matmul_precision(before)
