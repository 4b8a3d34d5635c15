"""Triton's launches on the interpreter: CPU tensors in and out, compiled PTX in between.

    with on_emulator("sm_90") as log:
        z, stats = conv_forward(...)
    assert not log.problems(), log.summary()

TRITON_INTERPRET has to be unset when triton is first imported. Compilation ends with the PTX, and is kept in the folder
`CACHE`, apart from triton's own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from convwave.kernels import configs
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .machine import PLAIN, Grid, How, Kernel
from .memory import Buffer
from .parse import Program
from .registers import Breach, breaches
from .report import Report

CACHE = Path(__file__).resolve().parents[2] / ".ptx_cache"
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
# tensors of which a kernel writes a part only, by kernel and argument: what it leaves is not a fault
PARTLY_WRITTEN = {("score_names_kernel", "scratch_ptr")}  # nothing where there is only a table's level

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_WIDE = re.compile(r"%rd\d+")
_kernels: dict[Any, Compiled] = {}

Patch = Callable[[str, str], str]  # kernel's name, PTX -> PTX


class Compiled(NamedTuple):
    """A kernel for one set of types and constants.

    Attributes:
        kernel: its code.
        params: the arguments that are left to hand over, in order.
        outputs: those that it writes; True where they hold something before, as what atomics add to.
        breaches: of the rules for wgmma's registers.
    """

    kernel: Kernel
    params: list[str]
    outputs: dict[str, bool]
    breaches: list[Breach]

    @classmethod
    def of(cls, ptx: str, shared: int, params: list[str]) -> Compiled:
        kernel = Kernel(ptx, shared)
        stored, added = written_parameters(kernel.program)
        outputs = {params[i]: i in added for i in sorted(stored | added)}
        return cls(kernel, params, outputs, breaches(kernel.program))


@dataclass
class Launch:
    """One launch.

    Attributes:
        name: of the kernel.
        module: that it is written in.
        compiled: it.
        grid: programs.
        arguments: by name, without constants.
        constants: by name.
        before: copies of what the kernel changes and does not write afresh.
        by_warp: whether its warps ran by themselves.
        warps: of a program.
        report: what it met.
        seconds: of CPU.
    """

    name: str
    module: str
    compiled: Compiled
    grid: Grid
    arguments: dict[str, Any]
    constants: dict[str, Any]
    before: dict[str, Tensor]
    by_warp: bool
    warps: int
    report: Report
    seconds: float

    def again(self, compiled: Compiled, how: How = PLAIN) -> tuple[Report, dict[str, Tensor]]:
        """The same launch, of another version of the kernel: what it met, and copies of its outputs."""
        for name, value in self.before.items():
            self.arguments[name].copy_(value)
        report = execute(self.name, compiled, self.grid, self.arguments, how)
        return report, {name: self.arguments[name].clone() for name in compiled.outputs}


@dataclass
class Log:
    """All launches of a block."""

    launches: list[Launch] = field(default_factory=list)

    def problems(self) -> dict[tuple[str, str, str], int]:
        """How often, by kernel, kind and place."""
        return self._counted("problems")

    def notes(self) -> dict[tuple[str, str, str], int]:
        return self._counted("notes")

    def _counted(self, what: str) -> dict[tuple[str, str, str], int]:
        found: dict[tuple[str, str, str], int] = {}
        for launch in self.launches:
            for (kind, place), n in getattr(launch.report, what).items():
                found[launch.name, kind, place] = found.get((launch.name, kind, place), 0) + n
        return found

    def summary(self) -> str:
        """A line for each launch, problem and note."""
        lines = []
        for launch in self.launches:
            report, grid = launch.report, " x ".join(map(str, launch.grid))
            lines.append(
                f"{launch.name:28} grid {grid:12} {launch.warps} warps {report.instructions:9,} instructions "
                f"{report.barriers:6,} barriers {report.reads_across:6,} words across {launch.seconds:.2f} s"
            )
        lines += [f"  PROBLEM {name}: {kind}, {n} times at {at}" for (name, kind, at), n in self.problems().items()]
        lines += [f"  note {name}: {kind}, {n} times at {at}" for (name, kind, at), n in self.notes().items()]
        return "\n".join(lines)


def written_parameters(program: Program) -> tuple[set[int], set[int]]:
    """Positions of the parameters that a kernel writes by st, and of those that it changes by atom.

    Every pointer is followed through the registers to the addresses of those instructions.
    """
    order = {name: i for i, (_, name) in enumerate(program.params)}
    reached: dict[str, set[int]] = {}
    changed = True
    while changed:  # in a loop, registers are read before they are written
        changed = False
        for ins in program.instructions:
            if ins.opcode.startswith("ld.param"):
                new = {order[ins.operands[1].strip("[] ").partition("+")[0].strip()]}
            elif ins.name in ("ld", "st", "atom", "setp") or not ins.operands:
                continue
            else:
                new = set().union(*(reached.get(register, set()) for register in _WIDE.findall(str(ins.operands[1:]))))
            for register in _WIDE.findall(ins.operands[0]):
                if not new <= reached.setdefault(register, set()):
                    reached[register] |= new
                    changed = True
    stored: set[int] = set()
    added: set[int] = set()
    for ins in program.instructions:
        for opcode, operand, found in (("st.global", 0, stored), ("atom.global", 1, added)):
            if ins.opcode.startswith(opcode):
                for register in _WIDE.findall(ins.operands[operand]):
                    found |= {i for i in reached.get(register, set()) if program.params[i][0] == "u64"}
    return stored, added


def poison(tensor: Tensor) -> None:
    """Fill with what no result should hold."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30 + 12345)


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def buffer_of(name: str, tensor: Tensor, writable: bool, initialised: bool) -> Buffer:
    size = extent(tensor)
    member = None
    if tensor.numel() * tensor.element_size() != size:
        whole = torch.zeros(size // tensor.element_size(), dtype=torch.bool)
        whole.as_strided(tensor.shape, tensor.stride()).fill_(True)
        member = whole.numpy() if not bool(whole.all()) else None
    return Buffer(name, tensor.data_ptr(), size, tensor.element_size(), writable, initialised, member)


def compile_kernel(
    fn: Any, arguments: dict[str, Any], options: dict[str, int], target: str, patch: Patch | None = None
) -> Compiled:
    """The kernel that triton would launch for these arguments; kept, in memory and on disk."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(fn.params):
        name, value = parameter.name, arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    named = tuple((name, str(value)) for name, value in constants.items())
    key = (fn, target, tuple(signature.items()), named, tuple(attributes), tuple(options.items()), patch)
    if key not in _kernels:
        source = ASTSource(fn, signature, constants, attributes)
        with triton.knobs.cache.scope(), mock.patch.object(CUDABackend, "make_cubin", return_value=b"not assembled"):
            triton.knobs.cache.dir = str(CACHE)
            result = triton.compile(source, target=TARGETS[target], options=dict(options))
        ptx = result.asm["ptx"] if patch is None else patch(fn.fn.__name__, result.asm["ptx"])
        params = [name for name in signature if name not in constants]
        _kernels[key] = Compiled.of(ptx, result.metadata.shared, params)
    return _kernels[key]


def execute(name: str, compiled: Compiled, grid: Grid, arguments: dict[str, Any], how: How) -> Report:
    """Poison what the kernel writes, run it, and add elements never written to its report."""
    buffers: dict[int, Buffer] = {}
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor) and value.numel()}
    read = {value.data_ptr() for key, value in tensors.items() if key not in compiled.outputs}
    for key, value in tensors.items():
        if value.device.type != "cpu":
            raise ValueError(f"{key}: expected a tensor on the CPU, got one on {value.device}")
        writable = key in compiled.outputs
        holds = not writable or compiled.outputs[key] or value.data_ptr() in read  # read too: written in place
        if writable or value.data_ptr() not in buffers:
            if not holds:
                poison(value)
            buffers[value.data_ptr()] = buffer_of(key, value, writable, holds)
    values = [
        value.data_ptr() if isinstance(value, Tensor) else value
        for value in (arguments[param] for param in compiled.params)
    ]
    kernel = compiled.kernel
    values += [0] * (
        len(kernel.program.params) - len(values)
    )  # memory for triton itself, which kernels here do not use
    report = kernel.launch(grid, values, list(buffers.values()), how)
    if how.checks:
        for breach in compiled.breaches:
            report.problem(breach.what, breach.place)
        for buffer in buffers.values():
            if buffer.writable and not buffer.initialised and (name, buffer.name) not in PARTLY_WRITTEN:
                missing = buffer.missing()
                if missing:
                    report.problem(f"elements of {buffer.name} that nobody writes", name, missing)
    return report


@contextmanager
def on_emulator(
    target: str = "sm_80",
    how: How = PLAIN,
    *,
    first_by_warp: bool = False,
    multiprocessors: int = 2,
    patch: Patch | None = None,
) -> Iterator[Log]:
    """Launches of Triton kernels go to the interpreter while this lasts.

    Args:
        target: in `TARGETS`; the tables of tiles are asked for it.
        how: order of programs, checks; each launch has a seed of its own, counted from this one.
        first_by_warp: run the warps of each kernel's first launch by themselves.
        multiprocessors: that the launchers see: how many programs share the tiles.
        patch: plants a fault in the PTX.
    """
    log = Log()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {key: value for key, value in kwargs.items() if key in self.arg_names}
        options = {key: value for key, value in kwargs.items() if key in ("num_warps", "num_stages")}
        compiled = compile_kernel(self, arguments, options, target, patch)
        given = {name: arguments[name] for name in compiled.params}
        constants = {name: value for name, value in arguments.items() if name not in given}
        programs: Grid = (*grid, 1, 1)[:3]
        name = self.fn.__name__
        first = first_by_warp and name not in {launch.name for launch in log.launches}
        its = replace(how, seed=how.seed + len(log.launches), by_warp=how.by_warp or first)
        before = {name: given[name].clone() for name, holds in compiled.outputs.items() if holds}
        started = time.process_time()
        report = execute(name, compiled, programs, given, its)
        seconds = time.process_time() - started
        warps = options.get("num_warps", 4)
        log.launches.append(
            Launch(
                name,
                self.fn.__module__,
                compiled,
                programs,
                given,
                constants,
                before,
                its.by_warp,
                warps,
                report,
                seconds,
            )
        )

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "has_wgmma", return_value=target == "sm_90"),
        mock.patch.object(configs, "multiprocessors", return_value=multiprocessors),
    ):
        yield log
