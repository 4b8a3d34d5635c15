"""The op boundary: the same function whichever way it is called, and errors that name the argument.

The kernels run in triton's interpreter here (conftest.py), compiled where there is a CUDA device.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import convwave as cw
from convwave.data.graph import Rows
from convwave.ops import conv_stack, library, naive
from convwave.ops.level import Level
from tests.helpers import disturb

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed")
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
GRAPHS = [cw.dense_graph, cw.distinct_graph, cw.windowed_graph]
SINGLE = 2e-5  # two roundings of sums of some hundred terms, through three levels: 1e2 u at most
WIDTHS = [10, 12, 9, 7]


def levels(
    dtype: torch.dtype, requires_grad: bool = False, training: object = True, unbiased: object = True
) -> list[Level]:
    """Levels of which no two have an equal number; `training` and `unbiased` are of all or of each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def each(value: object) -> list[bool]:
        return list(value) if isinstance(value, tuple) else [bool(value)] * 3

    modes = zip(itertools.pairwise(WIDTHS), each(training), each(unbiased), strict=True)
    return [
        Level(
            (normal(h, c, 2) * c**-0.5).requires_grad_(requires_grad),
            (1 + 0.3 * normal(h)).requires_grad_(requires_grad),
            normal(h).requires_grad_(requires_grad),
            normal(h),
            0.5 + normal(h) ** 2,
            eps=1e-5 * 3**i,
            momentum=0.1 + 0.2 * i,
            training=mode,
            unbiased=kind,
        )
        for i, ((c, h), mode, kind) in enumerate(modes)
    ]


def parameters(stack: list[Level]) -> list[Tensor]:
    return [tensor for level in stack for tensor in level[:3]]


def with_parameters(stack: list[Level], tensors: Sequence[Tensor]) -> list[Level]:
    """The same levels with other parameters, and running statistics of their own."""
    return [
        level._replace(
            weight=tensors[3 * i], gamma=tensors[3 * i + 1], beta=tensors[3 * i + 2],
            running_mean=level.running_mean.clone(), running_var=level.running_var.clone(),
        )
        for i, level in enumerate(stack)
    ]  # fmt: skip


