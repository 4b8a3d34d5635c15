"""Registers, spills, shared memory and traffic of every kernel as it is shipped, compiled ahead of time: no GPU needed.

    python -m benchmarks.resources                    all configurations, into results/kernel_resources.json
    python -m benchmarks.resources --width 68 --target sm_90
    python -m benchmarks.resources --missing          only those that results/ lacks: of a new kernel, or of other tiles

The launchers themselves are run, and what they would have launched is compiled: so the table cannot disagree with the
library. On sm_80 and sm_90 the figures are those of ``cuobjdump`` and ``nvdisasm``, on gfx942 those that LLVM writes
into the assembly. The PTX of sm_80 and sm_90 is then executed by tests/ptx, up to `COUNTED` channels, on a few hundred
rows, several tiles a program: of a dense graph, and of a distinct one for the variants "order" and "blocks". Bytes are
counted in units of C, one number for every row and channel of the level:

    asked      by all threads, weights, taps and statistics included; the L1 cache answers some
    a_program  in sectors of 32 bytes, each once a program: what the L2 cache delivers at least
    once       in sectors, each once in all: what memory moves at least
    nodes      of these, those of tensors with a row for each node: x, z, their activations and gradients
    conflicts  share of the passes over shared memory's banks that are there because words share a bank
    products   instructions of matrix units, executed for each row
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("resources: TRITON_INTERPRET=1 is set: the interpreter compiles nothing, unset it")

import torch
import triton
from convwave.kernels import configs, score, stack
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from convwave.data.graph import dense_graph, distinct_graph
from convwave.data.packing import Packed, pack_ids
from convwave.files import write_atomic
from convwave.ops.level import Level
from convwave.runs.registry import provenance
from tests.ptx.launch import Compiled, execute
from tests.ptx.machine import How
from tests.ptx.traffic import total, traffic

RESULTS = Path(__file__).parent / "results/kernel_resources.json"
WIDTHS = ((10, 68), (68, 68), (24, 27), (128, 128), (256, 256), (512, 512), (1024, 1024))
ROWS, MULTIPROCESSORS = 512, 2  # few enough to be executed; several tiles for each program
COUNTED = 256
NODES = ("x_ptr", "z_ptr", "h_ptr", "g_ptr", "dh_ptr", "dx_ptr")
MEASURED = ("registers", "spilled", "shared", "matrix")
TRAFFIC = ("asked", "a_program", "once", "nodes", "conflicts", "products")

NVIDIA = ("ieee", "tf32x3", "tf32", "bf16", "fp16")
TARGETS = {  # as triton names it, what it multiplies in, the instructions of its matrix units
    "sm_80": (GPUTarget("cuda", 80, 32), NVIDIA, "HMMA"),
    "sm_90": (GPUTarget("cuda", 90, 32), NVIDIA, "HGMMA|HMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), ("ieee", "bf16", "fp16"), "v_mfma"),
}


class Recorded(NamedTuple):
    """A launch that did not take place."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, int, int]


@contextmanager
def recording(target: str) -> Iterator[list[Recorded]]:
    """Collect launches, as for a target, instead of carrying them out."""
    launches: list[Recorded] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = {name: value for name, value in given.items() if name in self.arg_names}
        options = {name: value for name, value in given.items() if name in ("num_warps", "num_stages")}
        launches.append(Recorded(self, arguments, options, (*grid, 1, 1)[:3]))

    is_sm_90 = mock.patch.object(configs, "has_wgmma", return_value=target == "sm_90")
    few = mock.patch.object(configs, "multiprocessors", return_value=MULTIPROCESSORS)
    with mock.patch.object(JITFunction, "run", run), is_sm_90, few:
        yield launches


