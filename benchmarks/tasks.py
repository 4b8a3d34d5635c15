"""Who is measured: the windowed MLP, the convolution over its three graphs, and what one would write with torch.nn.

Two tasks, and within a task every competitor computes the same function:

- *the network* over packed names: embedding, levels, head, cross-entropy. The windowed MLP is made of torch.nn's own
  modules, whose BatchNorm is one fused operator: a faster baseline than the post's own classes, which are here too.
- *the stack* over full sequences of one length: L levels of width C, BatchNorm over positions, and at the left edge the
  first position repeated. Any library's convolution can compute it, so this is where peers compete.

"compiled" is torch.compile with static shapes, "max-autotune" its mode of that name, which on CUDA replays CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from benchmarks.harness import Competitor, Results, Unavailable, Work, why

MAX_AUTOTUNE = "max-autotune"  # of torch.compile
Compile = str | bool  # False, True, or the mode
REPLAYS = {MAX_AUTOTUNE: "replays CUDA graphs already"}


def compiled(function: Callable[..., Any], how: Compile = True) -> Callable[..., Any]:
    """`torch.compile` with static shapes, or the function itself; raises `Unavailable` without a compiler."""
    if how and _compiler_is_missing():
        raise Unavailable(f"torch.compile: {_compiler_is_missing()}")
    return torch.compile(function, dynamic=False, mode=how if isinstance(how, str) else None) if how else function


@functools.cache
def _compiler_is_missing() -> str:
    """Why nothing can be compiled here, or nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # whatever Inductor raises without a compiler
        return why(str(error))
    return ""


def need(backend: str) -> None:
    """Raise Unavailable where a backend is not there."""
    if backend not in cw.available_backends():
        raise Unavailable(f"backend {backend!r} is not available here")


def copied(model: cw.ConvWave, like: Tensor, training: bool, **changes: Any) -> cw.ConvWave:
    """A network with the same weights, of the dtype and on the device of a tensor."""
    found = cw.ConvWave(**model.config() | {"backend": "eager"} | changes)
    found.load_state_dict(model.state_dict())
    return found.to(like.device, like.dtype).train(training)


