"""Safetensors files with a JSON configuration in their metadata, written atomically: nobody reads half a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_CHECKSUM = "checksum"  # the metadata's key
_LONGEST_HEADER = 2**24  # bytes; a network of 1,000 levels has 600 kB


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: file and reason."""


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by `content` in one step: after a crash it holds either the old or the new content."""
    path = Path(path).resolve()  # a link keeps pointing where it did
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "exists and is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata values to a safetensors file with a checksum over both, atomically."""
    import safetensors.torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {key: json.dumps(value) for key, value in metadata.items()}
    text[_CHECKSUM] = json.dumps(_checksum(contiguous, text))
    write_atomic(path, safetensors.torch.save(contiguous, text))


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    The checksum is compared where the file has one; files of before it was kept have none.

    Raises:
        CheckpointError: no such file, not a regular file, unreadable, not a safetensors file, of another format, or
            other content than was written.
    """
    import safetensors.torch

    content, text = _read(path)
    found = quoted(text.get("format", "").strip('"'))
    if found != repr(expected_format):
        raise CheckpointError(f"{path}: expected a file of format {expected_format!r}, got {found}")
    try:
        tensors = safetensors.torch.load(content)
        checksum = json.dumps(_checksum(tensors, text))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is not a usable safetensors file: {_first_line(error)}") from None
    try:
        metadata = {key: json.loads(value) for key, value in text.items()}
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its metadata is damaged") from None
    metadata.pop(_CHECKSUM, None)
    # found by its form too, or a flipped bit in the key would make a file without a checksum
    kept = text.get(_CHECKSUM) or next((value for value in text.values() if value.startswith('"sha256:')), checksum)
    if kept != checksum:
        raise CheckpointError(f"{path}: is damaged: its checksum is not that of its content")
    return tensors, metadata


def quoted(text: str, most: int = 60) -> str:
    """Text as one short line of printable characters in quotation marks."""
    return repr(text if len(text) <= most else text[:most] + "...")


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, str]]:
    """The content of a safetensors file and its metadata; nothing is read that the header does not account for."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
            raise CheckpointError(f"{path}: {kind}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("it has no header")
            header = json.loads(file.read(length))
            text = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in text.values()):
                raise ValueError("its metadata is not text")
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if end != size - 8 - length:
                raise ValueError(
                    f"it has {size - 8 - length:,} bytes of tensors, its header tells of {quoted(str(end))}"
                )
            file.seek(0)
            return file.read(size), text
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a usable safetensors file: {_first_line(error)}") from None


def _checksum(tensors: dict[str, Tensor], text: dict[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors and over metadata."""
    import torch

    digest = hashlib.sha256()
    for key in sorted(text.keys() - {_CHECKSUM}):
        digest.update(json.dumps([key, text[key]]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