def inputs(graph: cw.Graph, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(graph.tokens.numel(), WIDTHS[0], generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x.requires_grad_(requires_grad)


@pytest.fixture(scope="module")
def graph() -> cw.Graph:
    packed = cw.pack_ids([[1, 2, 3, 4, 5, 6, 7, 8, 9], [], [1], [2, 1, 2, 1]])
    return cw.dense_graph(packed, 3, torch.arange(len(packed)) % 3 + 1).to(DEVICE)


MODES = [True, False, (True, False, True), (False, True, False)]

# ---------------------------------------------------------------------------------------------------------------------
# The definition, its closed form, and autograd


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("unbiased", [True, False, (False, True, False)])
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_closed_form_is_the_definition(make: object, unbiased: object, training: object, backend: str) -> None:
    """Both backends in float64 against `naive` and autograd; every level obeys its own mode and kind of variance."""
    packed = cw.pack_ids([[1, 2, 3, 4, 5, 6, 7], [], [1], [2, 1, 2]])
    graph = make(packed, 3, torch.arange(len(packed)) % 3 + 1).to(DEVICE)  # type: ignore[operator]
    x, stack = inputs(graph, torch.float64, True), levels(torch.float64, True, training, unbiased)
    variables = [x, *parameters(stack)]
    expected, taken = naive.stack(x, stack, graph.rows())
    dh = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE)
    gradients = torch.autograd.grad(expected, variables, dh)
    ours = with_parameters(stack, parameters(stack))
    h = conv_stack(x, ours, graph.rows(), backend)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(h, variables, dh), gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for level, before, stats in zip(ours, stack, taken, strict=True):
        for name, statistic in (("running_mean", "mean"), ("running_var", "var")):
            old, new = getattr(before, name), getattr(level, name)
            if not before.training:
                assert torch.equal(old, new), "a frozen level moved"
                continue
            found = getattr(stats, statistic).detach()
            if statistic == "var" and not before.unbiased:
                found = found * stats.total / (stats.total - 1)
            torch.testing.assert_close(new, old.lerp(found, before.momentum), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_derivatives_by_finite_differences(graph: cw.Graph, training: object, backend: str) -> None:
    """In float64, in which both backends compute in plain PyTorch."""
    small = cw.dense_graph(cw.pack_ids([[1, 2, 3], [2]]), 3, torch.arange(6) % 3 + 1).to(DEVICE)
    stack = levels(torch.float64, True, training)

    def function(x: Tensor, *flat: Tensor) -> Tensor:
        return conv_stack(x, with_parameters(stack, flat), small.rows(), backend)

    variables = [inputs(small, torch.float64, True), *parameters(stack)]
    nondeterminism = 1e-12 if DEVICE == "cuda" else 0.0
    assert torch.autograd.gradcheck(function, variables, nondet_tol=nondeterminism, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, variables, nondet_tol=nondeterminism, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_in_float32_are_the_definitions(graph: cw.Graph, backend: str) -> None:
    """A gradient penalty through the kernels too: its second pass is the definition's, not the kernels'."""
    results = []
    for dtype, chosen in ((torch.float64, None), (torch.float32, backend)):
        stack = [level._replace(weight=level.weight.to(dtype)) for level in levels(torch.float64, True)]
        stack = [
            Level(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in level[:5]), *level[5:])
            for level in stack
        ]
        x = inputs(graph, dtype, True)
        h = naive.stack(x, stack, graph.rows())[0] if chosen is None else conv_stack(x, stack, graph.rows(), chosen)
        (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *parameters(stack)]))
    for exact, ours in zip(*results, strict=True):
        assert float((ours.double() - exact).abs().max()) <= 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms(backend: str) -> None:
    """hessian, jvp and vmap in training mode give what the definition gives."""
    torch.manual_seed(0)
    kept = [torch.randn(4, 3, 2), torch.rand(4) + 0.5, torch.randn(4)]
    kept = [t.double() for t in kept]

    def ours(x: Tensor) -> Tensor:
        return cw.ops.conv_stack(
            x, [Level(*kept, None, None)], [Rows(torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]))], backend
        )

    def plain(x: Tensor) -> Tensor:
        z = torch.cat([x[:1], x[:-1]]) @ kept[0][:, :, 0].T + x @ kept[0][:, :, 1].T
        return torch.tanh((z - z.mean(0)) / torch.sqrt(z.var(0) + 1e-5) * kept[1] + kept[2])

    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    transforms = {
        "hessian": lambda f: torch.func.hessian(lambda y: f(y).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (v,))[1],
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([x, v])),
        "vjp": lambda f: torch.func.vjp(f, x)[1](torch.ones(5, 4, dtype=torch.float64))[0],
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(plain), msg=lambda m, n=name: f"{n}: {m}")


