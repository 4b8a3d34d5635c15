"""Whole names in one launch against level by level: what the compiled kernels execute and move, counted without a GPU.

    python -m benchmarks.whole_names                  into results/whole_names.json (two minutes)

tests/ptx executes the PTX of both on 44 names of 11 positions, three levels, 27 tokens. For each position:

    instructions  of warps
    products      of matrix units
    barriers      of programs, times 1,000
    asked         bytes, by all threads, weights, table, scratch memory and taps included
    a_program     bytes in sectors of 32, each once a program: what the L2 cache delivers at least
    memory        the same once in all, of tensors with a row for each position: what grows with the text

"level by level" is `stack_inference`; embedding, head and log_softmax, which PyTorch adds to it, are not counted. "one
launch" is everything from tokens to losses; "its table" is made once for a network, and counted for each of its rows.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import torch
from convwave.kernels import stack

from convwave.data.graph import dense_graph
from convwave.data.packing import pack_ids
from convwave.files import write_atomic
from convwave.nn import ConvWave
from convwave.ops import library
from convwave.runs.registry import provenance
from tests.ptx.launch import Launch, on_emulator
from tests.ptx.machine import How
from tests.ptx.traffic import total, traffic

RESULTS = Path(__file__).parent / "results/whole_names.json"
WIDTHS = ((10, 64), (10, 68), (24, 128))
CODE = (("sm_90", "tf32x3"), ("sm_90", "bf16"), ("sm_80", "tf32x3"))
BY_POSITION = ("x_ptr", "z_ptr", "taps_ptr", "tokens_ptr", "age_ptr", "targets_ptr", "out_ptr")


def counted(launches: list[Launch], positions: int) -> dict[str, float]:
    """What some launches come to for each position."""
    moved = sum((total(launch.report) for launch in launches[1:]), total(launches[0].report))
    memory = sum(
        bytes_.once
        for launch in launches
        for (tensor, _), bytes_ in traffic(launch.report).items()
        if tensor in BY_POSITION
    )
    figures = {
        "instructions": sum(launch.report.instructions * launch.warps for launch in launches),
        "products": sum(launch.report.products for launch in launches),
        "barriers": 1000 * sum(launch.report.barriers for launch in launches),
        "asked": moved.requested,
        "a_program": moved.a_program,
        "memory": memory,
    }
    return {name: round(figure / positions, 2) for name, figure in figures.items()}


@torch.no_grad()
def rows(target: str, precision: str, n_embd: int, width: int) -> list[dict[str, Any]]:
    """The three rows of the table for one network and one kind of code."""
    torch.manual_seed(0)
    drawn = random.Random(0)
    packed = pack_ids([drawn.choices(range(1, 27), k=10) for _ in range(44)])
    model = ConvWave(27, n_embd, width, backend="eager").eval()
    multiplied = precision
    if precision == "bf16":
        model, multiplied = model.bfloat16(), "ieee"
    levels = [block.level() for block in model.layers]
    embedding, head = model.embedding.weight, model.head
    how = How(checks=False, counting=True)
    library.runs_kernels = lambda x: True  # type: ignore[assignment]
    with on_emulator(target, how) as names:
        library.score_names(embedding, levels, head.weight, head.bias, packed, precision=multiplied)
    with on_emulator(target, how) as by_level:
        graph = dense_graph(packed)
        stack.stack_inference(embedding[packed.tokens], levels, graph.rows(counted=False), multiplied)
    code = {"target": target, "precision": precision, "width": width}
    return [
        code | {"path": path, "launches": len(launches)} | counted(launches, positions)
        for path, launches, positions in (
            ("level by level", by_level.launches, len(packed)),
            ("one launch", names.launches[1:], len(packed)),
            ("its table", names.launches[:1], 27**2),
        )
    ]


LINE = (
    "{target} {precision:7} {width:3} {path:14} {instructions:7} instructions {products:6} products {barriers:7} "
    "barriers {asked:8} B asked {a_program:8} B a program {memory:7} B memory"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_names", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for (target, precision), (n_embd, width) in product(CODE, WIDTHS):
        for row in rows(target, precision, n_embd, width):
            print(LINE.format(**row), flush=True)
            table.append(row)
    lines = ",\n".join(json.dumps(row) for row in table)
    source = json.dumps(provenance("python -m benchmarks.whole_names"))
    write_atomic(args.out, f'{{"provenance": {source},\n"rows": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