def stack_launches(C: int, H: int, precision: str, target: str) -> list[Recorded]:
    """Every kernel that a stack of two levels, (C, H) and (H, H), launches: training, inference, backward.

    Args:
        C, H: channels.
        precision: "ieee", "tf32x3" or "tf32" of float32, or a storage dtype, "bf16" or "fp16".
        target: in `TARGETS`.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    multiplied = precision if dtype == torch.float32 else "ieee"

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    with recording(target) as launches:
        # a dense graph: each row is read by few; a distinct one: in the order of its rows, by very many
        for make, most in ((dense_graph, None), (distinct_graph, 10**6)):
            graph = make(some_names(ROWS if max(C, H) <= 128 else ROWS // 2), 2)
            rows = list(graph.rows(consumers=True))
            if most:
                rows = [r._replace(consumers=r.consumers._replace(most=most)) for r in rows if r.consumers]
            x, dh = empty(graph.tokens.numel(), C, dtype=dtype), empty(graph.num_rows, H, dtype=dtype)
            levels = [Level(empty(H, c, 2), empty(H), empty(H), empty(H), empty(H), training=True) for c in (C, H)]
            fixed = [level._replace(training=False) for level in levels]
            _, zs, stats = stack.stack_forward(x, levels, rows, multiplied)
            stack.stack_inference(x, fixed, rows, multiplied)
            if H <= 128:  # whole names, with losses and with log-probabilities
                packed = some_names(ROWS)
                network = (empty(27**2, H, dtype=dtype), [empty(H, H, 2)] * 2, [empty(H)] * 2, empty(27, H), empty(27))
                options = {"factors": (2, 2, 2), "activation": "tanh", "precision": multiplied, "longest": 8}
                for targets in (packed.targets, None):
                    score.score_names(packed.tokens, packed.age, *network, **options, targets=targets)
            stack.stack_backward(dh, x, levels, zs, stats, rows, multiplied)
    return launches


@functools.cache
def some_names(positions: int) -> Packed:
    """Random ones, the same every time."""
    drawn = random.Random(0)
    lengths = [7] * (positions // 8)
    return pack_ids([drawn.choices(range(1, 27), k=length) for length in lengths])


_TYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "int32": "i32"}


def compile_launch(launch: Recorded, target: GPUTarget) -> Any:
    """Compile a launch for a target, as triton would: tensors aligned to 16 bytes, other numbers anything."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


def resources(compiled: Any, matrix: str) -> dict[str, int]:
    """Registers and spilled bytes of a thread, shared bytes of a program, instructions for matrix units."""
    if "cubin" not in compiled.asm:
        text = usage = compiled.asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        patterns = (r"REG:(\d+)", r"STACK:(\d+)")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
            usage, text = (
                subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
                for tool, option in commands
            )
    registers, spilled = (int(re.findall(pattern, usage)[0]) for pattern in patterns)
    found = len(re.findall(rf"\b(?:{matrix})", text))
    return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared, "matrix": found}


def plan(
    targets: Sequence[str], widths: Sequence[tuple[int, int]], precisions: Sequence[str] = NVIDIA
) -> Iterator[tuple[dict[str, Any], Recorded]]:
    """Each different kernel, width, precision and target: what the table says of it before it is compiled."""
    seen: set[tuple[Any, ...]] = set()
    for target, (C, H), precision in product(targets, widths, NVIDIA):
        possible = precision in precisions and precision in TARGETS[target][1]
        for launch in stack_launches(C, H, precision, target) if possible else ():
            key = (target, launch.kernel, *(_kind(p, launch.arguments[p.name]) for p in launch.kernel.params))
            if key not in seen:
                seen.add(key)
                yield _row(target, launch, precision), launch


def _kind(parameter: Any, value: Any) -> Any:
    """What a kernel is compiled for, of one argument."""
    return value if parameter.is_constexpr or value is None else getattr(value, "dtype", type(value))


_VARIANTS = {  # of each kernel, by the arguments that are not None
    "conv_forward": {"prologue": "below_ptr", "statistics": "partial_ptr", "activate": "ACTIVATION"},
    "conv_backward": {"prologue": "below_ptr", "order": "order_ptr", "blocks": "blocks_ptr", "fused": "dw_ptr"},
    "conv_weight": {"prologue": "below_ptr"},
    "block_sums": {"order": "order_ptr"},
    "score_names": {"losses": "targets_ptr"},
}


def _row(target: str, launch: Recorded, precision: str) -> dict[str, Any]:
    a, name = launch.arguments, launch.kernel.fn.__name__.removesuffix("_kernel")
    variants = [variant for variant, argument in _VARIANTS.get(name, {}).items() if a[argument] is not None]
    if name == "score_names":  # of all levels, with the columns that are there to pad
        a = a | {"C": a["BH"] + a["BE"]}
    return {
        "target": target,
        "kernel": name,
        "C": a["C"] if "C" in a else a["H"],
        "H": a["H"] if "H" in a else a["C"],
        "precision": precision,
        "variant": " ".join(variants),
        "tile": " x ".join(str(a[tile]) for tile in ("BT", "BR", "BC", "BH") if tile in a),
        "warps": launch.options.get("num_warps", 4),
        "stages": launch.options.get("num_stages", 3),
    }