@needs_triton
@pytest.mark.parametrize(
    ("training", "with_consumers", "needs_dx"),
    [(True, True, True), (True, False, False), (False, True, False), ((True, False, True), True, True)],
)
def test_opcheck(graph: cw.Graph, training: object, with_consumers: bool, needs_dx: bool) -> None:
    x, stack = inputs(graph, torch.float32), levels(torch.float32, training=training)
    tensors, options = library._flatten(stack, graph.rows(consumers=with_consumers))
    flat = (*tensors, *options, "ieee")
    torch.library.opcheck(torch.ops.convwave.stack_forward.default, (x, *flat))
    if not training:
        torch.library.opcheck(torch.ops.convwave.stack_inference.default, (x, *flat))
    h, zs, stats = torch.ops.convwave.stack_forward(x, *flat)
    torch.library.opcheck(
        torch.ops.convwave.stack_backward.default, (torch.randn_like(h), x, zs, stats, needs_dx, *flat)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The network


def twins(backend: str = "triton", **options: object) -> tuple[cw.ConvWave, cw.ConvWave]:
    plain = disturb(cw.ConvWave(10, 10, [12, 9, 7], backend="eager", **options), 0)  # type: ignore[arg-type]
    other = cw.ConvWave(10, 10, [12, 9, 7], backend=backend, **options)  # type: ignore[arg-type]
    other.load_state_dict(plain.state_dict())
    return plain.to(DEVICE), other.to(DEVICE)


@needs_triton
@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("statistics", ["windows", "positions"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_training_step_and_evaluation_of_the_network(make: object, statistics: str, unbiased: bool) -> None:
    if statistics == "positions" and make is not cw.dense_graph:
        pytest.skip("statistics='positions' trains on a dense graph only")
    packed = cw.pack_ids([[1, 2, 3, 4, 5, 6, 7, 8, 9], [], [1], [2, 1, 2, 1]])
    graph = make(packed, 3).to(DEVICE)  # type: ignore[operator]
    plain, fused = twins(statistics=statistics, unbiased=unbiased)
    for net in (plain, fused):
        cw.loss(net(graph), graph).backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=SINGLE, atol=SINGLE, msg=lambda m, n=name: f"{n}: {m}")
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=SINGLE, atol=SINGLE, msg=lambda m, n=name: f"{n}: {m}")
    for differentiable in (True, False):  # gradients in evaluation mode take another path than inference
        with torch.set_grad_enabled(differentiable):
            torch.testing.assert_close(fused.eval()(graph), plain.eval()(graph), rtol=SINGLE, atol=SINGLE)


@needs_triton
def test_gradients_in_evaluation_mode(graph: cw.Graph) -> None:
    plain, fused = twins()
    for net in (plain, fused):
        cw.loss(net.eval()(graph), graph).backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=SINGLE, atol=SINGLE, msg=lambda m, n=name: f"{n}: {m}")


@needs_triton
def test_float64_networks_compute_in_plain_pytorch(graph: cw.Graph) -> None:
    plain, fused = twins()
    plain, fused = plain.double(), fused.double()
    torch.testing.assert_close(fused(graph), plain(graph), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_with_dynamic_shapes(backend: str) -> None:
    """torch.compile(fullgraph=True): one graph, and the same numbers for batches of other sizes."""
    torch._dynamo.reset()
    plain, net = twins(backend)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9, 13):
        graph = cw.dense_graph(cw.pack_ids([[1 + i % 9 for i in range(length)], [3, 2, 1]])).to(DEVICE)
        plain.zero_grad()
        net.zero_grad()
        for model in (plain, compiled):
            cw.loss(model(graph), graph).backward()
        for (name, ours), theirs in zip(net.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(
                ours.grad, theirs[1].grad, rtol=SINGLE, atol=SINGLE, msg=lambda m, n=name: f"{n}: {m}"
            )
        for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=SINGLE, atol=SINGLE)


