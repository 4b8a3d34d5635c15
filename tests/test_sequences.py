"""Sequences of one length on a CPU: the shifted views against the definition in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import convwave as cw
from convwave.ops import library, naive, sequences
from convwave.ops.level import Level
from convwave.ops.sequences import Shift

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sequences on a CUDA device take the kernels")
FLOAT64 = 1e-9  # two sums of at most 100 terms a level in another order, amplified by a few norms of well spread rows


@pytest.fixture(params=["oneDNN", "MKL", "small parts"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to multiply, for any amount of work; and parts of a few rows."""
    least = 1 << 60 if request.param == "MKL" else 0
    monkeypatch.setattr(sequences, "_LEAST_PRODUCT", least)
    monkeypatch.setattr(sequences, "_LEAST_TANH", least)
    if request.param == "small parts":
        monkeypatch.setattr(sequences, "_TILE", 20)
    return request.param


def levels_of(
    channels: list[int], kernels: list[int], dtype: torch.dtype, training: list[bool], unbiased: bool = True
) -> list[Level]:
    """Levels of which no two have an equal number."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Level(
            (normal(h, c, k) * (c * k) ** -0.5).requires_grad_(),
            (1 + 0.3 * normal(h)).requires_grad_(),
            normal(h).requires_grad_(),
            normal(h),
            0.5 + normal(h) ** 2,
            eps=1e-3 * 3**i,
            momentum=0.1 + 0.2 * i,
            training=mode,
            unbiased=unbiased,
        )
        for i, (c, h, k, mode) in enumerate(zip(channels, channels[1:], kernels, training, strict=False))
    ]


def exact(levels: list[Level], x: Tensor) -> tuple[list[Level], Tensor]:
    """The same in float64, with running statistics and gradients of their own."""
    found = [Level(*(t.detach().double().clone() for t in level[:5]), *level[5:]) for level in levels]
    for level in found:
        for parameter in level[:3]:
            parameter.requires_grad_()
    return found, x.detach().double().requires_grad_()


def parameters(levels: list[Level]) -> list[Tensor]:
    return [tensor for level in levels for tensor in level[:3]]


def reference(levels: list[Level], x: Tensor, shifts: list[Shift], dh: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(B, T, H) of the definition, and its gradients of x and the parameters."""
    h, taken = x.reshape(-1, x.shape[2]), []
    for level, shift in zip(levels, shifts, strict=True):  # one by one: zeros precede every level's rows
        h, stats = naive.stack(h, [level], [shift.rows(x.shape[:2], x.device)])
        taken += stats
    gradients = torch.autograd.grad(h, [x, *parameters(levels)], dh.reshape(h.shape).to(h.dtype))
    for level, stats in zip(levels, taken, strict=True):
        if level.training and stats is not None:
            total = stats.total.detach()
            var = stats.var.detach() * (1 if level.unbiased else total / (total - 1))
            level.running_mean.lerp_(stats.mean.detach(), level.momentum)
            level.running_var.lerp_(var, level.momentum)
    return h.view(*x.shape[:2], -1), list(gradients)


