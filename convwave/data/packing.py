"""Words to tokens: vocabulary, the post's split, and packing names end to end.

Token 0, written ``.``, opens and closes every word and fills the context on its left, so a word of m letters has m + 1
positions: position t has read ``[0, c1 .. ct]`` and predicts ``c(t+1)``, the last one predicts 0 again.

Words are packed end to end without padding, with `cu_seqlens` marking where each begins, the convention of
FlashAttention's variable-length functions.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convwave.data.words import BOUNDARY, DataError, Words
from convwave.files import quoted

_BLOCK = 2**20  # characters encoded at a time


class Vocabulary:
    """A one-to-one map between characters and token ids; ``.`` is token 0.

    Args:
        symbols: the characters in order of their ids; the first must be ``.``.
    """

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        if not self.symbols or self.symbols[0] != BOUNDARY:
            raise ValueError(f"symbols: expected '.' first, got {self.symbols[:1]}")
        if any(len(s) != 1 for s in self.symbols) or len(set(self.symbols)) != len(self.symbols):
            raise ValueError("symbols: expected distinct single characters")
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        # code point -> id, -1 where there is none: encodes a whole corpus with one lookup
        code_points = torch.tensor([ord(s) for s in self.symbols], device="cpu")
        self._table = torch.full((int(code_points.max()) + 2,), -1, dtype=torch.int64, device="cpu")
        self._table[code_points] = torch.arange(len(self.symbols), device="cpu")

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Vocabulary:
        """The sorted distinct characters of `words`, as in the post."""
        characters = set("".join(words))
        if BOUNDARY in characters:
            raise ValueError("words: '.' is reserved for the word boundary")
        return cls([BOUNDARY, *sorted(characters)])

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def __repr__(self) -> str:
        return f"Vocabulary({''.join(self.symbols)!r})"

    def encode(self, word: str) -> list[int]:
        """Token ids of the characters of `word`; raises DataError for one that is not in the vocabulary."""
        return [int(i) for i in self.encode_text(word)]

    def encode_text(self, text: str) -> Tensor:
        """Token ids (len(text),) int64 of a text in which ``.`` may occur."""
        ids = torch.empty(len(text), dtype=torch.int64, device="cpu")
        for start in range(0, len(text), _BLOCK):
            block = text[start : start + _BLOCK]
            raw = bytearray(block.encode("utf-32-le", "surrogatepass"))
            code_points = torch.frombuffer(raw, dtype=torch.int32).clamp(max=len(self._table) - 1)
            out = torch.index_select(self._table, 0, code_points, out=ids[start : start + _BLOCK])
            if int(out.min()) < 0:
                position = int((out < 0).nonzero()[0])
                known = quoted("".join(self.symbols))
                raise DataError(f"character {block[position]!r} is not among the vocabulary's {len(self)}: {known}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of token ids, 0 as ``.``."""
        return "".join(self.symbols[i] for i in ids)


class Splits(NamedTuple):
    """The post's split of the words, 80/10/10."""

    train: list[str]
    val: list[str]
    test: list[str]


def split_words(words: Sequence[str], seed: int = 42) -> Splits:
    """Shuffle with Python's generator seeded with `seed`, then cut at 80 % and 90 %, as in the post.

    Raises:
        DataError: too few words to leave any for training.
    """
    shuffled = list(words)
    random.Random(seed).shuffle(shuffled)
    n1, n2 = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    if n1 == 0:
        raise DataError(f"{len(shuffled)} word is too few: the 80/10/10 split leaves none to train on")
    return Splits(shuffled[:n1], shuffled[n1:n2], shuffled[n2:])