def counted(launch: Recorded, compiled: Any) -> dict[str, float]:
    """Execute a launch on the interpreter and count: the columns `TRAFFIC`."""
    given = {p.name: launch.arguments[p.name] for p in launch.kernel.params if not p.is_constexpr}
    given = {name: value for name, value in given.items() if value is not None}
    kernel = Compiled.of(compiled.asm["ptx"], compiled.metadata.shared, list(given))
    report = execute(launch.kernel.fn.__name__, kernel, launch.grid, given, How(counting=True))
    node = launch.arguments["z_ptr"]
    unit = node.numel() * node.element_size()
    nodes = sum(moved.once for (tensor, _), moved in traffic(report).items() if tensor in NODES)
    sums = {name: value / unit for name, value in zip(TRAFFIC, (*total(report), nodes), strict=False)}
    share = report.conflicts / max(report.wavefronts, 1)
    figures = sums | {"conflicts": share, "products": report.products / node.shape[0]}
    return {name: round(value, 2) for name, value in figures.items()}


def measured(row: dict[str, Any], launch: Recorded, counting: bool) -> dict[str, Any]:
    """A row of the table, compiled and, where that is possible, counted."""
    torch.set_num_threads(1)
    target, _, matrix = TARGETS[row["target"]]
    compiled = compile_launch(launch, target)
    count = counting and row["target"] != "gfx942" and max(row["C"], row["H"]) <= COUNTED
    count &= row["kernel"] != "score_names"  # of which whole_names.py counts what a position takes
    return row | resources(compiled, matrix) | (counted(launch, compiled) if count else dict.fromkeys(TRAFFIC))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(value for name, value in row.items() if name not in (*MEASURED, *TRAFFIC))


_planned: list[tuple[dict[str, Any], Recorded, bool]] = []  # which forks inherit: jit functions cannot be sent


def _measured(i: int) -> dict[str, Any]:
    return measured(*_planned[i])


LINE = (
    "{target:7} {kernel:23} {C:5} -> {H:<5} {precision:7} {tile:14} {warps:2} warps {registers:4} registers "
    "{spilled:5} B spilled {shared:7} B shared {matrix:4} matrix"
)
COUNTS = " {asked:6} {a_program:6} {once:6} {nodes:5} C {conflicts:5} conflicts {products:6} products a row"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--width", type=int, action="append", metavar="C", help="levels of C to C channels only")
    parser.add_argument("--precision", action="append", choices=NVIDIA, help="default: all")
    parser.add_argument("--kernel", action="append", help="default: all")
    parser.add_argument("--compile-only", action="store_true", help="do not execute what was compiled")
    parser.add_argument("--missing", action="store_true", help="keep the rows of results/, make those that it lacks")
    parser.add_argument("--out", type=Path, help="write the rows as JSON (default: results/, if all are made)")
    args = parser.parse_args()
    partial = args.target or args.width or args.precision or args.kernel or args.compile_only
    widths = [(c, c) for c in args.width] if args.width else WIDTHS
    source = json.dumps(provenance("python -m benchmarks.resources" + " --missing" * args.missing))
    planned = plan(args.target or list(TARGETS), widths, args.precision or NVIDIA)
    chosen = [pair for pair in planned if not args.kernel or pair[0]["kernel"] in args.kernel]
    kept = json.loads(RESULTS.read_text())["rows"] if args.missing else []
    made = {_key(row): row for row in kept}
    _planned.extend((*pair, not args.compile_only) for pair in chosen if _key(pair[0]) not in made)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for row in pool.imap(_measured, range(len(_planned))):
            counts = COUNTS.format(**row) if row["once"] is not None else ""
            print(LINE.format(**row) + counts + "  " + row["variant"], flush=True)
            made[_key(row)] = row
    rows = [made[_key(row)] for row, _ in chosen]
    out = args.out or (None if partial else RESULTS)
    if out is not None:
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_atomic(out, f'{{"provenance": {source},\n"rows": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