def distance(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number, with room for gradients that cancel to nothing."""
    ours, expected = ours.detach().double(), expected.detach()
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


def inputs(kind: str, B: int, T: int, C: int, dtype: torch.dtype) -> Tensor:
    """(B, T, C) in several kinds of memory."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "expanded":
        return x[:, :, :1].expand(B, T, C)
    if kind == "amid NaN":
        memory = torch.full((B + 2, T + 3, 2 * C + 1), torch.nan, dtype=dtype)
        memory[1:-1, 2:-1, 1::2] = x
        return memory[1:-1, 2:-1, 1::2]
    return x


SHAPES = [(3, 7), (1, 2), (2, 1), (1, 41), (5, 3)]
STACKS = [([5, 9, 4], [2, 2], [1, 2]), ([3, 1, 6, 2], [3, 1, 2], [2, 5, 9]), ([1, 33], [2], [50])]


@pytest.mark.parametrize("memory", ["contiguous", "transposed", "expanded", "amid NaN"])
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize(("training", "unbiased"), [("all", True), ("all", False), ("none", True), ("some", False)])
def test_it_is_the_definition(engine: str, memory: str, padding: str, training: str, unbiased: bool) -> None:
    """Outputs, gradients and running statistics; odd shapes, dilations longer than the sequences, counts."""
    cases = itertools.product(SHAPES, STACKS, (False, True), (torch.float64, torch.float32))
    for (B, T), (channels, kernels, dilations), counted, dtype in cases:
        if dtype == torch.float32 and B * T <= 3:
            continue  # two rows have one deviation, which the norm makes 1 whatever it was: rounding decides gradients
        modes = [training == "all" or (training == "some" and i % 2 == 0) for i in range(len(kernels))]
        levels = levels_of(channels, kernels, dtype, modes, unbiased)
        x = inputs(memory, B, T, channels[0], dtype)
        counts = torch.arange(B * T) % 3 + 1 if counted else None
        shifts = [Shift(k, d, padding, counts) for k, d in zip(kernels, dilations, strict=True)]  # type: ignore[arg-type]
        twins, x64 = exact(levels, x)
        dh = torch.randn(B, T, channels[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
        expected, gradients = reference(twins, x64, shifts, dh)
        x = x.detach().requires_grad_()
        h = library.conv_sequences(x, levels, shifts)
        ours = torch.autograd.grad(h, [x, *parameters(levels)], dh)
        # float32: 100 roundings of 2^-24, which norms amplify by at most 0.001^-0.5 = 32 where rows agree
        bound = FLOAT64 if dtype == torch.float64 else 100 * 2.0**-24 * 32
        for got, wanted in zip([h, *ours], [expected, *gradients], strict=True):
            assert got.dtype == dtype
            assert got.shape == wanted.shape
            assert distance(got, wanted) <= bound, (B, T, channels, counted, dtype)
        for level, twin in zip(levels, twins, strict=True):
            assert distance(level.running_mean, twin.running_mean) <= bound
            assert distance(level.running_var, twin.running_var) <= bound
        if not any(modes):
            with torch.no_grad():
                assert distance(library.conv_sequences(x, levels, shifts), expected) <= bound


@pytest.mark.parametrize("layout", ["BTC", "BCT"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives_by_finite_differences(engine: str, layout: str, training: bool) -> None:
    stack = cw.nn.ConvStack([2, 3, 2], 2, [1, 3], unbiased=False, layout=layout, eps=0.1, backend="eager").double()  # type: ignore[arg-type]
    names, values = zip(*stack.train(training).named_parameters(), strict=True)
    x = torch.randn(2, 4, 2, dtype=torch.float64)
    x = (x.transpose(1, 2) if layout == "BCT" else x).contiguous().requires_grad_()
    buffers = {name: buffer.clone() for name, buffer in stack.named_buffers()}

    def function(x: Tensor, *flat: Tensor) -> Tensor:
        state = {**dict(zip(names, flat, strict=True)), **{name: b.clone() for name, b in buffers.items()}}
        return torch.func.functional_call(stack, state, (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *values), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_any_subset_of_gradients(training: bool) -> None:
    """Whatever is not wanted is not there, and the rest does not change."""
    levels = levels_of([3, 5, 4], [2, 2], torch.float64, [training] * 2)
    shifts, x = [Shift(2, 1), Shift(2, 2)], torch.randn(2, 6, 3, dtype=torch.float64)
    dh = torch.randn(2, 6, 4, dtype=torch.float64)
    variables = [x, *parameters(levels)]
    for variable in variables:
        variable.requires_grad_()
    expected = torch.autograd.grad(library.conv_sequences(x, levels, shifts), variables, dh)
    for chosen in [[i] for i in range(7)] + [[0, 4], [1, 6], [3, 4], [2, 3, 5]]:
        for i, variable in enumerate(variables):
            variable.requires_grad_(i in chosen).grad = None
        library.conv_sequences(x, levels, shifts).backward(dh)
        for i, variable in enumerate(variables):
            assert (variable.grad is not None) == (i in chosen)
            if i in chosen:
                torch.testing.assert_close(variable.grad, expected[i], rtol=0, atol=0)


def test_backward_twice_and_through_an_expanded_gradient() -> None:
    """retain_graph keeps what the first pass used; a sum hands back a gradient of stride 0."""
    levels, shifts = levels_of([3, 5], [2], torch.float32, [True]), [Shift(2, 1)]
    x = torch.randn(2, 6, 3, requires_grad=True)
    h = library.conv_sequences(x, levels, shifts)
    first = torch.autograd.grad(h.sum(), [x, *parameters(levels)], retain_graph=True)
    second = torch.autograd.grad(h.sum(), [x, *parameters(levels)], retain_graph=True)
    third = torch.autograd.grad(h, [x, *parameters(levels)], torch.ones_like(h))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        h.sum().backward()


def test_what_a_level_keeps_is_guarded_against_changes_in_place() -> None:
    levels = levels_of([3, 5], [2], torch.float32, [True])
    h = library.conv_sequences(torch.randn(2, 6, 3), levels, [Shift(2, 1)])
    with torch.no_grad():
        levels[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_statistics_may_move_between_forward_and_backward() -> None:
    """Of a frozen level: gradients, second ones too, are those of the statistics that normalised."""
    levels, shifts = levels_of([3, 5], [2], torch.float64, [False]), [Shift(2, 1)]
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(library.conv_sequences(x, levels, shifts).square().sum(), x)[0]
    for second in (False, True):
        h = library.conv_sequences(x, levels, shifts)
        levels[0].running_var.mul_(1.0)
        before = levels[0].running_mean.clone()
        levels[0].running_mean.add_(1)
        (found,) = torch.autograd.grad(h.square().sum(), x, create_graph=second)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        levels[0].running_mean.copy_(before)


def test_sequences_of_equal_length_end_to_end_are_one_batch() -> None:
    """`cu_seqlens` of equal lengths, of different lengths, and (B, T, C): one function; empty input too."""
    layer = cw.nn.ConvBatchNormTanh(3, 4, 3, 2, backend="eager").double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    expected = copy.deepcopy(layer)(x)
    even = copy.deepcopy(layer)(x.view(20, 3), cu_seqlens=torch.arange(5) * 5)
    torch.testing.assert_close(even.view(4, 5, 4), expected, rtol=0, atol=0)
    uneven = copy.deepcopy(layer)(x.view(20, 3), cu_seqlens=torch.tensor([0, 5, 10, 10, 15, 20]))  # gathered
    torch.testing.assert_close(uneven.view(4, 5, 4), expected, rtol=1e-12, atol=1e-12)
    single = copy.deepcopy(layer)(x[0])
    torch.testing.assert_close(single, copy.deepcopy(layer)(x[:1])[0], rtol=0, atol=0)
    assert layer.eval()(torch.randn(0, 5, 3, dtype=torch.float64)).shape == (0, 5, 4)
    assert layer(torch.randn(0, 3, dtype=torch.float64), cu_seqlens=torch.zeros(3, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_as_near_as_its_inputs_are(engine: str, training: bool) -> None:
    """bfloat16, against the same rounded numbers in float64: a few roundings of 2^-9 at each of two levels."""
    levels = levels_of([16, 24, 8], [2, 2], torch.bfloat16, [training] * 2)
    levels = [level._replace(running_mean=level[3].float(), running_var=level[4].float()) for level in levels]
    shifts, x = [Shift(2, 1), Shift(2, 2)], inputs("contiguous", 4, 32, 16, torch.bfloat16)
    twins, x64 = exact(levels, x)
    dh = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected, gradients = reference(twins, x64, shifts, dh)
    x.requires_grad_()
    h = library.conv_sequences(x, levels, shifts)
    found = torch.autograd.grad(h, [x, *parameters(levels)], dh)
    for got, wanted in zip([h, *found], [expected, *gradients], strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - wanted).norm() / wanted.norm()) < 16 * 2.0**-9
    if not training:
        with torch.no_grad():
            assert library.conv_sequences(x, levels, shifts).dtype == torch.bfloat16


@settings(max_examples=40)
@given(st.data())
def test_any_stack_is_the_definition(data: st.DataObject) -> None:
    """Any sizes, dilations, counts and kinds of norm, in float64."""
    L = data.draw(st.integers(1, 3))
    channels = data.draw(st.lists(st.integers(1, 12), min_size=L + 1, max_size=L + 1))
    kernels = data.draw(st.lists(st.integers(1, 4), min_size=L, max_size=L))
    dilations = data.draw(st.lists(st.integers(1, 20), min_size=L, max_size=L))
    padding = data.draw(st.sampled_from(["replicate", "zeros"]))
    B, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    counts = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=B * T, max_size=B * T))
    total = B * T if counts is None else sum(counts)
    modes = data.draw(st.lists(st.booleans(), min_size=L, max_size=L)) if total > 1 else [False] * L
    levels = levels_of(channels, kernels, torch.float64, modes, data.draw(st.booleans()))
    table = None if counts is None else torch.tensor(counts)
    shifts = [Shift(k, d, padding, table) for k, d in zip(kernels, dilations, strict=True)]  # type: ignore[arg-type]
    x = inputs("contiguous", B, T, channels[0], torch.float64)
    twins, x64 = exact(levels, x)
    dh = inputs("contiguous", B, T, channels[-1], torch.float64) + 0.1
    expected, gradients = reference(twins, x64, shifts, dh)
    x.requires_grad_()
    h = library.conv_sequences(x, levels, shifts)
    for got, wanted in zip(
        [h, *torch.autograd.grad(h, [x, *parameters(levels)], dh)], [expected, *gradients], strict=True
    ):
        assert distance(got, wanted) <= FLOAT64


def numbers() -> Iterator[Tensor]:
    """Float32 numbers of every exponent, and every one of those between 1/16 and 16 whose last 6 bits are equal."""
    mantissas = torch.randint(0, 1 << 23, (256, 4096), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    exponents = torch.arange(255, dtype=torch.int32)[:, None] << 23
    yield (exponents + mantissas[:255]).view(torch.float32).flatten()
    begin, end = torch.tensor([0.0625, 16.0]).view(torch.int32).tolist()
    yield torch.arange(begin, end, 63, dtype=torch.int32).view(torch.float32)


def test_tanh_is_exact_to_a_few_units_in_the_last_place(engine: str) -> None:
    """Both signs; 0, infinity and NaN too. A unit is that of the true value; subnormal results have a fixed one."""
    limit = 2.5 if engine == "MKL" else 1.3
    level = Level(torch.ones(1, 1, 1), torch.ones(4), torch.zeros(4), None, None)
    for some in numbers():
        some = some[: some.numel() // 4 * 4]
        for x in (some, -some):
            y = sequences._activated(x.view(1, -1, 4), torch.ones(4), level, torch.float32).flatten()
            true = x.double().tanh()
            unit = torch.ldexp(torch.ones_like(true), (torch.frexp(true)[1] - 24).clamp(min=-149))
            assert float(((y.double() - true).abs() / unit).max()) <= limit
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    y = sequences._activated(special.view(1, 1, 4), torch.ones(4), level, torch.float32).flatten()
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0, -1.0, torch.nan]), rtol=0, atol=0, equal_nan=True)


def test_oneDNN_may_be_switched_off() -> None:
    levels, shifts = levels_of([64, 64], [2], torch.float32, [True]), [Shift(2, 1)]
    x = torch.randn(4, 64, 64)
    expected = library.conv_sequences(x, levels, shifts)
    with torch.backends.mkldnn.flags(enabled=False):
        found = library.conv_sequences(x, levels, shifts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_function_transforms() -> None:
    """hessian, jvp, vmap and vjp over sequences give what the definition gives, in training mode."""
    levels = [
        level._replace(running_mean=None, running_var=None) for level in levels_of([3, 4], [2], torch.float64, [True])
    ]
    levels = [Level(*(t if t is None else t.detach() for t in level[:5]), *level[5:]) for level in levels]
    shifts = [Shift(2, 2)]

    def ours(x: Tensor) -> Tensor:
        return library.conv_sequences(x, levels, shifts)

    def plain(x: Tensor) -> Tensor:
        return naive.stack(x.reshape(-1, 3), levels, [shifts[0].rows((2, 4), x.device)])[0].view(2, 4, 4)

    x, v = inputs("contiguous", 2, 4, 3, torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    transforms = {
        "hessian": lambda f: torch.func.hessian(lambda y: f(y).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (v,))[1],
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([x, v])),
        "vjp": lambda f: torch.func.vjp(f, x)[1](torch.ones(2, 4, 4, dtype=torch.float64))[0],
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(plain), msg=lambda m, n=name: f"{n}: {m}")