def work_of(
    forward: Callable[[], Tensor],
    training: bool,
    show: Callable[[Tensor], Results],
    parameters: Iterable[Tensor] = (),
    gradients: Callable[[], Results] = dict,
    gradient: Tensor | None = None,
) -> Work:
    """Forward without gradients, or forward and backward from `gradient`; `show` and `gradients` name the result."""
    if not training:
        inference = torch.no_grad()(forward)
        return Work(inference, lambda: show(inference()))
    trained = list(parameters)

    def step() -> Tensor:
        for p in trained:
            p.grad = None
        out = forward()
        out.backward(gradient)
        return out

    return Work(step, lambda: {**show(step().detach()), **gradients()}, trained)


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def by_level(gradients: Iterable[Tensor]) -> Results:
    return {f"level {i}": gradient for i, gradient in enumerate(gradients)}


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

        `model` is another network than the task's, `last` how many windows, the last ones, count; None means all.
        """
        last = last or self.positions
        counts = torch.zeros(self.positions, dtype=torch.float64)
        counts[-last:] = 1
        graph = cw.dense_graph(self.packed, factors=self.model.factors, counts=counts)
        exact = self._copy(model or self.model, torch.float64)
        result = self._work(exact, graph.to(self.device)).result()
        return result if self.training else {"logits": result["logits"][-last:]}

    def windowed(self, name: str = "windowed MLP", compile: Compile = False) -> Competitor:
        """The windowed MLP of torch.nn's modules."""

        def make(dtype: torch.dtype = torch.float32, compile: Compile = compile) -> Work:
            mlp = cw.to_torch(self.model).to(self.device, dtype).train(self.training)
            weights = [module.weight for module in mlp if isinstance(module, nn.Linear)]
            return self._windows(compiled(mlp, compile), mlp.parameters(), weights, lambda g: g)

        expected = None if self.windows == self.positions else self.expected(last=self.windows)
        why_not = REPLAYS.get(str(compile), "")
        exact = lambda: make(torch.float64, False).result()  # noqa: E731
        return Competitor(name, make, exact=exact, positions=self.windows, expected=expected, no_capture=why_not)

    def reference(self) -> Competitor:
        """The post's network as it stands, with its unbiased variance; checked against the same in float64."""
        post = self._copy(self.model)
        for block in post.layers:
            block.norm.unbiased = True

        def make() -> Work:
            mlp = cw.to_windowed(post).to(self.device).train(self.training)
            weights = [layer.weight for layer in mlp.layers if isinstance(layer, cw.reference.Linear)]
            return self._windows(mlp, mlp.parameters(), weights, lambda g: g.T)

        return Competitor("the post's own classes", make, expected=self.expected(post))

    def _windows(
        self,
        call: Callable[[Tensor], Tensor],
        parameters: Iterable[Tensor],
        weights: Sequence[Tensor],
        layout: Callable[[Tensor], Tensor],
    ) -> Work:
        windows = cw.reference.build_windows(self.packed, self.model.context)
        inputs, targets = (t[-self.windows :].to(self.device) for t in windows)
        trained = list(parameters)

        def gradients() -> Results:
            *levels, head = (layout(grad(w)) for w in weights)
            return {"embedding": grad(trained[0]), "head": head, **by_level(levels)}

        return self._loss(lambda: call(inputs), lambda logits: F.cross_entropy(logits, targets), trained, gradients)

    def _loss(
        self,
        logits: Callable[[], Tensor],
        loss: Callable[[Tensor], Tensor],
        parameters: Iterable[Tensor],
        gradients: Callable[[], Results],
        show: Callable[[Tensor], Tensor] = lambda out: out,
    ) -> Work:
        if not self.training:
            return work_of(logits, False, lambda out: {"logits": show(out)})
        return work_of(lambda: loss(logits()), True, lambda out: {"loss": out}, parameters, gradients)

    def convolution(
        self,
        kind: str,
        name: str | None = None,
        *,
        backend: str = "eager",
        compile: Compile = False,
        rebuilt: bool = False,
    ) -> Competitor:
        """The convolution over the graph of this kind: "windowed", "dense" or "distinct", or one built in every run."""

        def make() -> Work:
            need(backend)
            model = self._copy(self.model, backend=backend)
            work = self._work(model, self.graph(kind), compile)
            return work._replace(run=lambda: self._work(model, self.graph(kind)).run()) if rebuilt else work

        return Competitor(name or kind, make, no_capture="copies from the host in every run" * rebuilt)

    def graph(self, kind: str) -> cw.Graph:
        build = {"windowed": cw.windowed_graph, "dense": cw.dense_graph, "distinct": cw.distinct_graph}[kind]
        return build(self.packed, factors=self.model.factors).to(self.device)

    def padded_conv1d(self, name: str, compile: Compile = False) -> Competitor:
        """nn.Conv1d over the rectangle of all names, filled up on the right."""

        def make() -> Work:
            if self.training:
                raise Unavailable("another function: the filling would count in BatchNorm's statistics")
            tokens, inside = (t.to(self.device) for t in rectangle(self.packed))
            model = self._copy(self.model)
            call = compiled(Conv1dStack(model), compile)

            def forward() -> Tensor:
                return model.head(call(model.embedding(tokens).transpose(1, 2)).transpose(1, 2))

            return work_of(forward, False, lambda out: {"logits": out[inside]})

        return Competitor(name, make)

    def _copy(self, model: cw.ConvWave, dtype: torch.dtype = torch.float32, backend: str = "eager") -> cw.ConvWave:
        return copied(model, torch.empty(0, dtype=dtype, device=self.device), self.training, backend=backend)

    def _work(self, model: cw.ConvWave, graph: cw.Graph, compile: Compile = False) -> Work:
        def gradients() -> Results:
            levels = (grad(block.conv.weight).transpose(1, 2).flatten(1) for block in model.layers)
            return {"embedding": grad(model.embedding.weight), "head": grad(model.head.weight), **by_level(levels)}

        def show(out: Tensor) -> Tensor:
            return out if graph.inverse is None else out[graph.inverse]

        call = compiled(lambda: model(graph), compile)
        return self._loss(call, lambda logits: cw.loss(logits, graph), model.parameters(), gradients, show)


