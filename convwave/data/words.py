"""Text to words: reading a file, the bundled list, downloading the post's.

A *word* is one line of a text file.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import select
import stat
import unicodedata
from pathlib import Path
from typing import NamedTuple

from convwave.files import quoted

BOUNDARY = "."

NAMES_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"

NAMES_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"

MOST_BYTES = 2**26  # of a text: 64 MB, 300 times the post's

PATIENCE = 10.0  # seconds that a pipe may be silent

_PACKAGE = Path(__file__).resolve().parent.parent

_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "setup.py").is_file() else None


class DataError(ValueError):
    """Input text that cannot be used; the message is one line: file, line number where there is one, reason."""


class Words(NamedTuple):
    """The words of one source, in file order, duplicates kept."""

    words: list[str]
    source: str  # for display: the file, or "the bundled given names"
    sha256: str  # of the source's bytes
    blank_lines: int = 0

    @property
    def is_names_txt(self) -> bool:
        """Whether this is the very file of the post, so that its losses can be compared with the post's."""
        return self.sha256 == NAMES_SHA256


def read_words(path: str | os.PathLike[str]) -> Words:
    """Read one word a line from a UTF-8 text file.

    Surrounding blanks, CRLF line ends, a byte-order mark and a missing final newline are accepted; blank lines are
    skipped and counted. All other characters are kept. A pipe or a device is read to its end.

    Raises:
        DataError: no such file, a directory, unreadable, more than `MOST_BYTES`, a pipe silent for `PATIENCE` seconds,
            bytes that are not UTF-8, a line with the reserved ``.`` or with a control character, or a file without
            words.
    """
    path = Path(path)
    raw = _read(path)
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
                f"{path}: line {line_number}: {quoted(word)} contains '.', which is reserved for the word boundary"
            )
        if not word.isprintable():
            bad = next((c for c in word if unicodedata.category(c) == "Cc"), None)
            if bad is not None:
                raise DataError(f"{path}: line {line_number}: contains the control character U+{ord(bad):04X}")
        words.append(word)
    if not words:
        raise DataError(f"{path}: holds no word")
    return Words(words, str(path), hashlib.sha256(raw).hexdigest(), blank)


def _read(path: Path) -> bytes:
    """The content of a file, a pipe or a device; raises DataError where it has none, or no end."""
    try:
        # not blocking: a pipe that nobody writes to would keep us in open()
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb", buffering=0) as file:
            if stat.S_ISDIR(mode := os.fstat(descriptor).st_mode):
                raise IsADirectoryError
            regular = stat.S_ISREG(mode)
            chunks: list[bytes] = []
            size = 0
            while size <= MOST_BYTES:
                if not regular and not select.select([descriptor], [], [], PATIENCE)[0]:
                    raise DataError(f"{path}: nothing comes from it, waited {PATIENCE:g} seconds")
                chunk = file.read(2**20)
                if not chunk:
                    return b"".join(chunks)
                chunks.append(chunk)
                size += len(chunk)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a directory, expected a text file of one word a line") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r}: cannot be read: {error}") from None  # NUL in its name
    raise DataError(f"{path}: holds more than {MOST_BYTES:,} bytes, the most that is read")


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
    if path is not None and not os.fspath(path):
        raise DataError("data: expected the path of a text file, got ''")
    chosen = path or os.environ.get("CONVWAVE_DATA")
    if chosen:
        return read_words(chosen)
    names = data_directory() / "names.txt"
    return read_words(names) if names.is_file() else bundled_words()


def fetch_names(url: str = NAMES_URL, directory: str | os.PathLike[str] | None = None, timeout: float = 30.0) -> Path:
    """Download names.txt, check its SHA-256, and put it in `directory` (default: `data_directory()`).

    A file that is already there with the right checksum is left alone.

    Raises:
        DataError: the download failed, or returned another file; then nothing is written.
    """
    import http.client
    import urllib.error
    import urllib.request

    target = Path(directory or data_directory()) / "names.txt"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == NAMES_SHA256:
        return target
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            raw = response.read(MOST_BYTES)
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
