"""The table of `make ptx`: launches, instructions, words across programs and bytes, by kernel, target and precision."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convwave.files import write_atomic
from convwave.runs.registry import provenance

from .launch import Launch
from .traffic import total

_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEYS = ("kernel", "target", "precision")
MOVED = ("asked", "a_program", "once", "ideal")  # bytes; in the table by row
COUNTS = ("launches", "by_warp", "instructions", "barriers", "reads_across", "rows", *MOVED)


def row_of(launch: Launch, target: str) -> dict[str, Any]:
    """What is kept of a launch: bytes of all tensors that it was given are what it has to move, each once."""
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    stored = next((tensors[name].dtype for name in ("x_ptr", "z_ptr", "table_ptr") if name in tensors), torch.float32)
    multiplied = launch.constants.get("PRECISION")
    precision = multiplied if stored == torch.float32 and multiplied else _NAMES.get(stored, "float32")
    moved = total(launch.report)
    return {
        "kernel": launch.name.removesuffix("_kernel"),
        "target": target,
        "precision": precision,
        "launches": 1,
        "by_warp": int(launch.by_warp),
        "instructions": launch.report.instructions,
        "barriers": launch.report.barriers,
        "reads_across": launch.report.reads_across,
        "rows": max(tensors[name].shape[0] for name in ("x_ptr", "z_ptr", "g_ptr", "tokens_ptr") if name in tensors),
        "asked": moved.requested,
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
    for row in table.values():
        for name in MOVED:
            row[f"bytes_{name}"] = round(row.pop(name) / row["rows"], 1)
    return [table[key] for key in sorted(table)]


LINE = (
    "{kernel:23} {target} {precision:8} {launches:6,} launches {instructions:12,} instructions {reads_across:9,} words "
    "across, bytes a row {bytes_asked:9,.0f} asked {bytes_a_program:9,.0f} a program {bytes_once:9,.0f} once "
    "{bytes_ideal:9,.0f} ideal"
)


def write_section(path: Path, name: str, command: str, values: dict[str, Any]) -> None:
    """Replace one section of a results file, with where it comes from; other sections stay."""
    sections = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sections[name] = {"provenance": provenance(command), **values}
    write_atomic(path, (json.dumps(sections, indent=1, ensure_ascii=False) + "\n").encode())
