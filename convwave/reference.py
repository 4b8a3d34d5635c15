"""The post's three networks over windows, from scratch on plain tensors: the oracle that everything else must equal.

The classes follow the post's own: parameters are tensors in lists, layers are callables, and there is no module
system. A network reads windows (B, block_size) of token ids and returns logits (B, V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convwave.data.packing import Packed


class Linear:
    """x @ weight + bias; weight is (fan_in, fan_out), normal over the square root of the fan-in."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool, generator: torch.Generator) -> None:
        self.weight = torch.randn((fan_in, fan_out), generator=generator, device="cpu") / fan_in**0.5
        self.bias = torch.zeros(fan_out, device="cpu") if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return out if self.bias is None else out + self.bias

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class BatchNorm1d:
    """Normalises over every dimension but the last.

    The post normalises with the unbiased variance, as torch.var computes it; ``unbiased=False`` normalises with the
    biased one, as torch.nn.BatchNorm1d does. Both track the unbiased one.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1, unbiased: bool = True) -> None:
        self.eps, self.momentum, self.unbiased = eps, momentum, unbiased
        self.training = True
        self.gamma, self.beta = torch.ones(dim, device="cpu"), torch.zeros(dim, device="cpu")
        self.running_mean, self.running_var = torch.zeros(dim, device="cpu"), torch.ones(dim, device="cpu")

    def __call__(self, x: Tensor) -> Tensor:
        if self.training:
            dims = tuple(range(x.ndim - 1))
            mean, var = x.mean(dims), x.var(dims)
            with torch.no_grad():
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
            if not self.unbiased:
                var = x.var(dims, correction=0)
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * ((x - mean) / torch.sqrt(var + self.eps)) + self.beta

    def parameters(self) -> list[Tensor]:
        return [self.gamma, self.beta]


class Tanh:
    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def parameters(self) -> list[Tensor]:
        return []


class Embedding:
    """(..) token ids -> (.., n_embd)."""

    def __init__(self, num_embeddings: int, n_embd: int, init: Callable[..., Tensor], generator: torch.Generator):
        self.weight = init((num_embeddings, n_embd), generator=generator, device="cpu")

    def __call__(self, ids: Tensor) -> Tensor:
        return self.weight[ids]

    def parameters(self) -> list[Tensor]:
        return [self.weight]


class Flatten:
    """(B, T, C) -> (B, T * C)."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def parameters(self) -> list[Tensor]:
        return []


