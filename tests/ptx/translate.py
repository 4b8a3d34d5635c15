"""Instructions -> Python functions, one for each stretch between barriers, atomics and branches.

A function takes an agent and its registers, R[i]: one numpy array over the agent's threads for every register, of the
unsigned type of its width, or bool for a predicate. It returns the number of the stretch that follows.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import scalars
from .parse import Instruction, Program
from .scalars import FLOAT, SHARED_BASE, SIGNED, UNSIGNED, PtxError

SPECIAL = ("%tid", "%ctaid", "%nctaid", "%ntid", "%laneid", "%warpid")
ENDS = ("bra", "ret", "exit", "bar", "barrier", "atom", "red")  # instructions that end a stretch
STOPS = ("bar", "barrier", "atom", "red")  # and those that stand in one by themselves
SHAPE = re.compile(r"m\d+n\d+k\d+")


def width_of(register: str) -> int:
    """Bytes of a register, by the names that LLVM gives them."""
    name = register[1:]
    if name.startswith("rs"):
        return 2
    if name.startswith(("rd", "fd")):
        return 8
    return 1 if name.startswith("p") else 4


def bits_of(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def group(text: str) -> list[str]:
    """The registers of a vector operand, or the one operand."""
    text = text.strip()
    return [t.strip() for t in text[1:-1].split(",")] if text.startswith("{") else [text]


class Translation:
    """A program as Python: `segments` are its functions, `sizes` their numbers of instructions, in the same order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.registers: dict[str, int] = {}
        self._constants: dict[str, Any] = {}
        instructions = program.instructions
        starts = {0, *program.labels.values()}
        for n, instruction in enumerate(instructions):
            if instruction.name in ENDS:
                starts |= {n + 1} | ({n} if instruction.name in STOPS else set())
        ordered = sorted(start for start in starts if start < len(instructions))
        self._segment_of = {start: i for i, start in enumerate(ordered)}
        stops = [*ordered[1:], len(instructions)]
        self.sizes = [stop - start for start, stop in zip(ordered, stops, strict=True)]
        source = "\n".join(self._segment(i, *ends) for i, ends in enumerate(zip(ordered, stops, strict=True)))
        space: dict[str, Any] = {**vars(scalars), "np": np, **self._constants}
        exec(compile(source, f"<{program.name}>", "exec"), space)
        self.segments: list[Callable[[Any, list[Any]], int]] = [space[f"segment{i}"] for i in range(len(ordered))]

    def _segment(self, i: int, start: int, stop: int) -> str:
        lines = [f"def segment{i}(A, R):"]
        for n in range(start, stop):
            instruction = self.program.instructions[n]
            try:
                lines += ["    " + line for line in self._one(instruction, n)]
            except (KeyError, ValueError, IndexError, NotImplementedError, AssertionError) as error:
                where = f"{instruction.place}: {instruction.opcode} {', '.join(instruction.operands)}"
                raise PtxError(f"{where}: not known to the interpreter ({error!r})") from error
        following = self._segment_of.get(stop)
        lines.append(f"    return {following if following is not None else 'A.leave()'}")
        return "\n".join(lines)

    # operands

    def _register(self, name: str) -> str:
        return f"R[{self.registers.setdefault(name, len(self.registers))}]"

    def _constant(self, value: Any) -> str:
        name = f"k_{type(value).__name__}_{value.tobytes().hex()}"
        self._constants[name] = value
        return name

    def _operand(self, text: str, kind: str) -> str:
        """An expression of the type `kind`: u16, s32, f32, b64, pred, ..."""
        if text.startswith(SPECIAL):
            return f"A.special({text!r})"
        if kind == "pred":
            return self._register(text) if text.startswith("%") else f"A.full(np.bool_, {int(text, 0) != 0})"
        if not text.startswith("%"):
            return self._constant(self._immediate(text, kind))
        width = width_of(text)
        if width * 8 != bits_of(kind):
            raise NotImplementedError(f"{text} as {kind}")
        view = {"s": f".view(i{width})", "f": f".view(f{width})"}.get(kind[0], "")
        return self._register(text) + view

    def _immediate(self, text: str, kind: str) -> Any:
        letter, bits = kind[0], bits_of(kind)
        if text == "global_smem":
            return scalars.u4(SHARED_BASE)
        if text[:2].lower() in ("0f", "0d"):
            raw = int(text[2:], 16)
            packed = struct.pack("<I" if text[1] in "fF" else "<Q", raw)
            size = len(packed)
            return np.frombuffer(packed, FLOAT[size] if letter == "f" else UNSIGNED[size])[0]
        value = int(text.rstrip("U"), 0)
        if letter == "f":
            return FLOAT[bits // 8](value)
        unsigned = np.array([value & ((1 << bits) - 1)], UNSIGNED[bits // 8])
        return unsigned.view(SIGNED[bits // 8])[0] if letter == "s" else unsigned[0]

    def _address(self, text: str, bits: int) -> str:
        found = re.fullmatch(r"(%\w+|global_smem)\s*(?:\+\s*(-?\w+))?", text.strip()[1:-1].strip())
        if found is None:
            raise NotImplementedError(f"address {text}")
        base = f"A.full(u4, {SHARED_BASE})" if found[1] == "global_smem" else self._operand(found[1], f"b{bits}")
        offset = int(found[2], 0) if found[2] else 0
        constant = self._constant(UNSIGNED[bits // 8](offset & ((1 << bits) - 1)))
        return f"({base} + {constant})" if offset else base

    def _guard(self, ins: Instruction) -> str:
        if ins.guard is None:
            return "None"
        return f"~{self._register(ins.guard)}" if ins.negated else self._register(ins.guard)

    def _list(self, names: list[str], kind: str = "b32") -> str:
        return f"[{', '.join(self._operand(name, kind) for name in names)}]"

    def _targets(self, names: list[str]) -> str:
        """Registers to unpack a list into."""
        return ", ".join(self._register(name) for name in names) + ","

    def _assign(self, ins: Instruction, target: str, expression: str) -> list[str]:
        """To a register, where the guard holds."""
        if target == "_":
            return []
        register = self._register(target)
        kind = "np.bool_" if target.startswith("%p") else f"u{width_of(target)}"
        value = f"A.fit({expression}, {kind})"
        if ins.guard is None:
            return [f"{register} = {value}"]
        return [f"{register} = np.where({self._guard(ins)}, {value}, {register})"]

    # instructions, by the section of the ISA that describes them

    def _one(self, ins: Instruction, n: int) -> list[str]:
        name = ins.name
        if name == "bra":
            to = self._segment_of[self.program.labels[ins.operands[0]]]
            return self._leave_for(ins, str(to))
        if name in ("ret", "exit"):
            return self._leave_for(ins, "A.leave()")
        if name in ("bar", "barrier"):
            return self._barrier(ins, n)
        if name in ("ld", "st"):
            return self._access(ins)
        method: Callable[[Instruction], list[str]] | None = getattr(self, f"_{name}", None)
        if method is not None:
            return method(ins)
        expression = self._value(ins)
        return self._assign(ins, ins.operands[0], expression)

    def _leave_for(self, ins: Instruction, to: str) -> list[str]:
        if ins.guard is None:
            return [f"return {to}"]
        return [f"if A.uniform({self._guard(ins)}, {ins.place!r}): return {to}"]

    def _barrier(self, ins: Instruction, n: int) -> list[str]:
        """ "bar, barrier" and "bar.warp.sync"."""
        assert ins.guard is None
        if ins.parts[1] == "warp":
            return [f"A.warp_sync({ins.place!r})", f"return {self._segment_of[n + 1]}"]
        count = int(ins.operands[1], 0) if len(ins.operands) > 1 else 0
        return [
            f"A.barrier({int(ins.operands[0], 0)}, {count}, {ins.place!r})",
            f"return {self._segment_of[n + 1]}",
        ]

    def _membar(self, ins: Instruction) -> list[str]:
        """ "membar, fence": the proxy fence matters to wgmma; others stand beside an atomic that orders as much."""
        return ["A.fence_proxy()"] if "proxy" in ins.parts else [f"A.fence({ins.opcode!r})"]

    _fence = _membar

    def _mov(self, ins: Instruction) -> list[str]:
        target, source = ins.operands
        kind = ins.parts[-1]
        if kind == "pred":
            return self._assign(ins, target, self._operand(source, "pred"))
        bits = bits_of(kind)
        wide = f"u{bits // 8}"
        if target.startswith("{"):
            names = group(target)
            part = bits // len(names)
            whole = self._operand(source, f"b{bits}")
            shifts = [self._constant(UNSIGNED[bits // 8](part * i)) for i in range(len(names))]
            lines = []
            for name, shift in zip(names, shifts, strict=True):
                lines += self._assign(ins, name, f"({whole} >> {shift}).astype(u{part // 8})")
            return lines
        if source.startswith("{"):
            names = group(source)
            part = bits // len(names)
            terms = [
                f"({self._operand(name, f'b{part}')}.astype({wide}) << {self._constant(UNSIGNED[bits // 8](part * i))})"
                for i, name in enumerate(names)
            ]
            return self._assign(ins, target, " | ".join(terms))
        return self._assign(ins, target, self._operand(source, f"b{bits}"))

    def _access(self, ins: Instruction) -> list[str]:
        """ "ld", "ld.global.nc", "st"."""
        parts = ins.parts
        if parts[1] == "param":
            name, _, offset = ins.operands[1].strip()[1:-1].partition("+")
            return self._assign(ins, ins.operands[0], f"A.param({name.strip()!r}, {int(offset or 0)})")
        width = bits_of(parts[-1]) // 8
        space, bits = ("global", 64) if "global" in parts else ("shared", 32)
        if space == "shared" and not any(part.startswith("shared") for part in parts):
            raise NotImplementedError("a state space other than global and shared")
        if parts[0] == "ld":
            names = group(ins.operands[0])
            address = self._address(ins.operands[1], bits)
            old = ", ".join(self._register(name) for name in names) if ins.guard else ""
            call = f"A.load_{space}({address}, {width}, {len(names)}, {self._guard(ins)}, [{old}], {ins.place!r})"
            if any(width_of(name) != width for name in names):  # a byte into a wider register
                assert ins.guard is None
                assert len(names) == 1
                assert width < width_of(names[0])
                return [f"{self._register(names[0])} = {call}[0].astype(u{width_of(names[0])})"]
            return [f"{self._targets(names)} = {call}"]
        names = group(ins.operands[1])
        values = ", ".join(
            f"{self._register(name)}.astype(u{width})"
            if name.startswith("%") and width_of(name) > width
            else self._operand(name, f"b{width * 8}")
            for name in names
        )
        address = self._address(ins.operands[0], bits)
        return [f"A.store_{space}({address}, {width}, [{values}], {self._guard(ins)}, {ins.place!r})"]

    def _cvta(self, ins: Instruction) -> list[str]:
        """Generic and global addresses are the same here; shared memory is addressed in its own window."""
        return self._assign(ins, ins.operands[0], self._operand(ins.operands[1], ins.parts[-1]))

    def _ldmatrix(self, ins: Instruction) -> list[str]:
        assert ins.guard is None
        count, names = int(ins.opcode.partition(".x")[2][0]), group(ins.operands[0])
        assert len(names) == count
        address = self._address(ins.operands[1], 32)
        return [f"{self._targets(names)} = A.ldmatrix({address}, {count}, {'trans' in ins.parts}, {ins.place!r})"]

    def _stmatrix(self, ins: Instruction) -> list[str]:
        assert ins.guard is None
        count, values = int(ins.opcode.partition(".x")[2][0]), self._list(group(ins.operands[1]))
        address = self._address(ins.operands[0], 32)
        return [f"A.stmatrix({address}, {values}, {count}, {'trans' in ins.parts}, {ins.place!r})"]

    def _cp(self, ins: Instruction) -> list[str]:
        """ "cp.async", "cp.async.commit_group", "cp.async.wait_group, cp.async.wait_all"."""
        what, operands = ins.parts[2], ins.operands
        assert ins.parts[1] == "async"
        if what == "commit_group":
            return ["A.cp_commit()"]
        if what == "wait_group":
            return [f"A.cp_wait({int(operands[0], 0)})"]
        if what == "wait_all":
            return ["A.cp_commit()", "A.cp_wait(0)"]
        taken = self._operand(operands[3], "b32") if len(operands) > 3 else "None"
        to, source = self._address(operands[0], 32), self._address(operands[1], 64)
        size = int(operands[2], 0)
        return [f"A.cp_async({to}, {source}, {size}, {taken}, {self._guard(ins)}, {ins.place!r})"]

    def _atom(self, ins: Instruction) -> list[str]:
        """ "atom": integer additions in global memory."""
        parts, operands = ins.parts, ins.operands
        if parts[1] != "global" or parts[-1] not in ("u32", "s32") or "add" not in parts:
            raise NotImplementedError("an atomic other than atom.global.add of 32 bits")
        semantics = next((p for p in parts if p in ("relaxed", "acquire", "release", "acq_rel")), "relaxed")
        scope = next((p for p in parts if p in ("cta", "cluster", "gpu", "sys")), "gpu")
        register, address = self._register(operands[0]), self._address(operands[1], 64)
        return [
            f"{register} = A.atomic_add({address}, {self._operand(operands[2], 'b32')}, {self._guard(ins)}, "
            f"{register}, {semantics!r}, {scope!r}, {ins.place!r})"
        ]

    def _shfl(self, ins: Instruction) -> list[str]:
        """ "shfl.sync": the predicate beside the result, and lanes that are not named, are not used by Triton."""
        assert ins.guard is None
        target, value, lane, clamp = ins.operands[:4]
        call = f"A.shuffle({ins.parts[2]!r}, {self._operand(value, 'b32')}, {self._operand(lane, 'u32')}"
        return self._assign(ins, target.split("|")[0], f"{call}, {int(clamp, 0)})")

    def _mma(self, ins: Instruction) -> list[str]:
        """ "mma": float32 accumulators, a row by b column."""
        types = ins.parts[-4:]
        assert ins.guard is None
        assert types[0] == types[3] == "f32"
        assert ins.parts[-6:-4] == ["row", "col"]
        shape = next(part for part in ins.parts if SHAPE.fullmatch(part))
        d, a, b, c = (group(operand) for operand in ins.operands[:4])
        lists = ", ".join(self._list(names) for names in (a, b, c))
        return [f"{self._targets(d)} = A.mma({shape!r}, {types[1]!r}, {lists})"]

    def _wgmma(self, ins: Instruction) -> list[str]:
        """ "wgmma.mma_async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"."""
        parts, operands = ins.parts, ins.operands
        assert ins.guard is None
        if parts[1] == "fence":
            return ["A.wgmma_fence()"]
        if parts[1] == "commit_group":
            return ["A.wgmma_commit()"]
        if parts[1] == "wait_group":
            return [f"A.wgmma_wait({int(operands[0], 0)})"]
        shape = next(part for part in parts if SHAPE.fullmatch(part))
        types = parts[-3:]
        assert types[0] == "f32"
        d, in_registers = group(operands[0]), operands[1].startswith("{")
        a = self._list(group(operands[1])) if in_registers else self._operand(operands[1], "b64")
        b, scale = self._operand(operands[2], "b64"), self._operand(operands[3], "pred")
        flags = [int(flag, 0) for flag in operands[4:]]
        assert flags[:2] == [1, 1]  # neither operand is negated
        transposed_a = 0 if in_registers or len(flags) == 2 else flags[2]
        transposed_b = 0 if len(flags) == 2 else flags[-1]
        call = f"A.wgmma({shape!r}, {types[1]!r}, {a}, {b}, {self._list(d)}, {scale}"
        return [f"{self._targets(d)} = {call}, {transposed_a}, {transposed_b}, {ins.place!r})"]

    def _value(self, ins: Instruction) -> str:
        """The expression of an instruction that computes one register from others."""
        name, parts, operands, kind = ins.name, ins.parts, ins.operands, ins.parts[-1]

        def a(i: int, of: str = kind) -> str:
            return self._operand(operands[i], of)

        def raw(i: int) -> str:  # bits, where the sign does not matter
            return a(i, kind if kind[0] == "f" else "b" + kind[1:])

        def immediate(i: int) -> int:
            return int(operands[i].rstrip("U"), 0)

        match name:
            # "Integer Arithmetic", "Floating Point"
            case "add" | "sub":
                assert "cc" not in parts
                return f"{raw(1)} {'+' if name == 'add' else '-'} {raw(2)}"
            case "mul" | "mad" | "fma":
                return self._product(ins, a, raw)
            case "div" | "rem":
                return f"{a(1)} / {a(2)}" if kind[0] == "f" else f"A.{name}({a(1)}, {a(2)})"
            case "min" | "max" if kind[0] == "f":
                assert "NaN" not in parts
                return f"np.f{name}({a(1)}, {a(2)})"
            case "min" | "max":
                return f"np.{name}imum({a(1)}, {a(2)})"
            case "abs":
                return f"np.abs({a(1)})"
            case "neg":
                zero = "" if kind[0] == "f" else self._constant(UNSIGNED[bits_of(kind) // 8](0)) + " "
                return f"{zero}-{raw(1)}"
            case "ex2":
                return f"np.exp2({a(1)}.astype(f8)).astype(f4)"
            case "lg2":
                return f"np.log2({a(1)}.astype(f8)).astype(f4)"
            case "rcp":
                return f"f4(1) / {a(1)}"
            case "sqrt":
                return f"np.sqrt({a(1)})"
            case "rsqrt":
                return f"(1 / np.sqrt({a(1)}.astype(f8))).astype(f4)"
            case "popc":
                return f"np.bitwise_count({a(1)}).astype(u4)"
            case "redux":
                return f"A.redux({parts[2]!r}, {a(1)})"
            # "Comparison and Selection"
            case "selp":
                return f"np.where({a(3, 'pred')}, {a(1)}, {a(2)})"
            case "setp":
                return self._comparison(ins)
            # "Logic and Shift"
            case "and" | "or" | "xor":
                return f"{a(1)} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[name]} {a(2)}"
            case "not":
                return f"~{a(1)}"
            case "lop3":
                return f"A.lop3({a(1)}, {a(2)}, {a(3)}, {immediate(4)})"
            case "shl" | "shr":
                return f"A.{name}({a(1)}, {a(2, 'u32')}, {bits_of(kind)})"
            case "shf":
                pair = f"(({a(2, 'b32')}.astype(u8) << u8(32)) | {a(1, 'b32')}.astype(u8))"
                amount = immediate(3) if parts[1] == "r" else 32 - immediate(3)
                return f"({pair} >> u8({amount})).astype(u4)"
            case "bfe":
                return f"A.bfe({a(1, 'b32')}, {immediate(2)}, {immediate(3)}, {kind[0] == 's'})"
            case "bfi":
                mask = ((1 << immediate(4)) - 1) << immediate(3)
                return f"(({a(1)} << u4({immediate(3)})) & u4({mask})) | ({a(2)} & u4({~mask & 0xFFFFFFFF}))"
            case "prmt":
                return f"A.prmt({a(1, 'b32')}, {a(2, 'b32')}, {immediate(3)})"
            case "cvt":
                return self._conversion(ins)
        raise NotImplementedError(name)

    def _product(self, ins: Instruction, a: Callable[[int], str], raw: Callable[[int], str]) -> str:
        """ "mul", "mad", "fma": float32 products are exact in float64, so that fma rounds once (or, rarely, twice)."""
        name, mode, kind = ins.name, ins.parts[1], ins.parts[-1]
        if kind == "f32":
            return f"{a(1)} * {a(2)}" if name == "mul" else f"({a(1)}.astype(f8) * {a(2)} + {a(3)}).astype(f4)"
        if kind == "f64":
            assert name == "mul"
            return f"{a(1)} * {a(2)}"
        width = bits_of(kind) // 8
        if mode == "lo":
            return f"{raw(1)} * {raw(2)}" + (f" + {raw(3)}" if name == "mad" else "")
        wide = f"{'i' if kind[0] == 's' else 'u'}{2 * width}"
        product = f"({a(1)}.astype({wide}) * {a(2)}.astype({wide}))"
        if mode == "wide":
            addend = f" + {self._operand(ins.operands[3], f'b{16 * width}')}" if name == "mad" else ""
            return f"A.fit({product}, u{2 * width}){addend}"
        assert mode == "hi"
        assert name == "mul"
        return f"({product} >> {wide}({8 * width})).astype(u{width})"

    def _comparison(self, ins: Instruction) -> str:
        """ "setp": ordered comparisons are false for NaN, those that end in u are true."""
        kind, how = ins.parts[-1], ins.parts[1]
        x, y = self._operand(ins.operands[1], kind), self._operand(ins.operands[2], kind)
        symbols = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        symbols |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="} if kind[0] in "bu" else {}
        nan = f"(np.isnan({x}) | np.isnan({y}))"
        if how in symbols:
            expression = f"({x} {symbols[how]} {y})"
            if kind[0] == "f" and how == "ne":
                expression = f"({expression} & ~{nan})"
        elif how in ("num", "nan"):
            expression = nan if how == "nan" else f"~{nan}"
        else:
            assert how.endswith("u")
            expression = f"(({x} {symbols[how[:2]]} {y}) | {nan})"
        if len(ins.parts) == 4:  # setp.lt.and.s32 p, a, b, q
            q = ins.operands[3]
            other = f"~{self._register(q[1:])}" if q.startswith("!") else self._register(q)
            symbol = {"and": "&", "or": "|", "xor": "^"}[ins.parts[2]]
            expression = f"({expression} {symbol} {other})"
        return expression

    def _conversion(self, ins: Instruction) -> str:
        """ "cvt": between integers, floats, and pairs of halves."""
        to, source = ins.parts[-2:]
        target, *given = ins.operands
        if to == "tf32":
            assert "rna" in ins.parts
            return f"rounded_tf32({self._operand(given[0], 'b32')})"
        if to in ("bf16x2", "f16x2"):
            narrow = "rounded_bf16({})" if to == "bf16x2" else "({}).astype(f2).view(u2)"
            high, low = (narrow.format(self._operand(text, "f32")) for text in given)
            return f"({high}.astype(u4) << u4(16)) | {low}.astype(u4)"
        if to == "bf16":
            return f"rounded_bf16({self._operand(given[0], 'f32')})"
        if source == "bf16":
            assert to == "f32"
            return f"from_bf16({self._operand(given[0], 'b16')})"
        if to[0] in "us" and source[0] in "us":
            return self._integer_conversion(to, source, target, given[0])
        if to[0] == "f" and source[0] in "us":
            return f"{self._operand(given[0], source)}.astype(f{bits_of(to) // 8})"
        assert to[0] == source[0] == "f"
        value = f"{self._operand(given[0], 'b16')}.view(f2)" if source == "f16" else self._operand(given[0], source)
        return f"{value}.astype(f{bits_of(to) // 8})"

    def _integer_conversion(self, to: str, source: str, target: str, given: str) -> str:
        letters = {"u": "u", "s": "i"}
        width = width_of(given) if given.startswith("%") else 0
        size = bits_of(source) // 8
        if width > size:  # the low bits of a wider register
            value = f"{self._operand(given, f'b{width * 8}')}.astype(u{size})"
            value += f".view(i{size})" if source[0] == "s" else ""
        else:
            value = self._operand(given, source)
        value = f"{value}.astype({letters[to[0]]}{bits_of(to) // 8})"
        wider = width_of(target)
        return value if wider * 8 == bits_of(to) else f"{value}.astype({letters[to[0]]}{wider})"
