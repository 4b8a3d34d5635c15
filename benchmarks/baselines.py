"""What a competent user gets without this library: torch.nn on windows with good optimisers, and counts alone.

The networks are the post's in torch's own modules, evaluated window by window. `BASELINES` says how they are trained.
"contexts" reads recipe `sprint`'s batches (our sampler); what is left between it and `sprint` is the convolution, the
tier that computes it, and statistics that weigh their rows.
`kneser_ney` trains nothing: it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convwave as cw
from convwave import reference
from convwave.data.batches import ContextSampler
from convwave.train.recipes import SPRINT

CONTEXT, EMBEDDING, HIDDEN = 8, 10, 68


class Baseline(NamedTuple):
    """A way to train the post's network on windows.

    Attributes:
        title: what it is, in words.
        batch: windows a step, or distinct contexts in the first one.
        lr: of Muon for the matrices; 0 gives them to AdamW too.
        adam_lr, weight_decay: of AdamW; Muon has the same decay.
        beta: first of AdamW.
        warmup: share of the steps in which the rates rise; they fall linearly to 0 in the others.
        contexts: read distinct contexts as `sprint` does, instead of random windows.
    """

    title: str
    steps: int
    batch: int
    lr: float
    adam_lr: float
    weight_decay: float
    beta: float = 0.9
    warmup: float = 0.1
    contexts: bool = False


BASELINES = {
    "muon": Baseline("torch.nn on windows, Muon + AdamW", 350, 4096, 0.25, 0.05, 0.1),
    "adamw": Baseline("torch.nn on windows, AdamW", 3500, 1024, 0.0, 0.02, 0.1),
    "contexts": Baseline(
        "torch.nn on windows, sprint's batches",
        SPRINT.steps,
        SPRINT.batch,
        SPRINT.lr,
        SPRINT.adam_lr,
        SPRINT.weight_decay,
        SPRINT.adam_beta,
        SPRINT.warmup,
        contexts=True,
    ),
}


class Pairs(nn.Module):
    """(M, T, C) -> (M, T / 2, 2 C): neighbours side by side; (M, 2 C) where one pair is left."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 2)).flatten(2)
        return x.squeeze(1) if x.shape[1] == 1 else x


