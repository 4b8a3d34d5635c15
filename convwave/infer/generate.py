"""Sampling names, one node evaluation per level and character.

A level needs the newest activation below it and the ones ``dilation`` steps earlier. Ring buffers keep exactly those,
initially filled with the activation of an all-padding subtree, so a new character costs L node evaluations instead of
a window's 2^L - 1.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from convwave.data.packing import Vocabulary
from convwave.nn import ConvWave, evaluating
from convwave.ops.fold import folded

FRUITLESS = 10_000  # draws without a name that is wanted, after which sampling gives up

_MOST_RING = 2**27  # numbers that a name's ring buffers may have: 512 MB of float32


class GenerationCache:
    """The state of a batch of sequences that are read token by token.

    The first token of every sequence is 0, as in `data.pack`.

    Args:
        model: in evaluation mode; its weights are copied when the cache is made.
        batch: B, number of sequences.

    Attributes:
        batch: number of sequences still in progress.
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
        self.offsets: list[list[int]] = []  # per level, how far back each tap is, except the newest
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
        """Read (B, T) tokens, return logits (B, T, V): any way to split a sequence into calls gives the same."""
        logits = [self.step(column) for column in tokens.T]
        return torch.stack(logits, 1) if logits else self.embedding.new_empty(self.batch, 0, len(self.head_bias))

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences; rows (B',) int64 or (B,) bool."""
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
        top_k: draw from the top_k most likely tokens.
        max_length: maximum number of tokens, including the prefix.

    Returns:
        (count, longest) int64 on the CPU, without the opening 0, filled with 0 after the end.

    Raises:
        ValueError: a number out of range, or logits that are not finite: -inf is, unless for every token.
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
    alive = torch.arange(count, device="cpu")  # the sequence that each row of the cache belongs to
    columns: list[Tensor] = []
    while alive.numel() and len(columns) < max_length:
        logits = cache.step(tokens)
        if len(columns) < len(prefix):
            tokens = torch.full_like(tokens, prefix[len(columns)])
        else:
            if not bool(logits.amax(1).isfinite().all()):
                raise ValueError("model: its logits are not finite, no token can be drawn")
            tokens = _draw(logits.cpu(), generator, temperature, top_k).to(device)
        drawn = tokens.cpu()
        columns.append(torch.zeros(count, dtype=torch.int64, device="cpu").index_copy_(0, alive, drawn))
        going = drawn != 0
        if not bool(going.all()):
            cache.keep(going.to(device))
            alive, tokens = alive[going], tokens[going.to(device)]
    return torch.stack(columns, 1) if columns else torch.zeros(count, 0, dtype=torch.int64, device="cpu")


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
    unique: bool = False,
    exclude: Collection[str] = (),
) -> list[str]:
    """Sample names as text; equal arguments give equal names.

    Args:
        seed: 0 to 2**64 - 1.
        vocabulary: default: the model's own.
        batch: names under way at once; default: at most 8192, fewer where ring buffers or names would pass 256 MB.
            Other values draw other names.
        unique: every name once.
        exclude: names to leave out, such as those of the training split.
        count, prefix, temperature, top_k, max_length: see `sample_ids`.

    Returns:
        `count` names; fewer where `unique` or `exclude` leave none of `FRUITLESS` draws in a row.

    Raises:
        DataError: a character of the prefix that is not in the vocabulary.
        ValueError: no vocabulary, one of another size than the model's, or a number out of range.
    """
    vocabulary = vocabulary or model.vocabulary
    if vocabulary is None:
        raise ValueError("vocabulary: the model was saved without one, pass it")
    if len(vocabulary) != model.vocab_size:
        raise ValueError(f"vocabulary: expected {model.vocab_size} symbols as the model has, got {len(vocabulary)}")
    if "." in prefix:
        raise ValueError("prefix: '.' is reserved for the word boundary")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    prefix_ids = vocabulary.encode(prefix)
    ring = sum((block.conv.kernel_size - 1) * block.conv.dilation * block.conv.in_channels for block in model.layers)
    if ring > _MOST_RING:
        raise ValueError(f"model: its context of {model.context:,} tokens needs {ring:,} numbers a name, too many")
    if batch is None:
        batch = max(1, min(8192, 2**26 // ring, 2**25 // max(max_length, 1)))
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    names: list[str] = []
    seen: set[str] = set()
    fruitless = 0
    with evaluating(model):
        while True:
            missing = count - len(names)
            ids = sample_ids(
                model,
                min(batch, missing if not (unique or exclude) or missing < 1 else max(missing, 100)),
                generator=generator,
                prefix=prefix_ids,
                temperature=temperature,
                top_k=top_k,
                max_length=max_length,
            )
            lengths = (ids != 0).sum(1).tolist()
            for row, n in zip(ids.tolist(), lengths, strict=True):
                name = vocabulary.decode(row[:n])
                fruitless += 1
                if len(names) < count and name not in exclude and not (unique and name in seen):
                    names.append(name)
                    fruitless = 0
                    if unique:
                        seen.add(name)
            if len(names) >= count or fruitless >= FRUITLESS:
                return names


def _draw(logits: Tensor, generator: torch.Generator, temperature: float, top_k: int | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(1)
    candidates = None
    if top_k is not None and top_k < logits.shape[1]:
        logits, candidates = logits.topk(top_k, dim=1)
    # in float64 and with the largest logit at 0, so that even a tiny temperature gives no NaN
    logits = (logits - logits.amax(1, keepdim=True)).double() / temperature
    drawn = torch.multinomial(logits.softmax(1), 1, generator=generator)
    return (drawn if candidates is None else candidates.gather(1, drawn)).flatten()