class _Layer(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.layer = cw.nn.ConvBatchNormTanh(5, 7, dilation=2, backend=backend).to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exported(backend: str) -> None:
    module = _Layer(backend).eval()
    x = torch.randn(3, 11, 5, device=DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    if backend == "triton":
        assert "convwave.stack" in str(program.graph)
    other = torch.randn(6, 11, 5, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), module(other), rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_functional_gradients(backend: str, training: bool, graph: cw.Graph) -> None:
    """torch.func.grad of the network as a function of its parameters."""
    plain, net = twins(backend)
    plain, net = plain.train(training), net.train(training)
    cw.loss(plain(graph), graph).backward()

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return cw.loss(torch.func.functional_call(net, (parameters, buffers), (graph,)), graph)

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    gradients = torch.func.grad(loss)(parameters, {name: b.clone() for name, b in net.named_buffers()})
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(gradients[name], expected.grad, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_level_obeys_its_own_state(backend: str, graph: cw.Graph) -> None:
    """One frozen norm, another momentum, another eps, a frozen matrix: in a network too."""
    net = twins(backend)[1].train()
    first, second, third = net.layers
    first.norm.eval()
    second.norm.momentum, second.norm.eps, second.norm.unbiased = 0.7, 1e-2, False
    third.conv.weight.requires_grad_(False)
    exact = copy.deepcopy(net).double()
    h = exact.embedding(graph.tokens)
    h, taken = naive.stack(h, [block.level() for block in exact.layers], graph.rows())
    before = copy.deepcopy(net.state_dict())
    logits = net(graph)
    torch.testing.assert_close(logits.double(), exact.head(h), rtol=SINGLE, atol=SINGLE)
    cw.loss(logits, graph).backward()
    assert third.conv.weight.grad is None
    assert first.conv.weight.grad is not None
    assert torch.equal(first.norm.running_mean, before["blocks.0.norm.running_mean"]), "a frozen norm moved"
    assert not first.norm.training
    assert second.norm.training
    old, stats = before["blocks.1.norm.running_mean"].double(), taken[1]
    expected = old.lerp(stats.mean.detach(), 0.7)
    torch.testing.assert_close(second.norm.running_mean.double(), expected, rtol=SINGLE, atol=SINGLE)


def test_helpers_restore_every_modules_own_mode(graph: cw.Graph) -> None:
    net = cw.ConvWave(10, vocabulary=cw.Vocabulary(".abcdefghi")).train()
    net.layers[1].norm.eval()
    modes = [module.training for module in net.modules()]
    cw.sample(net, 3)
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_fire_and_are_obeyed(backend: str, graph: cw.Graph) -> None:
    plain, net = twins(backend)
    expected = plain(graph)
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda m, i, o, n=name: seen.append(n)) for name, module in net.named_modules()
    ]
    torch.testing.assert_close(net(graph), expected, rtol=SINGLE, atol=SINGLE)
    assert {f"blocks.{i}{part}" for i in range(3) for part in ("", ".conv", ".norm")} <= set(seen)
    for handle in handles:
        handle.remove()
    prune.l1_unstructured(net.layers[0].conv, "weight", 0.5)  # a pre-hook that makes the weight
    net(graph).sum().backward()
    assert int((net.layers[0].conv.weight == 0).sum()) == net.layers[0].conv.weight.numel() // 2
    net.layers[1].conv = torch.nn.utils.parametrizations.weight_norm(net.layers[1].conv)
    net(graph).sum().backward()
    assert net.layers[1].conv.parametrizations.weight.original0.grad is not None


@needs_triton
def test_autocast_and_half_precision(graph: cw.Graph) -> None:
    plain, fused = twins()
    fused = fused.to(torch.bfloat16)
    logits = fused(graph)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), plain(graph), rtol=0.1, atol=0.1)  # 2^-8 through three levels
    cw.loss(logits.float(), graph).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in fused.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The layer by itself


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_it_equals_conv1d_batchnorm1d_tanh(backend: str, dilation: int, kernel_size: int, training: bool) -> None:
    layer = disturb(
        cw.nn.ConvBatchNormTanh(
            5, 7, kernel_size, dilation, unbiased=False, padding="zeros", layout="BCT", backend=backend
        ),
        0,
    ).to(DEVICE)
    conv = nn.Conv1d(5, 7, kernel_size, dilation=dilation, bias=False).to(DEVICE)
    norm = nn.BatchNorm1d(7).to(DEVICE)
    conv.load_state_dict(layer.conv.state_dict())
    norm.load_state_dict(layer.norm.state_dict(), strict=False)
    layer, norm = layer.train(training), norm.train(training)
    x = torch.randn(3, 5, 17, device=DEVICE)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    h = layer(ours)
    expected = norm(conv(F.pad(theirs, ((kernel_size - 1) * dilation, 0)))).tanh()
    torch.testing.assert_close(h, expected, rtol=SINGLE, atol=SINGLE)
    dh = torch.randn_like(h)
    h.backward(dh)
    expected.backward(dh)
    pairs = [
        (ours.grad, theirs.grad),
        (layer.conv.weight.grad, conv.weight.grad),
        (layer.norm.weight.grad, norm.weight.grad),
        (layer.norm.bias.grad, norm.bias.grad),
        (layer.norm.running_mean, norm.running_mean),
        (layer.norm.running_var, norm.running_var),
    ]
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=5 * SINGLE, atol=5 * SINGLE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize("counted", [True, False])
def test_all_layouts_are_one_function(backend: str, padding: str, counted: bool) -> None:
    options = {"dilation": 3, "padding": padding, "backend": backend}
    base = disturb(cw.nn.ConvBatchNormTanh(4, 6, 2, **options), 0).to(DEVICE)  # type: ignore[arg-type]
    x = torch.randn(3, 11, 4, device=DEVICE)
    counts = torch.randint(1, 4, (3, 11), device=DEVICE) if counted else None
    cu_seqlens = torch.arange(4, device=DEVICE) * 11
    results = []
    for layout in ("BTC", "BCT", "packed"):
        layer = copy.deepcopy(base)
        given = x.clone().requires_grad_()
        if layout == "packed":
            flat = counts.reshape(-1) if counts is not None else None
            h = layer(given.reshape(33, 4), weights=flat, cu_seqlens=cu_seqlens).view(3, 11, 6)
        else:
            layer.layout = layout  # type: ignore[assignment]
            h = layer(given.transpose(1, 2) if layout == "BCT" else given, weights=counts)
            h = h.transpose(1, 2) if layout == "BCT" else h
        (h * torch.arange(6, device=DEVICE)).sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        results.append([h.detach(), given.grad, *gradients, *layer.buffers()])
    scattered = backend == "eager" and DEVICE == "cuda"  # PyTorch adds gradients up in any order there
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6 * scattered, atol=1e-6 * scattered)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_see_each_other(backend: str) -> None:
    """Each sequence by itself, in evaluation mode, gives its part of the packed result."""
    layer = disturb(cw.nn.ConvBatchNormTanh(4, 6, 3, 2, backend=backend), 0).to(DEVICE).eval()
    lengths = [1, 7, 0, 4]
    x = torch.randn(sum(lengths), 4, device=DEVICE)
    cu_seqlens = torch.tensor([0, 1, 8, 8, 12], device=DEVICE)
    whole = layer(x, cu_seqlens=cu_seqlens)
    parts = [layer(part) for part in x.split(lengths) if len(part)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=SINGLE, atol=SINGLE)


