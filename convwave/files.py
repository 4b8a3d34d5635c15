"""Safetensors files with a JSON configuration in their metadata, written so that no reader ever sees half a file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: file and reason."""


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by `content` in one step: after a crash it holds the old content or the new, never a mixture."""
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
    """Write tensors and JSON-able metadata values to a safetensors file, atomically."""
    import safetensors.torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    write_atomic(path, safetensors.torch.save(contiguous, text))


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: no such file, not a safetensors file, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
            # cloned, because what safetensors returns is mapped onto a file that may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a usable safetensors file: {str(error).splitlines()[0]}") from None
    found = text.get("format", "").strip('"')
    if found != expected_format:
        raise CheckpointError(f"{path}: expected a file of format {expected_format!r}, got {found!r}")
    try:
        return tensors, {key: json.loads(value) for key, value in text.items()}
    except ValueError:
        raise CheckpointError(f"{path}: its metadata is damaged") from None