class Norm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` over all dimensions but the last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def network(vocab_size: int) -> nn.Sequential:
    """The post's hierarchical network in torch's modules, with the post's scales at the start."""
    layers: list[nn.Module] = [nn.Embedding(vocab_size, EMBEDDING)]
    for channels in (EMBEDDING, HIDDEN, HIDDEN):
        layers += [Pairs(), nn.Linear(2 * channels, HIDDEN, bias=False), Norm(HIDDEN), nn.Tanh()]
    head = nn.Linear(HIDDEN, vocab_size)
    with torch.no_grad():
        for layer in (*layers, head):
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
        head.weight.mul_(0.1)
        head.bias.zero_()
    return nn.Sequential(*layers, head)


def train(words: Sequence[str], vocabulary: cw.Vocabulary, baseline: Baseline, seed: int) -> nn.Sequential:
    """The network after the last step, in evaluation mode."""
    torch.manual_seed(seed)
    packed = cw.pack(words, vocabulary)
    net = network(len(vocabulary)).train()
    matrices = [layer.weight for layer in list(net)[:-1] if isinstance(layer, nn.Linear)] if baseline.lr else []
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    betas, decay = (baseline.beta, 0.95), baseline.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=baseline.adam_lr, weight_decay=decay, betas=betas, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=baseline.lr, weight_decay=decay, momentum=0.9, ns_steps=3))
    rise = max(baseline.warmup * baseline.steps, 1)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / rise, (baseline.steps - i) / max(baseline.steps - rise, 1), 1)
        )
        for optimizer in optimizers
    ]
    batches = _contexts if baseline.contexts else _windows
    for inputs, targets in batches(packed, len(vocabulary), baseline, seed):
        loss = F.cross_entropy(net(inputs), targets)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return net.eval()


def _windows(packed: cw.Packed, _: int, baseline: Baseline, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows (M, 8) and targets (M,), epoch by epoch in random order."""
    data = reference.build_windows(packed, CONTEXT)
    order = torch.randperm(len(packed))
    begin = 0
    for _ in range(baseline.steps):
        if begin + baseline.batch > len(order):
            order, begin = torch.randperm(len(packed)), 0
        rows = order[begin : begin + baseline.batch]
        begin += baseline.batch
        yield data.inputs[rows], data.targets[rows]


def _contexts(packed: cw.Packed, vocab_size: int, baseline: Baseline, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Distinct windows (M, 8) and what follows each (M, V), weighted so that a mean is the text's."""
    data = reference.build_windows(packed, CONTEXT)
    inputs, rows = torch.unique(data.inputs, dim=0, return_inverse=True)
    counts = torch.bincount(rows * vocab_size + data.targets, minlength=len(inputs) * vocab_size)
    targets = counts.view(-1, vocab_size).float()
    last = round(SPRINT.growth * baseline.batch)
    draw = ContextSampler(targets.sum(1), baseline.batch, last, baseline.steps, SPRINT.context_power, seed)
    for i in range(baseline.steps):
        kept, scale = draw(i)
        chosen = targets[kept] * scale[:, None].float()
        yield inputs[kept], chosen * (len(kept) / chosen.sum())


@torch.no_grad()
def loss(net: nn.Module, words: Sequence[str], vocabulary: cw.Vocabulary) -> float:
    """Mean cross-entropy over all positions of some words, 1,024 windows at a time."""
    data = reference.build_windows(cw.pack(words, vocabulary), CONTEXT)
    parts = zip(data.inputs.split(1024), data.targets.split(1024), strict=True)
    return sum(float(F.cross_entropy(net(x), y, reduction="sum")) for x, y in parts) / len(data.targets)


# ---------------------------------------------------------------------------------------------------------------------
# Counts alone


class KneserNey:
    """Interpolated Kneser-Ney over characters (Kneser and Ney, 1995; Chen and Goodman, 1999, section 2.7).

    The probability of a letter mixes those after its 0 to `order` previous letters; a word's beginning is a letter too.
    Below the longest contexts a count is how many different letters come before, except at the beginning of a word.

    Args:
        words: to count.
        vocabulary: theirs.
        order: letters of the longest context.
        discounts: per length of the context, in [0, 1].
    """

    def __init__(self, words: Sequence[str], vocabulary: cw.Vocabulary, order: int, discounts: Sequence[float]) -> None:
        self.vocabulary, self.discounts = vocabulary, discounts
        self.base = len(vocabulary) + 1  # the vocabulary's tokens, and the beginning of a word
        contexts, letters, lengths = self._positions(words, order)
        self.tables = []
        for k in range(order + 1):
            here = lengths >= k
            keys, counts = torch.unique(contexts[k][here] * self.base + letters[here], return_counts=True)
            if k < order:
                longer = torch.unique(contexts[k + 1][lengths > k] * self.base + letters[lengths > k])
                shorter, before = torch.unique(longer % self.base ** (k + 1), return_counts=True)
                begins = self._begins(keys, k)
                keys = torch.cat([shorter, keys[begins]])
                counts, order_of = torch.cat([before, counts[begins]]), keys.argsort()
                keys, counts = keys[order_of], counts[order_of]
            seen, row = torch.unique(keys // self.base, return_inverse=True)
            total = torch.zeros(len(seen), dtype=torch.float64).index_add_(0, row, counts.double())
            self.tables.append((keys, counts.double(), seen, total, torch.bincount(row).double()))

    def _begins(self, keys: Tensor, k: int) -> Tensor:
        """Which (context, letter) begin with the beginning of a word."""
        return keys // self.base**k == self.base - 1 if k else torch.zeros_like(keys, dtype=torch.bool)

    def _positions(self, words: Sequence[str], order: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """For every position, the context of every length as a number, the letter, and the letters before it."""
        packed = cw.pack(words, self.vocabulary)
        tokens = torch.where(packed.tokens == 0, self.base - 1, packed.tokens)
        index = torch.arange(len(packed))
        lengths = index - torch.repeat_interleave(packed.cu_seqlens[:-1], packed.cu_seqlens.diff()) + 1
        contexts = [torch.zeros_like(index)]
        for back in range(order):
            older = tokens[(index - back).clamp(min=0)]
            contexts.append(contexts[-1] + older * self.base**back)
        return contexts, packed.targets, lengths

    def loss(self, words: Sequence[str]) -> float:
        """Mean cross-entropy in nats over all positions of some words."""
        order = len(self.tables) - 1
        contexts, letters, lengths = self._positions(words, order)
        p = torch.full(letters.shape, 1 / len(self.vocabulary), dtype=torch.float64)
        known = torch.ones_like(letters, dtype=torch.bool)
        for k, (keys, counts, seen, total, kinds) in enumerate(self.tables):
            row = torch.searchsorted(seen, contexts[k]).clamp(max=len(seen) - 1)
            known &= (lengths >= k) & (seen[row] == contexts[k])
            key = contexts[k] * self.base + letters
            place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            count = torch.where(keys[place] == key, counts[place], 0)
            discount = self.discounts[k]
            mixed = ((count - discount).clamp(min=0) + discount * kinds[row] * p) / total[row]
            p = torch.where(known, mixed, p)
        return -float(p.log().mean())


def kneser_ney(words: Sequence[str], vocabulary: cw.Vocabulary, order: int = 5) -> KneserNey:
    """Counts of all words, with the discounts that suit a tenth of them best."""
    held, rest = words[: len(words) // 10], words[len(words) // 10 :]
    discounts = [0.8] * (order + 1)
    for k in range(order + 1):
        tried = {d: KneserNey(rest, vocabulary, order, [*discounts[:k], d, *discounts[k + 1 :]]) for d in _DISCOUNTS}
        discounts[k] = min(_DISCOUNTS, key=lambda d: tried[d].loss(held))
    return KneserNey(words, vocabulary, order, discounts)


_DISCOUNTS = (0.5, 0.65, 0.8, 0.9, 0.97)
