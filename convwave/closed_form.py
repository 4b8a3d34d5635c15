"""A training step in closed form: loss, gradients, Muon and Adam of a `ConvWave` without autograd, for a CPU.

The same function as `ConvWave` in training mode, rearranged so that little is left to do:

- **Multiply first, gather after.** A distinct graph has fewer rows below than above: a level multiplies each row below
  by both taps at once, then adds up rows of the products. Level 0 multiplies the V embeddings and nothing else.
- **A logistic for the tanh.** ``tanh(y) = 2 s - 1`` with ``s = sigmoid(2 y)``, and torch's sigmoid takes a sixth of the
  time of its tanh (0.4 and 2.5 ns an element on one core of an AMD EPYC). Only s is ever computed: in
  ``W h = (2 W) s - W 1`` the constant is what the next BatchNorm subtracts anyway, and the head's goes into its bias.
- **BatchNorm's scale goes into weights.** The gradient in front of the norm is ``k (..)`` with ``k = gamma rstd`` per
  channel, so k multiplies the small matrices that it meets next, not the rows.
- **No fresh memory.** Everything of N rows lives in buffers that are kept: on a machine on which a page fault costs
  1.5 us, a fresh (1890, 136) product costs twice a product into old memory.

Shapes: N rows of a level, C channels below, H channels, k taps, V tokens, V' = V rounded up to whole vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convwave.batches import ContextSampler
from convwave.data import Packed
from convwave.eager import variance_divisor
from convwave.graph import Graph
from convwave.nn import ConvWave
from convwave.optim import orthogonalize

_LANES = 16  # float32 in a vector register; a product with 32 columns takes 0.6 of the time of one with 27
_NEVER = 60.0  # how far below the mean of the tokens' logits; e ** -60 is no denormal number, which are slow

Ranges = tuple[tuple[int, int], ...]  # of each tap


class Batch(NamedTuple):
    """What a step reads of a graph.

    Attributes:
        taps: per level, (k, N) int64, what each tap reads: rows of the tap's range of the level below.
        ranges: per level and tap, the first row below that the tap reads, and one past the last; at level 0 of tokens.
        weights: per level, (N,) how many windows contain the row.
        totals: per level, the sum of the weights.
        targets: (N, V') how often each top row is followed by each token; 0 in the columns from V on.
    """

    taps: tuple[Tensor, ...]
    ranges: tuple[Ranges, ...]
    weights: tuple[Tensor, ...]
    totals: tuple[float, ...]
    targets: Tensor


def padded(vocab_size: int) -> int:
    """V': the columns of logits and targets."""
    return -(-vocab_size // _LANES) * _LANES


def fold_head(weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> None:
    """The head as it is applied to logistics, with V' rows: those that are no tokens have probabilities below e^-60.

    Args:
        weight, bias: (V, H), (V,).
        out_weight, out_bias: (V', H), (V',) to be written.
    """
    V = bias.numel()
    torch.mul(weight, 2, out=out_weight[:V])
    torch.sub(bias, weight.sum(1), out=out_bias[:V])
    out_weight[V:] = out_weight[:V].mean(0)
    out_bias[V:] = out_bias[:V].mean() - _NEVER


def graph_batch(graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Any graph as a batch, with weights of the parameters' dtype."""
    taps = (graph.tokens[graph.taps[0]], *graph.taps[1:])
    below = (vocab_size, *(w.numel() for w in graph.weights[:-1]))
    ranges = tuple(((0, rows),) * factor for rows, factor in zip(below, graph.factors, strict=True))
    weights = tuple(w.to(dtype) for w in graph.weights)
    return Batch(taps, ranges, weights, graph.totals, _target_counts(graph, vocab_size, dtype))


def _target_counts(graph: Graph, vocab_size: int, dtype: torch.dtype) -> Tensor:
    columns = padded(vocab_size)
    rows = torch.arange(graph.num_rows) if graph.target_rows is None else graph.target_rows
    counts = torch.zeros(graph.num_rows * columns, dtype=torch.float64)
    return counts.index_add_(0, rows * columns + graph.target_ids, graph.target_counts).to(dtype).view(-1, columns)


class Parts:
    """Cuts parts out of the distinct graph of a whole text.

    `torch.unique` would find the rows that a part needs by sorting; marking them takes a third of the time. Rows are
    put in an order in which each tap reads one range of them: the oldest tap needs few (410 of the 1,804 4-grams of a
    batch, 4,861 of the 22,135 of names.txt), because it mostly reads beginnings of names.

    Args:
        graph: a distinct graph.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(self, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        self.graph, self.vocab_size, self.dtype = graph, vocab_size, dtype
        sizes = [weights.numel() for weights in graph.weights]
        self._mark = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
        self._local = [torch.zeros(n, dtype=torch.int64) for n in sizes]
        self._count = torch.arange(max(sizes))
        self._taps = [graph.tokens[graph.taps[0]], *graph.taps[1:]]

    def part(self, kept: Tensor, weights: Tensor, total: float, targets: Tensor) -> Batch:
        """The batch of some distinct top rows (N,) with weights (N,) that sum to `total`, and targets (N, V')."""
        factors = self.graph.factors
        taps: list[Tensor] = []
        ranges: list[Ranges] = []
        all_weights, totals = [weights], [total]
        for level in range(self.graph.levels - 1, 0, -1):
            read = self._taps[level].index_select(1, kept)
            kept, of_taps = self._ordered(level - 1, read)
            local = self.number(level - 1, kept, read.view(-1))
            share = all_weights[0].repeat(factors[level])
            all_weights.insert(0, torch.bincount(local, share, kept.numel()).to(self.dtype))
            totals.insert(0, totals[0] * factors[level])
            local = local.view_as(read)
            for tap, (begin, _) in zip(local, of_taps, strict=True):
                tap.sub_(begin)
            taps.insert(0, local)
            ranges.insert(0, of_taps)
        taps.insert(0, self._taps[0].index_select(1, kept))
        ranges.insert(0, ((0, self.vocab_size),) * factors[0])
        return Batch(tuple(taps), tuple(ranges), tuple(all_weights), tuple(totals), targets)

    def number(self, level: int, kept: Tensor, rows: Tensor) -> Tensor:
        """Where among the distinct rows `kept` of a level each of `rows` is."""
        local = self._local[level]
        local[kept] = self._count[: kept.numel()]
        return local.index_select(0, rows)

    def distinct(self, level: int, rows: Tensor) -> Tensor:
        """The distinct ones of some rows of a level."""
        mark = self._mark[level]
        mark[rows] = 1
        kept = mark.nonzero().view(-1)
        mark[kept] = 0
        return kept

    def _ordered(self, level: int, taps: Tensor) -> tuple[Tensor, Ranges]:
        """The distinct rows of a level that taps (k, N) read, and the range of each tap.

        First what only a tap between the oldest and the newest reads, then what only the oldest reads, what both read,
        what only the newest reads; a tap between them ranges over all.
        """
        mark = self._mark[level]
        between = taps[1:-1].flatten()
        if between.numel():
            mark[between] = 4
        mark[taps[0]] = mark[taps[0]] | 1
        mark[taps[-1]] = mark[taps[-1]] | 2
        ends = mark & 3 if between.numel() else mark
        parts = [(ends == code).nonzero().view(-1) for code in (1, 3, 2)]
        if between.numel():
            parts.insert(0, (mark == 4).nonzero().view(-1))
        kept = torch.cat(parts)
        mark[kept] = 0
        newest, both, oldest = (part.numel() for part in (parts[-1], parts[-2], parts[-3]))
        n = kept.numel()
        middle = ((0, n),) * (taps.shape[0] - 2)
        return kept, ((n - newest - both - oldest, n - newest), *middle, (n - newest - both, n))


class NameBatches(Parts):
    """Batches of whole names.

    Args:
        packed: all names.
        graph: their distinct graph.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(self, packed: Packed, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32) -> None:
        if graph.inverse is None:
            raise ValueError(f"graph: expected a distinct graph, got a {graph.kind} one")
        super().__init__(graph, vocab_size, dtype)
        self._packed, self._rows = packed, graph.inverse

    def __call__(self, words: Tensor) -> Batch:
        """The batch of the words with these indices (int64), each once for every time that it is named."""
        positions, _ = self._packed.positions(words)
        top, columns = self.graph.levels - 1, padded(self.vocab_size)
        rows = self._rows.index_select(0, positions)
        kept = self.distinct(top, rows)
        rows = self.number(top, kept, rows)
        weights = torch.bincount(rows, minlength=kept.numel()).to(self.dtype)
        places = rows * columns + self._packed.targets.index_select(0, positions)
        targets = torch.bincount(places, minlength=kept.numel() * columns).to(self.dtype)
        return self.part(kept, weights, float(positions.numel()), targets.view(-1, columns))


class ContextBatches(Parts):
    """Batches of contexts.

    Args:
        sampler: draws top rows of the graph.
        graph: the distinct graph of all names.
        vocab_size: V.
        dtype: of the parameters.
    """

    def __init__(
        self, sampler: ContextSampler, graph: Graph, vocab_size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(graph, vocab_size, dtype)
        self._sampler = sampler
        self._targets, self._weights = _target_counts(graph, vocab_size, dtype), graph.weights[-1].to(dtype)

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        kept, scale = self._sampler(step)
        scale = scale.to(self.dtype)
        weights = self._weights.index_select(0, kept).mul_(scale)
        targets = self._targets.index_select(0, kept).mul_(scale[:, None])
        return self.part(kept, weights, float(weights.sum()), targets)


class Buffers:
    """Memory that is kept from step to step, by name."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """(rows, columns) of whatever was last in the buffer."""
        size = rows * columns
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size + size // 4)
        return flat[:size].view(rows, columns)


class ClosedForm:
    """Parameters and gradients of a network, and the step.

    Args:
        model: a `ConvWave` with ``statistics="windows"``, in float32 or float64; its parameters are copied.

    Attributes:
        matrices: per level, (k, C, H): `conv.weight` with taps first and the output channel last.
        vectors: all other parameters by their names in the state dict, views into `flat`.
        matrix_gradients, vector_gradients, flat_gradient: the same for the gradients of the last `gradients`.
    """

    def __init__(self, model: ConvWave) -> None:
        if model.statistics != "windows":
            raise ValueError(f"model: expected statistics='windows', got {model.statistics!r}")
        state = {name: p.detach() for name, p in model.named_parameters()}
        self.levels, self.factors, self.vocab_size = model.levels, model.factors, model.vocab_size
        self._unbiased = [norm.norm.unbiased for norm in model.layers]
        self._eps = [norm.norm.eps for norm in model.layers]
        self._matrix_names = [f"blocks.{level}.conv.weight" for level in range(self.levels)]
        self.matrices = [state.pop(name).permute(2, 1, 0).contiguous() for name in self._matrix_names]
        self.matrix_gradients = [torch.zeros_like(m) for m in self.matrices]
        self.flat = torch.cat([p.flatten() for p in state.values()])
        self.flat_gradient = torch.zeros_like(self.flat)
        self.vectors, self.vector_gradients = {}, {}
        start = 0
        for name, p in state.items():
            stop = start + p.numel()
            self.vectors[name] = self.flat[start:stop].view_as(p)
            self.vector_gradients[name] = self.flat_gradient[start:stop].view_as(p)
            start = stop
        columns = padded(self.vocab_size)
        self._head_weight = self.flat.new_empty(columns, self.vectors["head.weight"].shape[1])
        self._head_bias = self.flat.new_empty(columns)
        self._buffer = Buffers(self.flat)

    @torch.no_grad()
    def load(self, model: ConvWave) -> None:
        """Take the parameters of another network of the same shape."""
        for name, value in self.parameters().items():
            value.copy_(model.get_parameter(name))

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter under its name and in its layout in the state dict."""
        conv = {n: m.permute(2, 1, 0) for n, m in zip(self._matrix_names, self.matrices, strict=True)}
        return conv | self.vectors

    def gradients_by_name(self) -> dict[str, Tensor]:
        """Every gradient under its parameter's name and in its layout."""
        conv = {n: m.permute(2, 1, 0) for n, m in zip(self._matrix_names, self.matrix_gradients, strict=True)}
        return conv | self.vector_gradients

    @torch.no_grad()
    def gradients(self, batch: Batch) -> Tensor:
        """Loss of a batch, () of the parameters' dtype; leaves its gradients in the gradient attributes.

        Raises:
            ValueError: too few windows for a variance.
        """
        buffer, v, g = self._buffer, self.vectors, self.vector_gradients
        x = v["embedding.weight"]  # then s of the level below
        inputs, deviations, weighted, rstds, scales = [], [], [], [], []
        for level in range(self.levels):
            taps, w, n = batch.taps[level], batch.weights[level], batch.totals[level]
            N, H = taps.shape[1], self.matrices[level].shape[2]
            z, scratch = buffer(f"z{level}", N, H), buffer("scratch", N, H)
            matrices = 2 * self.matrices[level] if level else self.matrices[level]
            for j, (begin, end) in enumerate(batch.ranges[level]):
                products = torch.mm(x[begin:end], matrices[j], out=buffer("products", end - begin, H))
                gathered = torch.index_select(products, 0, taps[j], out=scratch if j else z)
                if j:
                    z.add_(gathered)
            mean = torch.mul(z, w[:, None], out=scratch).sum(0).div_(n)
            z.sub_(mean)
            wz = torch.mul(z, w[:, None], out=buffer(f"wz{level}", N, H))
            var = torch.mul(wz, z, out=scratch).sum(0).div_(variance_divisor(n, self._unbiased[level]))
            rstd = var.add_(self._eps[level]).rsqrt_()
            scale = v[f"blocks.{level}.norm.weight"] * rstd
            inputs.append(x)
            deviations.append(z)
            weighted.append(wz)
            rstds.append(rstd)
            scales.append(scale)
            x = buffer(f"s{level}", N, H)
            torch.addcmul(2 * v[f"blocks.{level}.norm.bias"], z, 2 * scale, out=x).sigmoid_()

        loss, dh = self._head(x, batch)
        for level in range(self.levels - 1, -1, -1):
            taps, w, n = batch.taps[level], batch.weights[level], batch.totals[level]
            H = self.matrices[level].shape[2]
            z, wz, rstd, scale, below = deviations[level], weighted[level], rstds[level], scales[level], inputs[level]
            # d tanh = 4 s (1 - s), and the 4 is in dh
            gy = torch.ops.aten.sigmoid_backward.grad_input(dh, x, grad_input=dh)
            dbeta = torch.sum(gy, 0, out=g[f"blocks.{level}.norm.bias"])
            dgamma = torch.mul(gy, z, out=z).sum(0).mul_(rstd)
            g[f"blocks.{level}.norm.weight"].copy_(dgamma)
            correction = dgamma.mul_(rstd).div_(-variance_divisor(n, self._unbiased[level]))
            gy.addcmul_(wz, correction).addr_(w, dbeta, alpha=-1 / n)  # dz = scale * gy
            dx = g["embedding.weight"] if level == 0 else buffer(f"dh{level % 2}", *below.shape)
            dx.zero_()
            back = self.matrices[level] * (4 * scale if level else scale)
            gradient = self.matrix_gradients[level]
            for j, (begin, end) in enumerate(batch.ranges[level]):
                products = buffer("products", end - begin, H).zero_().index_add_(0, taps[j], gy)
                torch.mm(below[begin:end].T, products, out=gradient[j])
                dx[begin:end].addmm_(products, back[j].T)
            gradient.mul_(2 * scale if level else scale)
            x, dh = below, dx
        return loss

    def _head(self, s: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss, and 4 times its gradient with respect to the top activations, (N, H)."""
        V, columns = self.vocab_size, self._head_bias.numel()
        weight, bias = self.vectors["head.weight"], self.vectors["head.bias"]
        dweight, dbias = self.vector_gradients["head.weight"], self.vector_gradients["head.bias"]
        n, w, N = batch.totals[-1], batch.weights[-1], s.shape[0]
        fold_head(weight, bias, self._head_weight, self._head_bias)
        logits = torch.addmm(self._head_bias, s, self._head_weight.T, out=self._buffer("logits", N, columns))
        logp = torch.log_softmax(logits, 1, out=self._buffer("logp", N, columns))
        loss = torch.mul(batch.targets, logp, out=self._buffer("nll", N, columns)).sum(0).sum().div_(-n)
        p = torch.exp(logp, out=logp)
        p.mul_(w[:, None]).sub_(batch.targets).div_(n)  # now the gradient of the logits
        dbias.copy_(p.sum(0)[:V])
        torch.sub(torch.mm(p.T, s)[:V].mul_(2), dbias[:, None], out=dweight)
        return loss, torch.mm(p, 2 * self._head_weight, out=self._buffer(f"dh{self.levels % 2}", N, s.shape[1]))


class MuonAdam:
    """`optim.Muon` on the matrices and AdamW on all other parameters of a `ClosedForm`, as recipes ask for.

    Args:
        net: whose parameters to move.
        lr, adam_lr: learning rates.
        momentum: of Muon.
        weight_decay: decoupled, of both.
        betas, eps: of Adam.
        orthogonal_steps: Newton-Schulz steps of Muon.

    Attributes:
        steps: done so far.
        momenta: per matrix, Muon's.
        exp_avg, exp_avg_sq: Adam's, over `ClosedForm.flat`.
    """

    def __init__(
        self,
        net: ClosedForm,
        lr: float,
        adam_lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        orthogonal_steps: int = 5,
        eps: float = 1e-8,
    ) -> None:
        self.net, self.lr, self.adam_lr, self.momentum, self.weight_decay = net, lr, adam_lr, momentum, weight_decay
        self.betas, self.orthogonal_steps, self.eps = betas, orthogonal_steps, eps
        self.steps = 0
        self.momenta = [torch.zeros_like(matrix) for matrix in net.matrices]
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(net.flat), torch.zeros_like(net.flat)

    @torch.no_grad()
    def step(self, rate: float = 1.0) -> None:
        """Move the parameters by the gradients, learning rates multiplied by `rate`."""
        net, lr, adam_lr = self.net, self.lr * rate, self.adam_lr * rate
        for matrix, grad, momentum in zip(net.matrices, net.matrix_gradients, self.momenta, strict=True):
            momentum.lerp_(grad, 1 - self.momentum)
            columns, rows = matrix.numel() // matrix.shape[2], matrix.shape[2]  # of the weight seen as (H, C * k)
            average = grad.lerp_(momentum, self.momentum).view(columns, rows)
            update = orthogonalize(average, self.orthogonal_steps).reshape(matrix.shape)
            matrix.mul_(1 - lr * self.weight_decay).sub_(update, alpha=lr * max(1.0, rows / columns) ** 0.5)
        self.steps += 1
        grad, (beta1, beta2) = net.flat_gradient, self.betas
        self.exp_avg.lerp_(grad, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = self.exp_avg_sq.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(self.eps)
        net.flat.mul_(1 - adam_lr * self.weight_decay)
        net.flat.addcdiv_(self.exp_avg, denominator, value=-adam_lr / (1 - beta1**self.steps))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on besides the parameters."""
        momenta = {f"momentum.{level}": momentum for level, momentum in enumerate(self.momenta)}
        adam = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {"steps": torch.tensor(self.steps), **adam, **momenta}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave.

        Raises:
            KeyError: something is missing.
            RuntimeError: something is of another shape.
        """
        self.steps = int(state["steps"])
        for name, value in self.state().items():
            if name != "steps":
                value.copy_(state[name])
