"""Safetensors files with a JSON configuration in their metadata, written so that no reader ever sees half a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convwave.data import Vocabulary
from convwave.nn import ConvWave

MODEL_FORMAT = "convwave.model.1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: file and reason."""


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by `content` in one step: after a crash it holds the old content or the new, never a mixture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata values to a safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    write_atomic(path, safetensors.torch.save(contiguous, text))


def read_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: no such file, not a safetensors file, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a usable safetensors file: {str(error).splitlines()[0]}") from None
    found = metadata.get("format")
    if found != expected_format:
        raise CheckpointError(f"{path}: expected a file of format {expected_format!r}, got {found!r}")
    return tensors, metadata


def save_model(model: ConvWave, path: str | os.PathLike[str]) -> None:
    """Write a model with its configuration and vocabulary."""
    vocabulary = None if model.vocabulary is None else "".join(model.vocabulary.symbols)
    write_tensors(
        path, model.state_dict(), {"format": MODEL_FORMAT, "config": model.config(), "vocabulary": vocabulary}
    )


def load_model(path: str | os.PathLike[str], backend: str = "auto") -> ConvWave:
    """Read a model that `save_model` wrote, in evaluation mode, on the CPU, in the precision it was saved in.

    Raises:
        CheckpointError: the file is missing, damaged, or not a convwave model.
    """
    tensors, metadata = read_tensors(path, MODEL_FORMAT)
    try:
        symbols = metadata["vocabulary"]
        vocabulary = None if symbols is None else Vocabulary(symbols)
        model = ConvWave(**metadata["config"], backend=backend, vocabulary=vocabulary)
        model.to(tensors["head.weight"].dtype).load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not hold a convwave model: {str(error).splitlines()[0]}") from None
    return model.eval()
