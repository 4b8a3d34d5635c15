"""Who is measured: the windowed MLP, the convolution over its three graphs, and what one would write with torch.nn.

Two tasks, and within a task every competitor computes the same function:

- *the network* over packed names, `network`: embedding, levels, head, cross-entropy. The windowed MLP is made of
  torch.nn's own modules, whose BatchNorm is one fused operator: a faster baseline than the post's own classes, which
  stand beside it.
- *the stack* over full sequences of one length, `stack`: L levels of width C, BatchNorm over positions, and at the left
  edge the first position repeated. Any library's convolution can compute it, so this is where peers compete.

"compiled" is torch.compile with static shapes, "max-autotune" its mode of that name, which on CUDA replays CUDA graphs.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from benchmarks.harness import Competitor, Unavailable, Work, first_line
from convwave import reference
from convwave.ops.library import available_backends

Forward = Callable[[], Tensor]
Results = Mapping[str, Tensor]
MAX_AUTOTUNE = "max-autotune"  # of torch.compile


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """`torch.compile` with static shapes.

    Raises:
        Unavailable: this machine has no compiler for it.
    """
    reason = _compiler_is_missing()
    if reason:
        raise Unavailable(f"torch.compile: {reason}")
    return torch.compile(function, dynamic=False, mode=mode)


@functools.cache
def _compiler_is_missing() -> str:
    """Why nothing can be compiled here, or nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # whatever Inductor raises without a compiler
        return first_line(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The network over names


class Network:
    """The task: a network, packed words, and the competitors that evaluate or train it.

    Args:
        packed: the words.
        model: on the CPU, float32, ``unbiased=False``, as nn.BatchNorm1d is.
        training: loss and gradients in training mode, or logits in evaluation mode.
        device: where to run.
        windows: how many the windowed MLP evaluates, the last ones; None means all. It takes equally long for each, and
            more of them than fit into memory need not be compared.
    """

    def __init__(
        self, packed: cw.Packed, model: cw.ConvWave, training: bool, device: str, windows: int | None = None
    ) -> None:
        self.packed, self.model, self.training, self.device = packed, model, training, device
        self.positions = len(packed)
        self.windows = windows or self.positions

    def expected(self, model: cw.ConvWave | None = None, last: int | None = None) -> Results:
        """The result in float64, from the windowed MLP's function evaluated densely (equal: `convwave verify`).

        Args:
            model: another network than the task's.
            last: only so many windows, the last ones, count.
        """
        model = self._copy(model or self.model).to(self.device, torch.float64)
        last = last or self.positions
        counts = torch.zeros(self.positions, dtype=torch.float64)
        counts[-last:] = 1
        graph = cw.dense_graph(self.packed, factors=model.factors, counts=counts).to(self.device)
        result = self._work(model, graph).result()
        return result if self.training else {"logits": result["logits"][-last:]}

    def windowed(self, name: str = "windowed MLP", mode: str | None = None, compile: bool = False) -> Competitor:
        """The windowed MLP of torch.nn's modules."""

        def make(dtype: torch.dtype = torch.float32, compile: bool = compile) -> Work:
            mlp = cw.to_torch(self.model).to(self.device, dtype).train(self.training)
            windows = reference.build_windows(self.packed, self.model.context)
            inputs, targets = (t[-self.windows :].to(self.device) for t in windows)
            call = compiled(mlp, mode) if compile else mlp
            linears = [module for module in mlp if isinstance(module, nn.Linear)]
            matrices = [linear.weight for linear in linears[:-1]]
            parameters = list(mlp.parameters())
            embedding, head = parameters[0], linears[-1].weight

            def gradients() -> Results:
                return _network_gradients(embedding.grad, [w.grad for w in matrices], head.grad)

            return self._assemble(lambda: call(inputs), targets, parameters, gradients)

        return Competitor(
            name,
            make,
            exact=lambda: make(torch.float64, compile=False).result(),
            positions=self.windows,
            expected=None if self.windows == self.positions else self.expected(last=self.windows),
            replays=mode == MAX_AUTOTUNE,
        )

    def reference(self, name: str = "the post's own classes") -> Competitor:
        """The post's network as it stands, with its unbiased variance; checked against the same in float64."""
        post = self._copy(self.model)
        post.unbiased = True
        for block in post.layers:
            block.norm.unbiased = True

        def make() -> Work:
            mlp = cw.to_windowed(post).to(self.device).train(self.training)
            windows = reference.build_windows(self.packed, self.model.context)
            inputs, targets = windows.inputs.to(self.device), windows.targets.to(self.device)
            weights = [layer.weight for layer in mlp.layers if isinstance(layer, reference.Linear)]
            embedding = mlp.parameters()[0]

            def gradients() -> Results:
                grads = [w.grad.T for w in weights if w.grad is not None]
                return _network_gradients(embedding.grad, grads[:-1], grads[-1])

            return self._assemble(lambda: mlp(inputs), targets, mlp.parameters(), gradients)

        return Competitor(name, make, expected=self.expected(post))

    def convolution(
        self,
        kind: str,
        name: str | None = None,
        *,
        backend: str = "eager",
        compile: bool = False,
        mode: str | None = None,
        rebuilt: bool = False,
    ) -> Competitor:
        """The convolution over the graph of this kind: "windowed", "dense" or "distinct", or one built in every run."""

        def make() -> Work:
            if backend not in available_backends():
                raise Unavailable(f"backend {backend!r} is not available here")
            model = self._copy(self.model, backend).to(self.device)
            work = self._work(model, self.graph(kind).to(self.device), compile, mode)
            if not rebuilt:
                return work

            def run() -> None:
                self._work(model, self.graph(kind).to(self.device)).run()

            return work._replace(run=run)

        return Competitor(name or kind, make, captures=not rebuilt)

    def graph(self, kind: str) -> cw.Graph:
        build = {"windowed": cw.windowed_graph, "dense": cw.dense_graph, "distinct": cw.distinct_graph}[kind]
        return build(self.packed, factors=self.model.factors)

    def padded_conv1d(self, name: str, *, compile: bool = False, mode: str | None = None) -> Competitor:
        """nn.Conv1d over the rectangle of all names, filled up on the right."""

        def make() -> Work:
            if self.training:
                raise Unavailable("another function: the filling would count in BatchNorm's statistics")
            lengths = self.packed.cu_seqlens.diff()
            inside = (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)
            tokens = torch.zeros(inside.shape, dtype=torch.int64, device=self.device)
            tokens[inside] = self.packed.tokens.to(self.device)
            model = self._copy(self.model).to(self.device)
            blocks = conv1d_stack(model)
            call = compiled(blocks, mode) if compile else blocks

            def forward() -> Tensor:
                h = call(model.embedding(tokens).transpose(1, 2)).transpose(1, 2)
                return model.head(h)

            targets = self.packed.targets.to(self.device)
            work = self._assemble(forward, targets, [], dict)
            return Work(work.run, lambda: {"logits": work.result()["logits"][inside]})

        return Competitor(name, make)

    def _copy(self, model: cw.ConvWave, backend: str = "eager") -> cw.ConvWave:
        copied = cw.ConvWave(**model.config(), backend=backend)
        copied.load_state_dict(model.state_dict())
        return copied.train(self.training)

    def _work(self, model: cw.ConvWave, graph: cw.Graph, compile: bool = False, mode: str | None = None) -> Work:
        def forward() -> Tensor:
            return model(graph)

        def gradients() -> Results:
            taps = [block.conv.weight.grad for block in model.layers]
            flat = [None if g is None else g.transpose(1, 2).flatten(1) for g in taps]
            return _network_gradients(model.embedding.weight.grad, flat, model.head.weight.grad)

        call = compiled(forward, mode) if compile else forward
        return self._assemble(call, None, list(model.parameters()), gradients, graph)

    def _assemble(
        self,
        forward: Forward,
        targets: Tensor | None,
        parameters: Sequence[Tensor],
        gradients: Callable[[], Results],
        graph: cw.Graph | None = None,
    ) -> Work:
        if not self.training:
            inference = torch.no_grad()(forward)

            def logits() -> Results:
                out = inference()
                return {"logits": out if graph is None or graph.inverse is None else out[graph.inverse]}

            return Work(inference, logits)

        def step() -> Tensor:
            for p in parameters:
                p.grad = None
            out = forward()
            if graph is not None:
                loss = cw.loss(out, graph)
            else:
                assert targets is not None
                loss = F.cross_entropy(out, targets)
            loss.backward()
            return loss

        def result() -> Results:
            loss = step()
            return {"loss": loss.detach(), **gradients()}

        return Work(step, result, parameters)


def _network_gradients(embedding: Tensor | None, levels: Sequence[Tensor | None], head: Tensor | None) -> Results:
    named = {"embedding": embedding, "head": head, **{f"level {i}": g for i, g in enumerate(levels)}}
    return {name: gradient.clone() for name, gradient in named.items() if gradient is not None}


# ---------------------------------------------------------------------------------------------------------------------
# The stack over sequences of one length


def repeat_left(h: Tensor, dilation: int, dim: int) -> Tensor:
    """`h` with its first position repeated `dilation` times in front: exact at the left edge, deterministic on CUDA."""
    first = h.narrow(dim, 0, 1)
    shape = list(h.shape)
    shape[dim] = dilation
    return torch.cat([first.expand(shape), h], dim)


class Conv1dStack(nn.Module):
    """nn.Conv1d, nn.BatchNorm1d, tanh, level by level, over (B, C, T)."""

    def __init__(self, convs: list[nn.Module], norms: list[nn.BatchNorm1d], padded: bool) -> None:
        super().__init__()
        self.convs, self.norms, self.padded = nn.ModuleList(convs), nn.ModuleList(norms), padded

    def forward(self, h: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = torch.tanh(norm(conv(h if self.padded else repeat_left(h, 2**i, 2))))
        return h


class ShiftedMatmulStack(nn.Module):
    """Two matrix products a level, of the positions and of the same shifted by the dilation, over (B, T, C)."""

    def __init__(self, weights: list[Tensor], norms: list[nn.BatchNorm1d]) -> None:
        super().__init__()
        self.older = nn.ParameterList(w[:, :, 0].T.contiguous() for w in weights)
        self.newer = nn.ParameterList(w[:, :, 1].T.contiguous() for w in weights)
        self.norms = nn.ModuleList(norms)

    def forward(self, h: Tensor) -> Tensor:
        B, T, _ = h.shape
        for i, (older, newer, norm) in enumerate(zip(self.older, self.newer, self.norms, strict=True)):
            shifted = repeat_left(h, 2**i, 1)[:, :T]
            z = shifted.reshape(B * T, -1) @ older + h.reshape(B * T, -1) @ newer
            h = torch.tanh(norm(z)).view(B, T, -1)
        return h


def conv1d_stack(model: cw.ConvWave, conv: Callable[..., nn.Module] | None = None) -> Conv1dStack:
    """The levels of a network as nn.Conv1d and nn.BatchNorm1d, or with another library's causal convolution."""
    convs: list[nn.Module] = []
    for block in model.layers:
        H, C, k = block.conv.weight.shape
        layer: Any = (conv or nn.Conv1d)(C, H, k, dilation=block.conv.dilation, bias=False)
        with torch.no_grad():
            layer.weight.copy_(block.conv.weight)
        convs.append(layer)
    stack = Conv1dStack(convs, _torch_norms(model), padded=conv is not None)
    weight = model.head.weight
    return stack.to(weight.device, weight.dtype).train(model.training)


def _torch_norms(model: cw.ConvWave) -> list[nn.BatchNorm1d]:
    norms = []
    for block in model.layers:
        norm = nn.BatchNorm1d(block.norm.num_features, block.norm.eps, block.norm.momentum)
        norm.load_state_dict({**norm.state_dict(), **block.norm.state_dict()})
        norms.append(norm)
    return norms


class Stack:
    """The task: L levels of width C over B sequences of T positions.

    Args:
        batch, length, channels, levels: B, T, C, L.
        dtype: of activations and weights.
        training: forward in training mode and backward from a fixed gradient, or forward in evaluation mode.
        device: where to run.
    """

    def __init__(
        self, batch: int, length: int, channels: int, levels: int, dtype: torch.dtype, training: bool, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape = (batch, length, channels)
        self.dtype, self.training, self.device = dtype, training, device
        self.positions = batch * length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = cw.ConvWave(
                2, channels, channels, levels, unbiased=False, backend="eager", statistics="positions"
            )
        for block in self.model.layers:
            block.norm.running_mean.normal_(generator=generator).mul_(0.1)
            block.norm.running_var.uniform_(0.5, 1.5, generator=generator)
        self.x = torch.randn(self.shape, generator=generator).to(dtype).to(device)
        self.gradient = torch.randn(self.shape, generator=generator).to(dtype).to(device)
        packed = cw.pack_ids([[1] * (length - 1)] * batch)
        self.graph = cw.dense_graph(packed, levels)

    def expected(self) -> Results:
        """The result in float64, from the same rounded inputs and weights."""
        return self._convwave("eager", torch.float64).result()

    def weights(self, dtype: torch.dtype) -> cw.ConvWave:
        """The network, its weights rounded to the task's dtype first."""
        return copy.deepcopy(self.model).to(self.dtype).to(self.device, dtype).train(self.training)

    def _matmul(self, dtype: torch.dtype, compile: bool = False, mode: str | None = None) -> Work:
        model = self.weights(dtype)
        stack = ShiftedMatmulStack([block.conv.weight.detach() for block in model.layers], _torch_norms(model))
        stack = stack.to(self.device, dtype).train(self.training)

        def weights() -> list[Tensor]:
            pairs = zip(stack.older, stack.newer, strict=True)
            return [torch.stack([a.grad.T, b.grad.T], 2) for a, b in pairs]

        x, gradient = self.x.to(dtype), self.gradient.to(dtype)
        call = compiled(stack, mode) if compile else stack
        return self._assemble(call, x, gradient, list(stack.parameters()), weights, lambda h: h)

    def matmul(self, name: str = "two shifted matmuls", compile: bool = False, mode: str | None = None) -> Competitor:
        def exact() -> Results:
            return self._matmul(torch.float64).result()

        make = functools.partial(self._matmul, self.dtype, compile, mode)
        return Competitor(name, make, self.dtype, exact=exact, replays=mode == MAX_AUTOTUNE)

    def conv1d(
        self, name: str = "Conv1d + BatchNorm1d + tanh", compile: bool = False, mode: str | None = None
    ) -> Competitor:
        make = functools.partial(self._conv1d, None, compile, mode)
        return Competitor(name, make, self.dtype, replays=mode == MAX_AUTOTUNE)

    def pytorch_tcn(self) -> Competitor:
        """The causal convolution of the package pytorch-tcn, where it is installed."""

        def make() -> Work:
            try:
                module = importlib.import_module("pytorch_tcn")
            except ImportError:
                raise Unavailable("pytorch-tcn is not installed") from None
            return self._conv1d(functools.partial(module.TemporalConv1d, padding_mode="replicate"))

        return Competitor("pytorch-tcn", make, self.dtype)

    def _conv1d(self, conv: Callable[..., nn.Module] | None, compile: bool = False, mode: str | None = None) -> Work:
        stack = conv1d_stack(self.weights(self.dtype), conv)

        def weights() -> list[Tensor]:
            return [layer.weight.grad for layer in stack.convs]  # type: ignore[misc]

        x, gradient = (t.transpose(1, 2).contiguous() for t in (self.x, self.gradient))
        call = compiled(stack, mode) if compile else stack
        return self._assemble(call, x, gradient, list(stack.parameters()), weights, lambda h: h.transpose(1, 2))

    def convwave(self, name: str, backend: str = "eager", precision: str = "auto") -> Competitor:
        """This library; `precision` of float32 products is the kernels', "auto" the same as everybody's."""
        return Competitor(name, lambda: self._convwave(backend, self.dtype, precision), self.dtype)

    def _convwave(self, backend: str, dtype: torch.dtype, precision: str = "auto") -> Work:
        if backend not in available_backends():
            raise Unavailable(f"backend {backend!r} is not available here")
        model = cw.ConvWave(**self.model.config(), backend=backend, precision=precision)
        model.load_state_dict(self.weights(self.dtype).state_dict())
        model = model.to(self.device, dtype).train(self.training)
        graph = self.graph.to(self.device)
        rows = (self.positions, self.shape[2])

        def weights() -> list[Tensor]:
            return [block.conv.weight.grad for block in model.layers]  # type: ignore[misc]

        parameters = [p for block in model.layers for p in block.parameters()]
        x, gradient = (t.to(dtype).view(rows) for t in (self.x, self.gradient))
        return self._assemble(
            lambda h: model.features(h, graph), x, gradient, parameters, weights, lambda h: h.view(self.shape)
        )

    def _assemble(
        self,
        call: Callable[[Tensor], Tensor],
        x: Tensor,
        gradient: Tensor,
        parameters: Sequence[Tensor],
        weights: Callable[[], list[Tensor]],
        layout: Callable[[Tensor], Tensor],
    ) -> Work:
        if not self.training:

            @torch.no_grad()
            def forward() -> Tensor:
                return call(x)

            return Work(forward, lambda: {"h": layout(forward())})
        leaf = x.clone().requires_grad_()

        def step() -> Tensor:
            leaf.grad = None
            for p in parameters:
                p.grad = None
            h = call(leaf)
            h.backward(gradient)
            return h

        def result() -> Results:
            h = layout(step().detach())
            assert leaf.grad is not None
            levels = {f"level {i}": g.clone() for i, g in enumerate(weights())}
            return {"h": h.clone(), "x": layout(leaf.grad).clone(), **levels}

        return Work(step, result)
