"""Sampling names, one node evaluation per level and character.

A level needs the newest activation below it and the ones ``dilation`` steps earlier. Ring buffers keep exactly those,
filled at first with the activation of an all-padding subtree; so a new character costs L node evaluations where a
window costs 2^L - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convwave.data.packing import Vocabulary
from convwave.nn import ConvWave, evaluating
from convwave.ops.fold import folded


class GenerationCache:
    """The state of a batch of sequences that are read token by token.

    The first token of every sequence is 0, as in `data.pack`.

    Args:
        model: in evaluation mode; its weights are copied when the cache is made.
        batch: B, number of sequences.

    Attributes:
        batch: sequences that are still kept.
    """

    @torch.no_grad()
    def __init__(self, model: ConvWave, batch: int) -> None:
        if any(block.norm.training for block in model.layers):
            raise ValueError("model: expected one in evaluation mode, call .eval() first")
        self.batch = batch
        self.embedding = model.embedding.weight.detach().clone()
        self.head_weight, self.head_bias = model.head.weight.T.clone(), model.head.bias.detach().clone()
        self.position = 0
        self.levels: list[tuple[Tensor, Tensor]] = []  # per level, weight (kC, H) and shift (H,)
        self.offsets: list[list[int]] = []  # per level, how far back each tap but the newest lies
        self.rings: list[Tensor] = []  # per level, (longest offset, B, C): step t is in slot t % length
        padding = self.embedding[0]
        for block in model.layers:
            k, d = block.conv.kernel_size, block.conv.dilation
            matrix, shift = folded(block.level())
            weight = matrix.permute(2, 1, 0).flatten(0, 1).to(padding.dtype).contiguous()
            self.levels.append((weight, shift.to(padding.dtype)))
            self.offsets.append([(k - 1 - j) * d for j in range(k - 1)])
            self.rings.append(padding.expand((k - 1) * d, batch, -1).clone())
            padding = torch.tanh(padding.repeat(k) @ weight + self.levels[-1][1])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token (B,) int64 per sequence, return the logits (B, V) of the next."""
        h = self.embedding[tokens]
        for (weight, shift), offsets, ring in zip(self.levels, self.offsets, self.rings, strict=True):
            length = ring.shape[0]
            older = [ring[(self.position - offset) % length] for offset in offsets]
            above = torch.addmm(shift, torch.cat([*older, h], dim=1), weight).tanh_()
            ring[self.position % length] = h
            h = above
        self.position += 1
        return torch.addmm(self.head_bias, h, self.head_weight)

    def extend(self, tokens: Tensor) -> Tensor:
        """Read (B, T) tokens, return logits (B, T, V): any way of cutting a sequence into calls gives the same."""
        logits = [self.step(column) for column in tokens.T]
        return torch.stack(logits, 1) if logits else self.embedding.new_empty(self.batch, 0, len(self.head_bias))

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences only; rows (B',) int64 or (B,) bool."""
        self.rings = [ring[:, rows] for ring in self.rings]
        self.batch = self.rings[0].shape[1]


@torch.no_grad()
def sample_ids(
    model: ConvWave,
    count: int,
    *,
    generator: torch.Generator,
    prefix: list[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    max_length: int = 100,
) -> Tensor:
    """Sample sequences until token 0.

    Args:
        model: in evaluation mode.
        count: how many.
        generator: on the CPU; the source of all draws.
        prefix: token ids that every sequence begins with.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens.
        max_length: tokens after which a sequence is cut, the prefix included.

    Returns:
        (count, longest) int64 on the CPU, without the opening 0, filled with 0 after the end.

    Raises:
        ValueError: a number out of range.
    """
    prefix = prefix or []
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if max_length < max(1, len(prefix)):
        raise ValueError(f"max_length: expected at least {max(1, len(prefix))}, got {max_length}")
    device = model.embedding.weight.device
    cache = GenerationCache(model, count)
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    alive = torch.arange(count)  # the sequence that each row of the cache belongs to
    columns: list[Tensor] = []
    while alive.numel() and len(columns) < max_length:
        logits = cache.step(tokens)
        if len(columns) < len(prefix):
            tokens = torch.full_like(tokens, prefix[len(columns)])
        else:
            tokens = _draw(logits.cpu(), generator, temperature, top_k).to(device)
        drawn = tokens.cpu()
        columns.append(torch.zeros(count, dtype=torch.int64).index_copy_(0, alive, drawn))
        going = drawn != 0
        if not bool(going.all()):
            cache.keep(going.to(device))
            alive, tokens = alive[going], tokens[going.to(device)]
    return torch.stack(columns, 1) if columns else torch.zeros(count, 0, dtype=torch.int64)


def sample(
    model: ConvWave,
    count: int = 20,
    *,
    seed: int = 0,
    prefix: str = "",
    temperature: float = 1.0,
    top_k: int | None = None,
    max_length: int = 100,
    vocabulary: Vocabulary | None = None,
    batch: int | None = None,
) -> list[str]:
    """Sample names as text; equal arguments give equal names.

    Args:
        vocabulary: default: the model's own.
        batch: names under way at once; default: at most 8192, fewer where the ring buffers would pass 256 MB. Other
            values draw other names.
        count, prefix, temperature, top_k, max_length: see `sample_ids`.

    Raises:
        DataError: a character of the prefix that is not in the vocabulary.
        ValueError: no vocabulary, or a number out of range.
    """
    vocabulary = vocabulary or model.vocabulary
    if vocabulary is None:
        raise ValueError("vocabulary: the model was saved without one, pass it")
    if "." in prefix:
        raise ValueError("prefix: '.' is reserved for the word boundary")
    prefix_ids = vocabulary.encode(prefix)
    if batch is None:
        ring = sum(
            (block.conv.kernel_size - 1) * block.conv.dilation * block.conv.in_channels for block in model.layers
        )
        batch = min(8192, max(1, 2**26 // ring))
    generator = torch.Generator().manual_seed(seed)
    names: list[str] = []
    with evaluating(model):
        while True:
            ids = sample_ids(
                model,
                min(batch, count - len(names)),
                generator=generator,
                prefix=prefix_ids,
                temperature=temperature,
                top_k=top_k,
                max_length=max_length,
            )
            lengths = (ids != 0).sum(1).tolist()
            names += [vocabulary.decode(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]
            if len(names) >= count:
                break
    return names


def _draw(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(1)
    candidates = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, candidates = logits.topk(top_k, dim=1)
    # in float64 and with the largest logit at 0, so that no temperature, however small, makes a NaN
    logits = (logits - logits.amax(1, keepdim=True)).double() / temperature
    drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)
    return (drawn if candidates is None else candidates.gather(1, drawn)).flatten()