class FlattenConsecutive:
    """(B, T, C) -> (B, T // n, n * C), joining n neighbours; (B, n * C) when that leaves one."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        return x.view(B, T // self.n, self.n * C) if self.n < T else x.view(B, self.n * C)

    def parameters(self) -> list[Tensor]:
        return []


Layer = Linear | BatchNorm1d | Tanh | Embedding | Flatten | FlattenConsecutive


class Sequential:
    """Layers one after another.

    Attributes:
        factors: how many neighbours each flattening joins, from the bottom up: (2, 2, 2), or (8,) for a flat one.
        block_size: tokens of a window.
    """

    def __init__(self, layers: list[Layer], factors: tuple[int, ...]) -> None:
        self.layers = layers
        self.factors = factors
        self.block_size = math.prod(factors)
        for p in self.parameters():
            p.requires_grad_(True)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer.parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def norms(self) -> Iterator[BatchNorm1d]:
        return (layer for layer in self.layers if isinstance(layer, BatchNorm1d))

    def train(self, mode: bool = True) -> Sequential:
        for norm in self.norms():
            norm.training = mode
        return self

    def eval(self) -> Sequential:
        return self.train(False)

    def to(self, target: torch.dtype | torch.device | str) -> Sequential:
        """Convert every parameter and running statistic in place."""
        for layer in self.layers:
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, name, value.detach().to(target).requires_grad_(value.requires_grad))
        return self


def MLP(
    vocab_size: int = 27,
    n_embd: int = 10,
    n_hidden: int = 200,
    block_size: int = 3,
    *,
    uniform_embedding: bool = False,
    generator: torch.Generator | None = None,
) -> Sequential:
    """One hidden layer over the concatenated embeddings of the last `block_size` tokens.

    Args:
        uniform_embedding: draw the embedding from [0, 1), as the post's first listing does, instead of a normal.
        generator: source of the initial weights; default: seeded with 42, as in the post.
    """
    g = generator or torch.Generator().manual_seed(42)
    layers: list[Layer] = [
        Embedding(vocab_size, n_embd, torch.rand if uniform_embedding else torch.randn, g),
        Flatten(),
        Linear(n_embd * block_size, n_hidden, False, g),
        BatchNorm1d(n_hidden),
        Tanh(),
        _head(n_hidden, vocab_size, g),
    ]
    return Sequential(layers, (block_size,))


def HierarchicalMLP(
    vocab_size: int = 27,
    n_embd: int = 10,
    n_hidden: int | Sequence[int] = 68,
    levels: int = 3,
    *,
    factors: tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> Sequential:
    """The post's last network: join neighbours, Linear, BatchNorm, tanh, level by level.

    Args:
        n_hidden: width of every level, or one width per level.
        levels: number of pairwise levels; windows are ``2 ** levels`` tokens wide.
        factors: neighbours joined at each level instead of ``levels`` times 2.
        generator: source of the initial weights; default: seeded with 42, as in the post.
    """
    g = generator or torch.Generator().manual_seed(42)
    factors = factors or (2,) * levels
    layers: list[Layer] = [Embedding(vocab_size, n_embd, torch.randn, g)]
    widths = [n_embd, *([n_hidden] * len(factors) if isinstance(n_hidden, int) else n_hidden)]
    for factor, below, width in zip(factors, widths[:-1], widths[1:], strict=True):
        layers += [FlattenConsecutive(factor), Linear(below * factor, width, False, g), BatchNorm1d(width), Tanh()]
    layers.append(_head(widths[-1], vocab_size, g))
    return Sequential(layers, factors)


def _head(n_hidden: int, vocab_size: int, generator: torch.Generator) -> Linear:
    head = Linear(n_hidden, vocab_size, True, generator)
    head.weight *= 0.1  # start near-uniform
    return head


class Windows(NamedTuple):
    """Every window of a text and what follows it."""

    inputs: Tensor  # (N, block_size) int64
    targets: Tensor  # (N,) int64


def build_windows(packed: Packed, block_size: int) -> Windows:
    """Slide a window over every word, filled with token 0 on the left; row n is packed position n."""
    lengths = packed.cu_seqlens.diff().tolist()
    windows = []
    for tokens in packed.tokens.split(lengths):
        padded = F.pad(tokens, (block_size - 1, 0))
        windows.append(padded.unfold(0, block_size, 1))
    return Windows(torch.cat(windows), packed.targets)


@torch.no_grad()
def split_loss(model: Sequential, windows: Windows, chunk: int = 65536) -> float:
    """Mean cross-entropy in nats in evaluation mode, over chunks of windows to bound the memory."""
    training = [norm.training for norm in model.norms()]
    model.eval()
    total = 0.0
    for x, y in zip(windows.inputs.split(chunk), windows.targets.split(chunk), strict=True):
        total += float(F.cross_entropy(model(x), y, reduction="sum"))
    for norm, mode in zip(model.norms(), training, strict=True):
        norm.training = mode
    return total / len(windows.targets)


def sgd_step(model: Sequential, x: Tensor, y: Tensor, lr: float) -> float:
    """One step of the post's training loop; returns the loss before it."""
    loss = F.cross_entropy(model(x), y)
    for p in model.parameters():
        p.grad = None
    loss.backward()
    for p in model.parameters():
        assert p.grad is not None
        p.data += -lr * p.grad
    return loss.item()