# ---------------------------------------------------------------------------------------------------------------------
# Choices and errors


def test_the_backend_is_chosen_once_and_shown() -> None:
    net = cw.ConvWave(5, backend="auto")
    assert net.backend == ("triton" if torch.cuda.is_available() and has_triton else "eager")
    assert f"backend='{net.backend}'" in repr(net)
    assert "eager" in cw.available_backends()


def test_without_triton_auto_means_eager_and_triton_is_a_clear_error() -> None:
    """In a process in which triton cannot be imported, and in one without a CUDA device."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
if {hidden}: importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
torch.cuda.is_available = lambda: False
import convwave as cw
print(cw.available_backends(), cw.ConvWave(5).backend)
try: cw.ConvWave(5, backend="triton")
except RuntimeError as error: print(error)
"""
    for hidden, reason in ((True, "the package triton is not installed"), (False, "there is no CUDA device")):
        if not hidden and not has_triton:
            continue
        environment = {"PATH": "", "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code.format(hidden=hidden)], capture_output=True, text=True, env=environment
        )
        assert "['eager'] eager" in done.stdout, done.stderr
        assert f"backend: 'triton' is not available: {reason}" in done.stdout


def test_errors_of_the_layer() -> None:
    layer = cw.nn.ConvBatchNormTanh(4, 6)
    x = torch.randn(2, 5, 4)
    bad = [
        (lambda: layer(torch.randn(2, 5, 3)), "x: expected 4 channels"),
        (lambda: layer(torch.randn(4)), r"x: expected \(N, C\)"),
        (lambda: layer(x, weights=torch.ones(3)), r"counts: expected shape \(2, 5\) or \(10,\)"),
        (lambda: layer(x, cu_seqlens=torch.tensor([0, 10])), "they are for rows"),
        (lambda: layer(x[0], cu_seqlens=torch.tensor([0, 4])), "cu_seqlens: expected to rise from 0 to 5"),
        (lambda: layer(x[0], cu_seqlens=torch.tensor([0, 4, 2, 5])), "cu_seqlens: expected to rise"),
        (lambda: layer(x[0], cu_seqlens=torch.tensor(5)), r"cu_seqlens: expected shape \(B \+ 1,\)"),
        (lambda: layer(x[0], torch.zeros(3, 5, dtype=torch.int64)), r"taps: expected shape \(2, N\)"),
        (lambda: layer(x[0, :1]), "unbiased variance needs a total count above 1"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, padding="same")(x), "padding: expected 'replicate' or 'zeros'"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, layout="TBC")(x), "layout: expected 'BTC' or 'BCT'"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, precision="fp8"), "precision: expected one of"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, backend="cuda"), "backend: expected 'auto', 'eager' or 'triton'"),
    ]
    for function, message in bad:
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_counts_nothing_matters_nothing(backend: str) -> None:
    """NaN where a mask is 0: outputs of counted rows, statistics and gradients are those of zeros there."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 7, 4, device=DEVICE), torch.ones(2, 7, device=DEVICE)
    mask[1, 4:] = 0
    base = cw.nn.ConvBatchNormTanh(4, 6, dilation=2, backend=backend).to(DEVICE)
    results = []
    for filling in (0.0, float("nan"), float("inf")):
        layer, given = copy.deepcopy(base), x.clone()
        given[1, 4:] = filling
        given.requires_grad_()
        h = layer(given, weights=mask)
        (h * mask[..., None] * torch.arange(6, device=DEVICE)).sum().backward()
        results.append([h[mask > 0], given.grad[mask > 0], *(p.grad for p in layer.parameters()), *layer.buffers()])
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_taps_outside_the_rows_are_an_error(backend: str) -> None:
    if DEVICE == "cuda":
        pytest.skip("an assertion on the device, which would end the process")
    layer = cw.nn.ConvBatchNormTanh(4, 6, backend=backend)
    for bad in (5, -2, 2**40):
        with pytest.raises(IndexError, match="taps: expected rows 0 to 4"):
            layer(torch.randn(5, 4), torch.tensor([[0, 1, 2], [1, bad, 3]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
def test_counts_that_sum_to_too_little_are_an_error(backend: str, counts: list[int]) -> None:
    layer = cw.nn.ConvBatchNormTanh(4, 6, backend=backend)
    with pytest.raises(ValueError, match="unbiased variance needs a total count above 1, got"):
        layer(torch.randn(5, 4), weights=torch.tensor(counts))


def test_batch_norm_is_torchs_own() -> None:
    """State both ways, a cumulative average, no affine, no statistics, narrow dtypes: against nn.BatchNorm1d."""
    torch.manual_seed(0)
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False}):
        ours, theirs = cw.nn.BatchNorm(7, unbiased=False, **options), nn.BatchNorm1d(7, **options)  # type: ignore[arg-type]
        for _ in range(3):
            z = torch.randn(5, 7) * 2 + 1
            torch.testing.assert_close(ours(z), theirs(z))
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours.eval()(z), theirs.eval()(z))
    z = torch.randn(2, 5, 7)
    torch.testing.assert_close(cw.nn.BatchNorm(7)(z), cw.nn.BatchNorm(7)(z.flatten(0, 1)).view(2, 5, 7))
    half = cw.nn.BatchNorm(7).half()
    assert half.weight.dtype == torch.float16
    assert half.running_var.dtype == torch.float32
    large = (torch.randn(100_000, 7) + 3).half()
    assert half(large).isfinite().all()
    torch.testing.assert_close(half.running_mean, 0.1 * large.float().mean(0), rtol=1e-3, atol=1e-3)
