"""What only a GPU can show: determinism under load, races, streams, sizes beyond 32 bits, CUDA graphs, compilation.

Skipped without a CUDA device. The kernels' values are tested in test_kernels.py, on either.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import convwave as cw

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
PRECISIONS = ["ieee", "tf32x3", "tf32", "bf16"]


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def network(precision: str = "tf32x3", n_hidden: int = 68) -> cw.ConvWave:
    torch.manual_seed(0)
    net = cw.ConvWave(27, 10, n_hidden, backend="triton", precision="ieee" if precision == "bf16" else precision)
    return net.to(DEVICE, torch.bfloat16 if precision == "bf16" else torch.float32)


def step(net: cw.ConvWave, graph: cw.Graph) -> list[Tensor]:
    """Loss and gradients."""
    net.zero_grad(set_to_none=True)
    loss = cw.loss(net(graph).float(), graph)
    loss.backward()
    return [loss.detach(), *(p.grad.detach() for p in net.parameters() if p.grad is not None)]


def equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.fixture(scope="module")
def graphs(words: cw.Words) -> dict[str, cw.Graph]:
    packed = cw.pack(words.words[:2000], cw.Vocabulary.from_words(words.words))
    return {"dense": cw.dense_graph(packed).to(DEVICE), "distinct": cw.distinct_graph(packed).to(DEVICE)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["dense", "distinct"])
def test_a_thousand_runs_give_the_same_bits(graphs: dict[str, cw.Graph], kind: str, precision: str) -> None:
    net = network(precision)
    first = [t.clone() for t in step(net, graphs[kind])]
    buffers = [b.clone() for b in net.buffers()]
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for buffer, value in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(value)
        for ours, expected in zip(step(net, graphs[kind]), first, strict=True):
            different += (ours != expected).any()
    assert int(different) == 0


def test_a_race_would_show(graphs: dict[str, cw.Graph]) -> None:
    """The last program merges what others wrote: under a second stream's load, and with programs of all sizes."""
    graph = graphs["dense"]
    net = network()
    expected = [t.clone() for t in step(net, graph)]
    noise, side = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    for attempt in range(300):
        with torch.cuda.stream(side):
            for _ in range(attempt % 5):
                noise = torch.tanh(noise @ noise * 1e-3)
        assert equal(step(net, graph), expected), attempt
    rows = torch.randn(70_001, 68, device=DEVICE)
    for n in (1, 2, 31, 127, 128, 129, 4_097, 70_001):
        layer = cw.nn.ConvBatchNormTanh(68, 68, unbiased=False, backend="triton", precision="ieee").to(DEVICE)
        plain = cw.nn.ConvBatchNormTanh(68, 68, unbiased=False, backend="eager").to(DEVICE, torch.float64)
        plain.load_state_dict(layer.state_dict())
        layer(rows[:n])
        plain(rows[:n].double())
        torch.testing.assert_close(layer.norm.running_var.double(), plain.norm.running_var, rtol=1e-5, atol=1e-6)


def test_streams_do_not_disturb_each_other(graphs: dict[str, cw.Graph]) -> None:
    nets = [network(precision) for precision in ("ieee", "tf32x3", "tf32", "tf32x3")]
    expected = [[t.clone() for t in step(net, graphs["distinct"])] for net in nets]
    streams = [torch.cuda.Stream() for _ in nets]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for net, stream in zip(nets, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(net, graphs["distinct"]))
        torch.cuda.synchronize()
        for ours, theirs in zip(results, expected, strict=True):
            assert equal(ours, theirs)


@pytest.mark.parametrize("kind", ["dense", "distinct"])
def test_a_step_captured_in_a_cuda_graph(graphs: dict[str, cw.Graph], kind: str) -> None:
    net, graph = network(), graphs[kind]
    expected = [t.clone() for t in step(net, graph)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, graph)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = step(net, graph)
    for _ in range(10):
        captured.replay()
    torch.cuda.synchronize()
    assert equal(results, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(graphs: dict[str, cw.Graph], mode: str) -> None:
    torch._dynamo.reset()
    net, graph = network("ieee"), graphs["dense"]
    expected = [t.clone() for t in step(net, graph)]
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(3):
        net.zero_grad(set_to_none=True)
        cw.loss(compiled(graph), graph).backward()
    for p, theirs in zip(net.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(MEMORY < 60 * 2**30, reason="needs 60 GiB of GPU memory")
@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_more_than_two_to_the_31_numbers(padding: str) -> None:
    """Offsets beyond 32 bits, forward and backward: the last rows are those of a short sequence by itself."""
    C, tail = 64, 1000
    N = 2**31 // C + 4097
    torch.manual_seed(0)
    layer = cw.nn.ConvBatchNormTanh(C, C, 2, 3, padding=padding, backend="triton").to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(N, C, dtype=torch.bfloat16, device=DEVICE)
    cu_seqlens = torch.tensor([0, N - tail, N], device=DEVICE)
    with torch.no_grad():
        h = layer(x, cu_seqlens=cu_seqlens)
        assert torch.equal(h[-tail:], layer(x[-tail:].clone()))
        assert torch.equal(h[:tail], layer(x[:tail].clone()))
    del h
    x.requires_grad_()
    layer.train()
    h = layer(x, cu_seqlens=cu_seqlens)
    mean, var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    assert torch.isfinite(h[-tail:]).all()
    assert torch.isfinite(mean).all()
    assert torch.isfinite(var).all()
    h.backward(torch.ones((), dtype=h.dtype, device=DEVICE).expand(h.shape))
    assert x.grad is not None
    assert torch.isfinite(x.grad[-tail:]).all()
    assert bool((x.grad[-tail:] != 0).any())


@pytest.mark.parametrize("width", [68, 128, 256, 512, 1024])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_at_real_widths(width: int, precision: str) -> None:
    """Errors against float64: of float32 for ieee and tf32x3, of 10 and 7 bits of mantissa for TF32 and bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(8192, width, generator=generator, dtype=torch.float64, device=DEVICE)
    layer = cw.nn.ConvBatchNormTanh(width, width, backend="eager").to(DEVICE, torch.float64)
    truth = layer(x).detach()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fused = cw.nn.ConvBatchNormTanh(
        width, width, backend="triton", precision="ieee" if precision == "bf16" else precision
    ).to(DEVICE, dtype)
    fused.load_state_dict(layer.state_dict())
    mantissa = {"ieee": 2.0**-24, "tf32x3": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}[precision]
    error = float((fused(x.to(dtype)).double() - truth).abs().max() / truth.abs().max())
    # a sum of 2 C products of rounded numbers, normalised: u sqrt(2 C) of one standard deviation, 4 for the worst
    assert error <= 4 * mantissa * (2 * width) ** 0.5


def test_the_network_takes_the_kernels_by_itself(graphs: dict[str, cw.Graph]) -> None:
    net = cw.ConvWave(27).to(DEVICE).eval()
    assert net.backend == "triton"
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits = net(graphs["dense"])
    assert any("stack_inference" in event.key for event in profile.key_averages())
    plain = cw.ConvWave(27, backend="eager").to(DEVICE, torch.float64).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits.double(), plain(graphs["dense"]), rtol=1e-4, atol=1e-5)
