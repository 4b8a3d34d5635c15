"""The table of `make ptx`: launches, instructions, words across programs and bytes, by kernel, target and precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .launch import Launch
from .traffic import total

_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEYS = ("kernel", "target", "precision")
COUNTS = ("launches", "instructions", "barriers", "reads_across", "rows", "requested", "a_program", "once", "ideal")


def row_of(launch: Launch, target: str) -> dict[str, Any]:
    """What is kept of a launch: bytes of all tensors that it was given are what it has to move, each once."""
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    stored = next((tensors[name].dtype for name in ("x_ptr", "z_ptr") if name in tensors), torch.float32)
    multiplied = launch.constants.get("PRECISION")
    precision = multiplied if stored == torch.float32 and multiplied else _NAMES.get(stored, "float32")
    moved = total(launch.report)
    written = [tensors[name] for name in launch.compiled.outputs if name in tensors]
    return {
        "kernel": launch.name.removesuffix("_kernel"),
        "target": target,
        "precision": precision,
        "launches": 1,
        "instructions": launch.report.instructions,
        "barriers": launch.report.barriers,
        "reads_across": launch.report.reads_across,
        "rows": max((value.shape[0] for value in written if value.dim() == 2), default=1),
        "requested": moved.requested,
        "a_program": moved.a_program,
        "once": moved.once,
        "ideal": sum(value.numel() * value.element_size() for value in tensors.values()),
    }


def summed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kernel, target and precision."""
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEYS)
        if key in table:
            for name in COUNTS:
                table[key][name] += row[name]
        else:
            table[key] = dict(row)
    return [table[key] for key in sorted(table)]
