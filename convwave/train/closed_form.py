"""Tier "cpu": loss, gradients, Muon and Adam of a `ConvWave` in closed form, without autograd.

The same function as `ConvWave` in training mode, rearranged to do less work:

- **Multiply first, then gather.** A distinct graph has fewer rows below than above: a level multiplies each row below
  by each tap's matrix once, then sums rows of the products. Level 0 multiplies only the V embeddings.
- **A logistic instead of the tanh.** ``tanh(y) = 2 s - 1`` with ``s = sigmoid(2 y)``, and torch's sigmoid takes a
  sixth of the time of its tanh (0.4 and 2.5 ns an element on one core of an AMD EPYC). Only s is ever computed: the
  constant in ``W h = (2 W) s - W 1`` is removed by the next BatchNorm anyway; the head's goes into its bias.
- **BatchNorm's scale goes into weights.** The gradient before the norm has a factor ``k = gamma rstd`` per channel,
  which is applied to the small matrices that follow, not to the rows.
- **No fresh memory.** All tensors of N rows are in reused buffers: where a page fault costs 1.5 us, a (1890, 136)
  product into fresh memory takes twice as long as into used memory.

Shapes: N rows of a level, C channels below, H channels, k taps, V tokens, V' = V rounded up to whole vectors.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from convwave.data.batches import Batch, padded
from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave
from convwave.ops.fold import Buffers, fold_head
from convwave.train.config import Config
from convwave.train.optim import ADAM_BETA2, orthogonalize
from convwave.train.setup import (
    check_like,
    convolution,
    network_state,
    prefixed,
    ready,
    restore_network,
    without_prefix,
)
from convwave.train.tiers import Activations, Run, Watch


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
        """Copy the parameters of another network of the same shape."""
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
    def activations(self, batch: Batch) -> list[Activations]:
        """What every level put out in the last `gradients`, which was of this batch."""
        rows = ((level, w, w.numel(), self.matrices[level].shape[2]) for level, w in enumerate(batch.weights))
        return [Activations(self._buffer(f"s{level}", N, H).mul(2).sub_(1), w) for level, w, N, H in rows]

    @torch.no_grad()
    def gradients(self, batch: Batch) -> Tensor:
        """Loss of a batch, () of the parameters' dtype; stores its gradients in the gradient attributes.

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
            var = torch.mul(wz, z, out=scratch).sum(0).div_(_variance_divisor(n, self._unbiased[level]))
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
            correction = dgamma.mul_(rstd).div_(-_variance_divisor(n, self._unbiased[level]))
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


def _variance_divisor(total: float, unbiased: bool) -> float:
    """What a sum of squared deviations is divided by; raises ValueError for too few rows."""
    if total <= unbiased:
        kind = "an unbiased" if unbiased else "a"
        raise ValueError(f"batch: {kind} variance needs a total count above {int(unbiased)}, got {total:g}")
    return total - unbiased


class MuonAdam:
    """`optim.Muon` on the matrices and AdamW on the other parameters of a `ClosedForm`.

    Args:
        net: whose parameters to update.
        lr, adam_lr: learning rates.
        momentum: of Muon.
        weight_decay: decoupled, of both.
        betas, eps: of Adam.
        orthogonal_steps: Newton-Schulz steps of Muon.

    Attributes:
        steps: number of steps done.
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
        betas: tuple[float, float] = (0.9, ADAM_BETA2),
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
        """Update the parameters, with learning rates multiplied by `rate`."""
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
        """Everything that the next step depends on, except the parameters."""
        momenta = {f"momentum.{level}": momentum for level, momentum in enumerate(self.momenta)}
        adam = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {"steps": torch.tensor(self.steps, device="cpu"), **adam, **momenta}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            KeyError: something is missing.
            RuntimeError: a shape differs.
        """
        self.steps = int(state["steps"])
        for name, value in self.state().items():
            if name != "steps":
                check_like(name, state[name], value)
                value.copy_(state[name])


class ClosedFormRun(Run):
    """The same batches and the same step as `autograd.ConvolutionRun`, without autograd."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config, recipe = config, config.recipe
        self.net, self.reader = convolution(config, train, vocabulary)
        self.form = ClosedForm(self.net)
        self.optimizer = MuonAdam(
            self.form,
            recipe.lr,
            recipe.adam_lr,
            recipe.momentum,
            recipe.weight_decay,
            (recipe.adam_beta, ADAM_BETA2),
            recipe.orthogonal_steps,
        )
        self.positions = config.batch

    def step(self, i: int, watch: Watch | None = None) -> float:
        batch = self.reader.batch(i)
        self.positions = self.reader.count(batch.weights[-1].numel(), batch.totals[-1])
        loss = self.form.gradients(batch)
        if watch is not None:
            watch(self.form.gradients_by_name(), self.form.activations(batch))
        self.optimizer.step(self.config.rate(i))
        return loss.item()

    @torch.no_grad()
    def model(self) -> ConvWave:
        values = self.form.parameters()
        for name, parameter in self.net.named_parameters():
            parameter.copy_(values[name])
        return self.net

    def finish(self) -> ConvWave:
        return ready(copy.deepcopy(self.model()), self.reader)

    def state(self) -> dict[str, Tensor]:
        return network_state(self.model(), self.reader, ()) | prefixed("optimizer", self.optimizer.state())

    def restore(self, state: dict[str, Tensor]) -> None:
        restore_network(state, self.net, self.reader, ())
        self.form.load(self.net)
        self.optimizer.load(without_prefix("optimizer", state))

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)
        self.form.load(self.net)
