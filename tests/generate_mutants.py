"""Faults made by a machine: small changes of the arithmetic, one at a time, for `mutation.py`.

    python -m tests.generate_mutants               draw, plant what is new, and write tests/generated_mutants.json
    python -m tests.generate_mutants ops.stack ..  only of some modules
    python -m tests.generate_mutants --again       plant again what no test saw and nobody has judged

From the syntax tree of each file: + for -, * for /, < for <= and so on, a minimum for a maximum, a minus sign dropped,
a whole number of an expression one larger. The draw is seeded and by file. Faults that are listed stay as long as their
source does. What no test sees is a survivor, and needs a judgement, by hand: why it is no fault.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.mutation import GENERATED, ROOT, UNJUDGED, Mutant, run_all, source_of

# module -> how many faults are drawn
DRAWS = {
    "data.graph": 16,
    "data.batches": 10,
    "data.packing": 3,
    "ops.naive": 5,
    "ops.stack": 10,
    "ops.level": 3,
    "ops.fold": 3,
    "ops.functional": 6,
    "ops.library": 3,
    "kernels.primitives": 6,
    "kernels.forward": 5,
    "kernels.backward": 8,
    "kernels.activate": 3,
    "train.optim": 5,
    "train.closed_form": 8,
    "train.recipes": 3,
    "train.setup": 2,
    "train.loop": 3,
    "infer.generate": 6,
    "infer.score": 6,
}

_OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
}
_SYMBOLS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_NAMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}


def candidates(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Every change of a file: its line (from 1), where in the line it begins and ends, and what to put there."""
    lines = text.splitlines()
    tree = ast.parse(text)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if _is_no_arithmetic(node, parents):
            continue
        if isinstance(node, ast.BinOp | ast.Compare):
            left = node.left
            right = node.right if isinstance(node, ast.BinOp) else node.comparators[0]
            operator = type(node.op if isinstance(node, ast.BinOp) else node.ops[0])
            if operator in _OPERATORS and left.end_lineno == right.lineno:
                between = lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
                at = between.find(_SYMBOLS[operator])
                if at >= 0 and lines[right.lineno - 1].isascii():
                    begin = left.end_col_offset + at
                    yield right.lineno, begin, begin + len(_SYMBOLS[operator]), _OPERATORS[operator]
        elif isinstance(node, ast.Constant) and type(node.value) is int and _in_an_expression(node, parents):
            if lines[node.lineno - 1].isascii() and node.end_col_offset is not None:
                yield node.lineno, node.col_offset, node.end_col_offset, str(node.value + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and lines[node.lineno - 1].isascii():
            yield node.lineno, node.col_offset, node.col_offset + 1, ""
        elif isinstance(node, ast.Attribute) and node.attr in _NAMES and node.end_col_offset is not None:
            end = node.end_col_offset
            if lines[node.lineno - 1].isascii() and node.end_lineno == node.lineno:
                yield node.lineno, end - len(node.attr), end, _NAMES[node.attr]


def _is_no_arithmetic(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Inside an annotation, an error's condition or text, an assertion, or at the top of a module."""
    inside = False
    while node in parents:
        above = parents[node]
        if isinstance(above, ast.Raise | ast.Assert | ast.JoinedStr | ast.arguments):
            return True
        if isinstance(above, ast.If) and any(isinstance(part, ast.Raise) for part in above.body):
            return True
        if isinstance(above, ast.BinOp) and isinstance(above.op, ast.BitOr):
            return True
        if isinstance(above, ast.FunctionDef) and node is above.returns:
            return True
        inside = inside or isinstance(above, ast.FunctionDef)
        node = above
    return not inside


def _in_an_expression(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    return isinstance(parents[node], ast.BinOp | ast.Compare | ast.Subscript | ast.Slice) or (
        isinstance(parents[node], ast.Call)
        and isinstance(parents[node].func, ast.Name)  # type: ignore[attr-defined]
        and parents[node].func.id == "range"  # type: ignore[attr-defined]
    )


def as_mutant(module: str, text: str, change: tuple[int, int, int, str]) -> Mutant | None:
    """A change as a fault, whose old text is its line and as many lines before it as make it unique."""
    number, begin, end, new = change
    lines = text.splitlines()
    line = lines[number - 1]
    changed = line[:begin] + new + line[end:]
    for first in range(number - 1, max(number - 4, -1), -1):
        before = "".join(f"{above}\n" for above in lines[first : number - 1])
        old = (before + line).strip()
        if text.count(old) == 1:
            name = f"{module}: {line[begin:end]} -> {new or 'nothing'} in {changed.strip()}"
            return Mutant(name.replace("|", "or"), module, old, (before + changed).strip())
    return None


def draw(module: str, count: int, listed: Sequence[Mutant] = ()) -> list[Mutant]:
    """The listed faults of a module that its source still has, and a seeded sample of others up to `count`."""
    text = source_of(module).read_text(encoding="utf-8")
    kept = [mutant for mutant in listed if mutant.module == module and text.count(mutant.old) == 1][:count]
    found = [as_mutant(module, text, change) for change in candidates(text)]
    unique = {mutant.name: mutant for mutant in found if mutant is not None and _compiles(text, mutant)}
    # a wrong address or mask reads what is not there: the interpreter dies
    address = re.compile(r"_ptr|p_p| in (?:[mpo]_\w+|[ij]) = ")
    unique = {name: mutant for name, mutant in unique.items() if not address.search(name)}
    others = sorted(unique.keys() - {mutant.name for mutant in kept})
    chosen = random.Random(module).sample(others, min(count - len(kept), len(others)))
    return [*kept, *(unique[name] for name in chosen)]


def _compiles(text: str, mutant: Mutant) -> bool:
    try:
        compile(text.replace(mutant.old, mutant.new), mutant.module, "exec")
    except SyntaxError:
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    known = {entry["name"]: entry for entry in json.loads(GENERATED.read_text(encoding="utf-8"))}
    modules = [name for name in arguments if not name.startswith("--")] or list(DRAWS)
    fields = ("name", "module", "old", "new")
    listed = [Mutant(*(entry[name] for name in fields)) for entry in known.values()]
    for module in modules:
        drawn = draw(module, DRAWS[module], listed)
        known = {name: entry for name, entry in known.items() if entry["module"] != module or name in names(drawn)}
        again = {name for name, entry in known.items() if entry.get("survives", "").startswith(UNJUDGED)}
        new = [m for m in drawn if m.name not in known or ("--again" in arguments and m.name in again)]
        for some in (new[i : i + 4] for i in range(0, len(new), 4)):
            outcomes = run_all("tests", some, control=False)
            for mutant in some:
                entry = {"name": mutant.name, "module": mutant.module, "old": mutant.old, "new": mutant.new}
                outcome = outcomes[mutant.name]
                entry |= {"by": outcome.by} if outcome.caught else {"survives": f"{UNJUDGED}: {outcome.by[-300:]}"}
                known[mutant.name] = entry
            entries = sorted(known.values(), key=lambda entry: list(DRAWS).index(entry["module"]))
            GENERATED.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        caught = sum("survives" not in known[mutant.name] for mutant in drawn)
        print(f"{module}: {caught} of {len(drawn)} caught", flush=True)
    print(f"the others are in {GENERATED.relative_to(Path(ROOT))}")
    return 0


def names(mutants: Sequence[Mutant]) -> set[str]:
    return {mutant.name for mutant in mutants}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
