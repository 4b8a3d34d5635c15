"""Words: reading, vocabulary, the post's split, and packing names end to end.

A *word* is one line of a text file. Token 0, written ``.``, opens and closes every word and fills the context
on its left, so a word of m letters has m + 1 positions: position t has read ``[0, c1 .. ct]`` and predicts
``c(t+1)``, the last one predicts 0 again.

Words are packed end to end without padding, with `cu_seqlens` marking where each begins, the convention of
FlashAttention's variable-length functions.
"""

from __future__ import annotations

import codecs
import hashlib
import http.client
import os
import random
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BOUNDARY = "."
NAMES_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
NAMES_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "setup.py").is_file() else None


class DataError(ValueError):
    """Input text that cannot be used; the message is one line: file, line number where there is one, reason."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Words(NamedTuple):
    """The words of one source, in file order, duplicates kept."""

    words: list[str]
    source: str  # what to show a person: the file, or "bundled given names"
    sha256: str  # of the source's bytes
    blank_lines: int = 0

    @property
    def is_names_txt(self) -> bool:
        """Whether this is the very file of the post, so that its losses may stand beside the post's."""
        return self.sha256 == NAMES_SHA256


def read_words(path: str | os.PathLike[str]) -> Words:
    """Read one word a line from a UTF-8 text file.

    Surrounding blanks, CRLF line ends, a byte-order mark and a missing last newline are harmless; blank lines are
    skipped and counted. Every other character is kept as it stands.

    Raises:
        DataError: no such file, a directory, unreadable, bytes that are not UTF-8, a line with the reserved ``.`` or
            with a control character, or no word at all.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory, expected a text file of one word a line") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    content = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        line_number = before.count(b"\n") + 1
        raise DataError(f"{path}: line {line_number}: byte 0x{content[error.start]:02x} is not UTF-8 text") from None

    words: list[str] = []
    blank = 0
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    for line_number, line in enumerate(lines, start=1):
        word = line.strip()
        if not word:
            blank += 1
            continue
        if BOUNDARY in word:
            raise DataError(
                f"{path}: line {line_number}: {word!r} contains '.', which is reserved for the word boundary"
            )
        if not word.isprintable():
            bad = next((c for c in word if unicodedata.category(c) == "Cc"), None)
            if bad is not None:
                raise DataError(f"{path}: line {line_number}: contains the control character U+{ord(bad):04X}")
        words.append(word)
    if not words:
        raise DataError(f"{path}: holds no word")
    return Words(words, str(path), hashlib.sha256(raw).hexdigest(), blank)


def data_directory() -> Path:
    """Where names.txt is looked for and where `fetch_names` puts it: data/ of the checkout, else ./data."""
    return (_CHECKOUT or Path.cwd()) / "data"


def bundled_words() -> Words:
    """The project's own list of given names, all culture files in alphabetical order of their names."""
    installed = _PACKAGE / "given_names"
    directory = installed if installed.is_dir() else data_directory() / "given_names"
    raw = b"".join(file.read_bytes() for file in sorted(directory.glob("*.txt")))
    if not raw:
        raise DataError(f"{directory}: the bundled given names are missing; reinstall convwave or pass --data FILE")
    return Words(raw.decode("utf-8").split(), "the bundled given names", hashlib.sha256(raw).hexdigest())


def load_words(path: str | os.PathLike[str] | None = None) -> Words:
    """The words to work on: `path`, else $CONVWAVE_DATA, else data/names.txt, else the bundled list.

    Raises:
        DataError: what `read_words` raises.
    """
    chosen = path or os.environ.get("CONVWAVE_DATA")
    if chosen:
        return read_words(chosen)
    names = data_directory() / "names.txt"
    return read_words(names) if names.is_file() else bundled_words()


def fetch_names(url: str = NAMES_URL, directory: str | os.PathLike[str] | None = None, timeout: float = 30.0) -> Path:
    """Download names.txt, check its SHA-256, and put it in `directory` (default: `data_directory()`).

    A file that is already there with the right checksum is left alone.

    Raises:
        DataError: the download failed, or what came is not the expected file; nothing is written then.
    """
    target = Path(directory or data_directory()) / "names.txt"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == NAMES_SHA256:
        return target
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            raw = response.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: download failed: {reason}") from None
    digest = hashlib.sha256(raw).hexdigest()
    if digest != NAMES_SHA256:
        raise DataError(f"{url}: SHA-256 is {digest}, expected {NAMES_SHA256}; nothing was kept")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_bytes(raw)
    os.replace(partial, target)
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


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
        code_points = torch.tensor([ord(s) for s in self.symbols])
        self._table = torch.full((int(code_points.max()) + 2,), -1, dtype=torch.int64)
        self._table[code_points] = torch.arange(len(self.symbols))

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
        if not text:
            return torch.empty(0, dtype=torch.int64)
        code_points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32).long()
        ids = self._table[code_points.clamp(max=len(self._table) - 1)]
        if bool((ids < 0).any()):
            position = int((ids < 0).nonzero()[0])
            raise DataError(
                f"character {text[position]!r} is not among the vocabulary's {len(self)}: {''.join(self.symbols)}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The characters of token ids, 0 as ``.``."""
        return "".join(self.symbols[i] for i in ids)


# ---------------------------------------------------------------------------------------------------------------------
# Split and packing


class Splits(NamedTuple):
    """The post's split of the words, 80/10/10."""

    train: list[str]
    val: list[str]
    test: list[str]


def split_words(words: Sequence[str], seed: int = 42) -> Splits:
    """Shuffle with Python's generator seeded with `seed`, then cut at 80 % and 90 %, as in the post.

    Raises:
        DataError: so few words that none is left to train on.
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

    @property
    def num_words(self) -> int:
        return self.cu_seqlens.numel() - 1

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
    # The stream ".emma.ava" *is* the tokens, and the same stream one character on, "emma.ava.", is the targets.
    stream = "".join(BOUNDARY + word for word in words)
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
    tokens = torch.tensor([i for word in words for i in (0, *word)], dtype=torch.int64)
    targets = torch.tensor([i for word in words for i in (*word, 0)], dtype=torch.int64)
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"words: token ids must be >= 0, got {int(tokens.min())}")
    lengths = torch.tensor([0, *(len(word) + 1 for word in words)], dtype=torch.int64)
    return Packed(tokens, targets, lengths.cumsum(0))
