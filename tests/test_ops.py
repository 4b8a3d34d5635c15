"""The op boundary: the same function through every door, and errors that name the argument.

The kernels run in triton's interpreter here (conftest.py), compiled where there is a CUDA device.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from convwave.ops import fold, naive
from convwave.ops import library as ops
from convwave.ops import stack as twin
from convwave.ops.functional import conv_stack
from tests.helpers import disturb

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed")
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
GRAPHS = [cw.dense_graph, cw.distinct_graph, cw.windowed_graph]
SINGLE = 2e-5  # two roundings of sums of some hundred terms, through three levels: 1e2 u at most
WIDTHS = [10, 12, 9, 7]


def levels(dtype: torch.dtype, requires_grad: bool = False, seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    pairs = list(itertools.pairwise(WIDTHS))
    result = {
        "weights": [normal(h, c, 2) * c**-0.5 for c, h in pairs],
        "gammas": [1 + 0.3 * normal(h) for _, h in pairs],
        "betas": [normal(h) for _, h in pairs],
    }
    return {name: [t.requires_grad_(requires_grad) for t in tensors] for name, tensors in result.items()}


def inputs(graph: cw.Graph, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(graph.tokens.numel(), WIDTHS[0], generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x.requires_grad_(requires_grad)


def fixed_of(gammas: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    draws = [torch.rand(2, g.numel(), generator=generator, dtype=torch.float64).to(DEVICE, g.dtype) for g in gammas]
    return [fold.fixed_stats(mean, 0.5 + var, g.detach(), 1e-5) for (mean, var), g in zip(draws, gammas, strict=True)]


@pytest.fixture(scope="module")
def graph() -> cw.Graph:
    packed = cw.pack_ids([[1, 2, 3, 4, 5, 6, 7, 8, 9], [], [1], [2, 1, 2, 1]])
    return cw.dense_graph(packed, 3, torch.arange(len(packed)) % 3 + 1).to(DEVICE)


# ---------------------------------------------------------------------------------------------------------------------
# The definition, its closed-form twin, and autograd


@pytest.mark.parametrize("make", GRAPHS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_twin_is_the_definition(make: object, unbiased: bool, training: bool) -> None:
    """eager.stack_forward and stack_backward against naive.level and autograd, in float64."""
    packed = cw.pack_ids([[1, 2, 3, 4, 5, 6, 7], [], [1], [2, 1, 2]])
    graph = make(packed, 3, torch.arange(len(packed)) % 3 + 1).to(DEVICE)  # type: ignore[operator]
    x, p = inputs(graph, torch.float64, True), levels(torch.float64, True)
    h, variables = x, [x]
    generator = torch.Generator().manual_seed(2)
    for level, taps in enumerate(graph.taps):
        weight, gamma, beta = p["weights"][level], p["gammas"][level], p["betas"][level]
        draw = torch.rand(2, gamma.numel(), generator=generator, dtype=torch.float64).to(DEVICE)
        h = naive.level(
            h, weight, gamma, beta, draw[0], 0.5 + draw[1], taps=taps, counts=graph.weights[level],
            training=training, unbiased=unbiased,
        )  # fmt: skip
        variables += [weight, gamma, beta]
    dh = torch.randn(h.shape, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad(h, variables, dh)
    fixed = [] if training else fixed_of(p["gammas"])
    lists = [[t.detach() for t in p[name]] for name in ("weights", "gammas", "betas")]
    counts = list(graph.weights)
    ours, zs, stats = twin.stack_forward(x.detach(), *lists, fixed, graph.taps, counts, [1e-5] * 3, unbiased)
    dx, *gradients = twin.stack_backward(
        dh, x.detach(), lists[0], lists[2], zs, stats, graph.taps, counts, training, unbiased
    )
    torch.testing.assert_close(ours, h.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, expected[0], rtol=1e-10, atol=1e-12)
    for level in range(3):
        for name, ours, theirs in zip("wgb", (g[level] for g in gradients), expected[1 + 3 * level :], strict=False):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_the_op(graph: cw.Graph, training: bool) -> None:
    """Against finite differences, in float64 (for which the ops compute in plain PyTorch)."""
    p = levels(torch.float64, True)
    fixed = [] if training else fixed_of(p["gammas"])

    def function(x: Tensor, *flat: Tensor) -> Tensor:
        gammas = list(flat[3:6])
        stats = (
            []
            if training
            else [torch.stack([f[0], f[1], f[1] * g, f[3], f[4]]) for f, g in zip(fixed, gammas, strict=True)]
        )
        return ops.stack(x, flat[:3], gammas, flat[6:], stats, graph.taps, graph.weights, [1e-5] * 3, True)[0]

    variables = [inputs(graph, torch.float64, True), *p["weights"], *p["gammas"], *p["betas"]]
    assert torch.autograd.gradcheck(function, variables, nondet_tol=1e-12 if DEVICE == "cuda" else 0.0)


@needs_triton
@pytest.mark.parametrize(
    ("training", "with_consumers", "needs_dx"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_opcheck(graph: cw.Graph, training: bool, with_consumers: bool, needs_dx: bool) -> None:
    p, x = levels(torch.float32), inputs(graph, torch.float32)
    lists = (p["weights"], p["gammas"], p["betas"])
    fixed = [] if training else fixed_of(p["gammas"])
    taps, counts, eps = list(graph.taps), list(graph.weights), [1e-5] * 3
    forward = (x, *lists, fixed, taps, counts, eps, True, "ieee")
    torch.library.opcheck(torch.ops.convwave.stack_forward.default, forward)
    if not training:
        torch.library.opcheck(torch.ops.convwave.stack_inference.default, (x, *lists, fixed, taps, eps, "ieee"))
    h, zs, stats = torch.ops.convwave.stack_forward(*forward)
    consumers = graph.consumers if with_consumers else ()
    backward = (
        torch.randn_like(h), x, p["weights"], p["betas"], zs, stats, taps, counts, [c.ranges for c in consumers],
        [c.order for c in consumers], [c.most for c in consumers], training, True, needs_dx, "ieee",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.convwave.stack_backward.default, backward)


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
    for differentiable in (True, False):  # gradients in evaluation mode take another road than inference
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


@needs_triton
def test_a_second_derivative_is_refused_in_clear_words(graph: cw.Graph) -> None:
    _, fused = twins()
    (gradient,) = torch.autograd.grad(cw.loss(fused(graph), graph), [fused.head.weight], create_graph=True)
    assert gradient.requires_grad  # the head is plain PyTorch
    weight = fused.layers[0].conv.weight
    (gradient,) = torch.autograd.grad(cw.loss(fused(graph), graph), [weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


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
        (lambda: layer(x, weights=torch.ones(3)), "counts: expected 10 numbers"),
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
def test_the_stack_function_is_the_layers_one_after_another(backend: str) -> None:
    if backend == "eager":
        pytest.skip("conv_stack always goes through the ops")
    graph = cw.dense_graph(cw.pack_ids([[1, 2, 3], [4]]), 2).to(DEVICE)
    layers = [disturb(cw.nn.ConvBatchNormTanh(3, 5, backend="eager"), 0).to(DEVICE),
              disturb(cw.nn.ConvBatchNormTanh(5, 4, backend="eager"), 1).to(DEVICE)]  # fmt: skip
    copies = copy.deepcopy(layers)
    x = torch.randn(graph.tokens.numel(), 3, device=DEVICE)
    h = conv_stack(
        x,
        [layer.conv.weight for layer in copies],
        *(
            [getattr(layer.norm, name) for layer in copies]
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
        taps=graph.taps,
        training=True,
        unbiased=True,
        momentum=[0.1, 0.1],
        eps=[1e-5, 1e-5],
    )
    for layer, taps in zip(layers, graph.taps, strict=True):
        x = layer(x, taps)
    torch.testing.assert_close(h, x, rtol=SINGLE, atol=SINGLE)
    for ours, theirs in zip(copies, layers, strict=True):
        torch.testing.assert_close(ours.norm.running_var, theirs.norm.running_var, rtol=SINGLE, atol=SINGLE)