def rectangle(packed: cw.Packed) -> tuple[Tensor, Tensor]:
    """(B, T) tokens of all words, filled up with 0 on the right, and the (B, T) mask of those that are no filling."""
    lengths = packed.cu_seqlens.diff()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.int64)
    tokens[inside] = packed.tokens
    return tokens, inside


# The stack over sequences of one length


def repeat_left(h: Tensor, dilation: int, dim: int = 2) -> Tensor:
    """`h` with its first position repeated `dilation` times in front: exact at the left edge, deterministic on CUDA."""
    first = h.narrow(dim, 0, 1)
    return torch.cat([first.expand([dilation if d == dim else -1 for d in range(h.dim())]), h], dim)


def torch_norms(model: cw.ConvWave) -> nn.ModuleList:
    norms = nn.ModuleList(nn.BatchNorm1d(b.norm.num_features, b.norm.eps, b.norm.momentum) for b in model.layers)
    for norm, block in zip(norms, model.layers, strict=True):
        norm.load_state_dict({**norm.state_dict(), **block.norm.state_dict()})
    return norms


class Conv1dStack(nn.Module):
    """A network's levels as nn.Conv1d, nn.BatchNorm1d and tanh over (B, C, T), or with another convolution or padding.

    `pad(h, dilation)` comes first in each.
    """

    def __init__(
        self,
        model: cw.ConvWave,
        conv: Callable[..., Any] = nn.Conv1d,
        pad: Callable[[Tensor, int], Tensor] = repeat_left,
    ) -> None:
        super().__init__()
        self.convs, self.norms, self.pad = nn.ModuleList(), torch_norms(model), pad
        for block in model.layers:
            H, C, k = block.conv.weight.shape
            layer = conv(C, H, k, dilation=block.conv.dilation, bias=False)
            layer.weight.data.copy_(block.conv.weight)
            self.convs.append(layer)
        self.to(model.head.weight).train(model.training)

    def forward(self, h: Tensor) -> Tensor:
        dilation = 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = torch.tanh(norm(conv(self.pad(h, dilation))))
            dilation *= conv.weight.shape[-1]  # type: ignore[index, assignment]
        return h