@dataclass(frozen=True)
class Packed:
    """B words packed end to end, N positions in all.

    Attributes:
        tokens: (N,) int64, what each position reads: 0, c1, .., cm for every word.
        targets: (N,) int64, what it predicts: c1, .., cm, 0.
        cu_seqlens: (B + 1,) int64, where each word begins, and N.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    def __len__(self) -> int:
        return self.tokens.numel()

    @cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What was made of these words once, such as graphs, for all trainings that read them."""
        return {}

    @property
    def num_words(self) -> int:
        return self.cu_seqlens.numel() - 1

    @cached_property
    def age(self) -> Tensor:
        """(N,) int32 how many positions of its word precede each position."""
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], self.cu_seqlens.diff(), output_size=len(self))
        return (torch.arange(len(self), device=starts.device) - starts).int()

    @cached_property
    def longest(self) -> int:
        """Positions of the longest word, 0 without words."""
        return int(self.age.max()) + 1 if len(self) else 0

    def positions(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """The positions (N',) of the words with these indices (int64, any order, repeats allowed), and cu_seqlens."""
        starts = self.cu_seqlens[words]
        lengths = self.cu_seqlens[words + 1] - starts
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        offset = torch.repeat_interleave(starts - cu_seqlens[:-1], lengths)
        return torch.arange(offset.numel(), device=offset.device) + offset, cu_seqlens

    def select(self, words: Tensor) -> Packed:
        """The packing of the words with these indices (int64, any order, repeats allowed)."""
        rows, cu_seqlens = self.positions(words)
        return Packed(self.tokens[rows], self.targets[rows], cu_seqlens)

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.tokens.to(device), self.targets.to(device), self.cu_seqlens.to(device))


def pack(words: Sequence[str], vocab: Vocabulary) -> Packed:
    """Pack words; an empty word has one position.

    Raises:
        DataError: a character that is not in the vocabulary.
        ValueError: a word that contains ``.``.
    """
    # ".emma.ava" is the tokens, and the same stream shifted by one character, "emma.ava.", the targets.
    stream = BOUNDARY + BOUNDARY.join(words) if words else ""
    tokens = vocab.encode_text(stream)
    starts = (tokens == 0).nonzero().flatten()
    if starts.numel() != len(words):
        raise ValueError("words: '.' is reserved for the word boundary")
    targets = torch.cat([tokens[1:], tokens.new_zeros(min(len(words), 1))])
    return Packed(tokens, targets, torch.cat([starts, starts.new_tensor([tokens.numel()])]))


def pack_ids(words: Iterable[Sequence[int]]) -> Packed:
    """Pack words given as token ids; an empty word has one position.

    Raises:
        ValueError: a negative id.
    """
    words = [list(word) for word in words]
    tokens = torch.tensor([i for word in words for i in (0, *word)], dtype=torch.int64, device="cpu")
    targets = torch.tensor([i for word in words for i in (*word, 0)], dtype=torch.int64, device="cpu")
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"words: token ids must be >= 0, got {int(tokens.min())}")
    lengths = torch.tensor([0, *(len(word) + 1 for word in words)], dtype=torch.int64, device="cpu")
    return Packed(tokens, targets, lengths.cumsum(0))


class Corpus:
    """One source of words with its vocabulary, the post's split and the packed splits, each made once when first read.

    Args:
        words: as `load_words` reads them.

    Attributes:
        words: in file order, duplicates kept.
        source, sha256, is_names_txt: those of `Words`.
    """

    def __init__(self, words: Words) -> None:
        self.words, self.source, self.sha256 = words.words, words.source, words.sha256
        self.is_names_txt = words.is_names_txt

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of all words, so that every split can be packed."""
        return Vocabulary.from_words(self.words)

    @cached_property
    def splits(self) -> Splits:
        """The words of every split; raises DataError where none is left to train on."""
        return split_words(self.words)

    @cached_property
    def train(self) -> Packed:
        return pack(self.splits.train, self.vocabulary)

    @cached_property
    def val(self) -> Packed:
        return pack(self.splits.val, self.vocabulary)

    @cached_property
    def test(self) -> Packed:
        return pack(self.splits.test, self.vocabulary)
