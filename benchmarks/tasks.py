"""Who is measured: the windowed MLP, the convolution over its three graphs, and what one would write with torch.nn.

A task makes competitors by name: what runs, then after a comma how it runs. All of one task compute the same function:

- *the network* over packed names: embedding, levels, head, cross-entropy. The windowed MLP is made of torch.nn's own
  modules, whose BatchNorm is one fused operator: a faster baseline than the post's own classes, which are here too.
- *the stack* over full sequences of one length: L levels of width C, BatchNorm over positions, and at the left edge the
  first position repeated. Any library's convolution can compute it, so this is where peers compete.

"compiled" is torch.compile with static shapes, "max-autotune" its mode of that name, which on CUDA replays CUDA graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from benchmarks import peers
from benchmarks.harness import Results, Unavailable, Work, why

MAX_AUTOTUNE = "max-autotune"
REPLAYS = {MAX_AUTOTUNE: "replays CUDA graphs already", "graph built each step": "copies from the host in every run"}
BUILD = {"windowed graph": cw.windowed_graph, "dense": cw.dense_graph, "distinct": cw.distinct_graph}
Gradients = Callable[[], Iterable[Tensor]]


def compiled(function: Callable[..., Any], how: str = "compiled") -> Callable[..., Any]:
    """What torch.compile makes of a function, if that is how it is to run; raises `Unavailable` without a compiler."""
    if how not in ("compiled", MAX_AUTOTUNE):
        return function
    if _compiler_is_missing():
        raise Unavailable(f"torch.compile: {_compiler_is_missing()}")
    return torch.compile(function, dynamic=False, mode=None if how == "compiled" else how)


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
    """Raise `Unavailable` where a backend is missing."""
    if backend not in cw.available_backends():
        raise Unavailable(f"backend {backend!r} is not available here")


def copied(model: cw.ConvWave, like: Tensor, training: bool, **changes: Any) -> cw.ConvWave:
    """A network with the same weights, of the dtype and on the device of a tensor."""
    found = cw.ConvWave(**model.config() | {"backend": "eager"} | changes)
    found.load_state_dict(model.state_dict())
    return found.to(like.device, like.dtype).train(training)


def inference(forward: Callable[[], Tensor], show: Callable[[Tensor], Results]) -> Work:
    """Forward without gradients; `show` names the result."""
    run = torch.no_grad()(forward)
    return Work(run, lambda: show(run()))


def training_step(
    forward: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    show: Callable[[Tensor], Results],
    gradients: Gradients,
    start: Tensor | None = None,
) -> Work:
    """Forward, and backward from the gradient `start`; the result is what `show` names, and the gradients."""
    trained = list(parameters)

    def run() -> Tensor:
        for p in trained:
            p.grad = None
        out = forward()
        out.backward(start)
        return out

    return Work(run, lambda: {**show(run().detach()), **numbered(gradients())}, trained)


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def numbered(gradients: Iterable[Tensor]) -> Results:
    return {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


class Network:
    """The task: a network over packed words.

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
        result = self._over(self._copy(model or self.model, torch.float64), graph.to(self.device)).result()
        return result if self.training else {"logits": result["logits"][-last:]}

    def make(self, provider: str) -> Work:
        """Of "windowed MLP", "the post's own classes", "padded Conv1d", "windowed graph", "dense" and "distinct".

        They may run "compiled", by "max-autotune", the convolution by "triton" or with its "graph built each step".
        """
        name, _, how = provider.partition(", ")
        makers = {"windowed MLP": self._torch, "the post's own classes": self._post, "padded Conv1d": self._padded}
        work = makers.get(name, partial(self._convolution, name))(how)
        return replace(work, no_capture=REPLAYS.get(how, ""))

    def _torch(self, how: str, dtype: torch.dtype = torch.float32) -> Work:
        mlp = cw.to_torch(self.model).to(self.device, dtype).train(self.training)
        weights = [module.weight for module in mlp if isinstance(module, nn.Embedding | nn.Linear)]
        work = self._windows(compiled(mlp, how), mlp.parameters(), lambda: map(grad, weights))
        expected = None if self.windows == self.positions else self.expected(last=self.windows)
        exact = lambda: self._torch("", torch.float64).result()  # noqa: E731
        return replace(work, exact=exact, positions=self.windows, expected=expected)

    def _post(self, how: str) -> Work:
        """With the post's unbiased variance, which is another function."""
        model = self._copy(self.model)
        for block in model.layers:
            block.norm.unbiased = True
        mlp = cw.to_windowed(model).to(self.device).train(self.training)
        linear = [layer.weight for layer in mlp.layers if isinstance(layer, cw.reference.Linear)]
        parameters = list(mlp.parameters())
        work = self._windows(mlp, parameters, lambda: [grad(parameters[0]), *(grad(w).T for w in linear)])
        return replace(work, expected=self.expected(model))

    def _windows(self, call: Callable[[Tensor], Tensor], parameters: Iterable[Tensor], gradients: Gradients) -> Work:
        windows = cw.reference.build_windows(self.packed, self.model.context)
        inputs, targets = (t[-self.windows :].to(self.device) for t in windows)
        loss = partial(F.cross_entropy, target=targets)
        return self._work(lambda: call(inputs), loss, parameters, gradients, lambda out: out)

    def _convolution(self, kind: str, how: str) -> Work:
        need("triton" if how == "triton" else "eager")
        model = self._copy(self.model, backend="triton" if how == "triton" else "eager")
        build = lambda: BUILD[kind](self.packed, factors=model.factors).to(self.device)  # noqa: E731
        work = self._over(model, build(), how)
        return replace(work, run=lambda: self._over(model, build()).run()) if how == "graph built each step" else work

    def _over(self, model: cw.ConvWave, graph: cw.Graph, how: str = "") -> Work:
        def gradients() -> Iterable[Tensor]:
            levels = (grad(block.conv.weight).transpose(1, 2).flatten(1) for block in model.layers)
            return [grad(model.embedding.weight), *levels, grad(model.head.weight)]

        def show(out: Tensor) -> Tensor:
            return out if graph.inverse is None else out[graph.inverse]

        call = compiled(lambda: model(graph), how)
        return self._work(call, lambda out: cw.loss(out, graph), model.parameters(), gradients, show)

    def _padded(self, how: str) -> Work:
        """nn.Conv1d over the rectangle of all names, filled up on the right."""
        if self.training:
            raise Unavailable("another function: the filling would count in BatchNorm's statistics")
        tokens, inside = (t.to(self.device) for t in rectangle(self.packed))
        model = self._copy(self.model)
        call = compiled(Conv1dStack(model), how)
        forward = lambda: model.head(call(model.embedding(tokens).transpose(1, 2)).transpose(1, 2))  # noqa: E731
        return inference(forward, lambda out: {"logits": out[inside]})

    def _work(
        self,
        logits: Callable[[], Tensor],
        loss: Callable[[Tensor], Tensor],
        parameters: Iterable[Tensor],
        gradients: Gradients,
        show: Callable[[Tensor], Tensor],
    ) -> Work:
        if not self.training:
            return inference(logits, lambda out: {"logits": show(out)})
        return training_step(lambda: loss(logits()), parameters, lambda out: {"loss": out}, gradients)

    def _copy(self, model: cw.ConvWave, dtype: torch.dtype = torch.float32, backend: str = "eager") -> cw.ConvWave:
        return copied(model, torch.empty(0, dtype=dtype, device=self.device), self.training, backend=backend)