class ShiftedMatmulStack(nn.Module):
    """Two matrix products a level, of the positions and of the same shifted by the dilation, over (B, T, C)."""

    def __init__(self, model: cw.ConvWave) -> None:
        super().__init__()
        weights = [block.conv.weight.detach() for block in model.layers]
        self.older, self.newer = (nn.ParameterList(w[:, :, j].T.contiguous() for w in weights) for j in range(2))
        self.norms = torch_norms(model)
        self.to(model.head.weight).train(model.training)

    def forward(self, h: Tensor) -> Tensor:
        B, T, _ = h.shape
        for i, (older, newer, norm) in enumerate(zip(self.older, self.newer, self.norms, strict=True)):
            shifted = repeat_left(h, 2**i, 1)[:, :T]
            z = shifted.reshape(B * T, -1) @ older + h.reshape(B * T, -1) @ newer
            h = torch.tanh(norm(z)).view(B, T, -1)
        return h


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
        self.shape, self.positions = (batch, length, channels), batch * length
        self.dtype, self.training = dtype, training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cw.ConvWave(2, channels, channels, levels, unbiased=False, backend="eager", statistics="positions")
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(generator=generator).mul_(0.1)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 1.5, generator=generator)
        self.x, self.gradient = (torch.randn(self.shape, generator=generator).to(dtype).to(device) for _ in range(2))
        self._model = copied(model, self.x, training)  # its weights rounded to the task's dtype
        self.graph = cw.dense_graph(cw.pack_ids([[1] * (length - 1)] * batch), levels).to(device)

    def expected(self) -> Results:
        """The result in float64, from the same rounded inputs and weights."""
        return self._convwave(torch.float64).result()

    def model(self, dtype: torch.dtype, **changes: Any) -> cw.ConvWave:
        """The network in a dtype, its weights rounded to the task's dtype first."""
        return copied(self._model, self.x.to(dtype), self.training, **changes)

    def matmul(self, name: str = "two shifted matmuls", compile: Compile = False) -> Competitor:
        def make(dtype: torch.dtype = self.dtype, compile: Compile = compile) -> Work:
            stack = ShiftedMatmulStack(self.model(dtype))

            def gradients() -> list[Tensor]:
                return [torch.stack([grad(a).T, grad(b).T], 2) for a, b in zip(stack.older, stack.newer, strict=True)]

            return self._work(compiled(stack, compile), stack.parameters(), gradients, lambda h: h, dtype)

        exact = lambda: make(torch.float64, False).result()  # noqa: E731
        return Competitor(name, make, self.dtype, exact=exact, no_capture=REPLAYS.get(str(compile), ""))

    def conv1d(
        self, name: str = "Conv1d + BatchNorm1d + tanh", compile: Compile = False, deterministic: bool = False
    ) -> Competitor:
        """torch.nn's, with cudnn's deterministic algorithms if wanted."""

        def make() -> Work:
            work, cudnn = self._conv1d(Conv1dStack(self.model(self.dtype)), compile), torch.backends.cudnn

            def run() -> None:
                before, cudnn.deterministic = cudnn.deterministic, True
                try:
                    work.run()
                finally:
                    cudnn.deterministic = before

            return work._replace(run=run) if deterministic else work

        return Competitor(name, make, self.dtype, no_capture=REPLAYS.get(str(compile), ""))

    def pytorch_tcn(self) -> Competitor:
        """The causal convolution of the package pytorch-tcn, where it is installed; it pads by itself."""

        def make() -> Work:
            try:
                module = importlib.import_module("pytorch_tcn")
            except ImportError:
                raise Unavailable("pytorch-tcn is not installed") from None
            conv = functools.partial(module.TemporalConv1d, padding_mode="replicate")
            return self._conv1d(Conv1dStack(self.model(self.dtype), conv, lambda h, dilation: h))

        return Competitor("pytorch-tcn", make, self.dtype)

    def _conv1d(self, stack: Conv1dStack, compile: Compile = False) -> Work:
        weights = [p for p in stack.parameters() if p.dim() == 3]
        call = compiled(stack, compile)
        return self._work(call, stack.parameters(), lambda: map(grad, weights), lambda h: h.transpose(1, 2))

    def convwave(self, name: str, backend: str = "eager", precision: str = "auto") -> Competitor:
        """This library; `precision` of float32 products is the kernels', "auto" the same as everybody's."""
        return Competitor(name, lambda: self._convwave(self.dtype, backend, precision), self.dtype)

    def _convwave(self, dtype: torch.dtype, backend: str = "eager", precision: str = "auto") -> Work:
        need(backend)
        model = self.model(dtype, backend=backend, precision=precision)

        def call(h: Tensor) -> Tensor:
            return model.features(h.view(self.positions, -1), self.graph).view(self.shape)

        weights = [block.conv.weight for block in model.layers]
        parameters = [p for block in model.layers for p in block.parameters()]
        return self._work(call, parameters, lambda: map(grad, weights), lambda h: h, dtype)

    def _work(
        self,
        call: Callable[[Tensor], Tensor],
        parameters: Iterable[Tensor],
        gradients: Callable[[], Iterable[Tensor]],
        layout: Callable[[Tensor], Tensor],  # to (B, T, C) and back
        dtype: torch.dtype | None = None,
    ) -> Work:
        x, gradient = (layout(t.to(dtype or self.dtype)).contiguous() for t in (self.x, self.gradient))
        leaf = x.clone().requires_grad_(self.training)
        return work_of(
            lambda: call(leaf),
            self.training,
            lambda out: {"h": layout(out)},
            [leaf, *parameters],
            lambda: {"x": layout(grad(leaf)), **by_level(gradients())},
            gradient,
        )