def rectangle(packed: cw.Packed) -> tuple[Tensor, Tensor]:
    """(B, T) tokens of all words, filled up with 0 on the right, and the (B, T) mask of those that are no filling."""
    lengths = packed.cu_seqlens.diff()
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.int64)
    tokens[inside] = packed.tokens
    return tokens, inside


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
        return self._convwave("eager, gathered", torch.float64).result()

    def model(self, dtype: torch.dtype, **changes: Any) -> cw.ConvWave:
        """The network in a dtype, its weights rounded to the task's dtype first."""
        return copied(self._model, self.x.to(dtype), self.training, **changes)

    def make(self, provider: str) -> Work:
        """Of "two shifted matmuls", "Conv1d + BatchNorm1d + tanh", "pytorch-tcn", "JAX", "ONNX Runtime" and "convwave".

        They may run "compiled" or by "max-autotune", Conv1d by cudnn's "deterministic" algorithms, convwave by "eager"
        (over sequences), "eager, gathered" (over a graph), "triton" or "triton, ieee".
        """
        name, _, how = provider.partition(", ")
        makers = {
            "two shifted matmuls": self._matmul,
            "convwave": self._convwave,
            "pytorch-tcn": self._pytorch_tcn,
            "JAX": self._jax,
            "ONNX Runtime": self._onnx,
        }
        return replace(makers.get(name, self._conv1d)(how), dtype=self.dtype, no_capture=REPLAYS.get(how, ""))

    def _matmul(self, how: str, dtype: torch.dtype | None = None) -> Work:
        stack = ShiftedMatmulStack(self.model(dtype or self.dtype))

        def gradients() -> list[Tensor]:
            return [torch.stack([grad(a).T, grad(b).T], 2) for a, b in zip(stack.older, stack.newer, strict=True)]

        work = self._work(compiled(stack, how), stack, gradients, dtype or self.dtype)
        return replace(work, exact=lambda: self._matmul("", torch.float64).result())

    def _conv1d(self, how: str, **other: Any) -> Work:
        stack, cudnn = Conv1dStack(self.model(self.dtype), **other), torch.backends.cudnn
        weights = [p for p in stack.parameters() if p.dim() == 3]
        call = compiled(stack, how)
        work = self._work(call, stack, lambda: map(grad, weights), self.dtype, lambda h: h.transpose(1, 2))

        def run() -> None:
            before, cudnn.deterministic = cudnn.deterministic, True
            try:
                work.run()
            finally:
                cudnn.deterministic = before

        return replace(work, run=run) if how == "deterministic" else work

    def _levels(self) -> list[list[Tensor]]:
        blocks = self._model.layers
        return [[b.conv.weight, *b.norm.parameters(), b.norm.running_mean, b.norm.running_var] for b in blocks]  # type: ignore[list-item]

    def _jax(self, how: str) -> Work:
        dilations, eps = [b.dilation for b in self._model.layers], self._model.layers[0].norm.eps
        return peers.jax_stack(self.x, self.gradient, self._levels(), dilations, eps, self.training)

    def _onnx(self, how: str) -> Work:
        if self.training:
            raise Unavailable("ONNX Runtime's package does not train")
        dilations, eps = [b.dilation for b in self._model.layers], self._model.layers[0].norm.eps
        return peers.onnx_stack(self.x, self._levels(), dilations, eps)

    def _pytorch_tcn(self, how: str) -> Work:
        """The causal convolution of the package pytorch-tcn, where it is installed; it pads by itself."""
        module = peers.module_of("pytorch_tcn", "pytorch-tcn")
        return self._conv1d(how, conv=partial(module.TemporalConv1d, padding_mode="replicate"), pad=lambda h, _: h)

    def _convwave(self, how: str, dtype: torch.dtype | None = None) -> Work:
        """This library; the precision of float32 products is the kernels', "auto" the same as everybody's."""
        backend, _, precision = how.partition(", ")
        need(backend)
        precision = precision if backend == "triton" and precision else "auto"
        model = self.model(dtype or self.dtype, backend=backend, precision=precision)
        call = lambda h: model.features(h.view(self.positions, -1), self.graph).view(self.shape)  # noqa: E731
        if how == "eager":
            call = cw.nn.ConvStack([self.shape[2]] * (model.levels + 1), backend=backend, unbiased=False)
            call.blocks = model.blocks
            call.train(self.training)
        weights = [block.conv.weight for block in model.layers]
        return self._work(call, model, lambda: map(grad, weights), dtype or self.dtype)

    def _work(
        self,
        call: Callable[[Tensor], Tensor],
        module: nn.Module,
        gradients: Gradients,
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = lambda h: h,  # from (B, T, C) and back
    ) -> Work:
        x, start = (layout(t.to(dtype)).contiguous() for t in (self.x, self.gradient))
        leaf = x.clone().requires_grad_(self.training)
        forward, show = lambda: call(leaf), lambda out: {"h": layout(out)}
        if not self.training:
            return inference(forward, show)
        with_x = lambda: [layout(grad(leaf)), *gradients()]  # noqa: E731
        return training_step(forward, [leaf, *module.parameters()], show, with_x, start)
