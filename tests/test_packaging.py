"""What is installed, what is imported, and what must not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

import convwave
from convwave.train.tiers import TIERS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("convwave", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kernels_are_installed_as_convwave_kernels() -> None:
    spec = util.find_spec("convwave.kernels")
    assert spec is not None
    assert spec.origin is not None
    assert "convwave" in metadata.packages_distributions()
    assert not [path for path in SOURCES for name in imports(path) if name.split(".")[0] == "kernels"]


def test_the_library_imports_without_triton_rich_or_matplotlib() -> None:
    """Triton is missing on macOS and Windows; the other two only the commands need."""
    code = (
        "import sys\n"
        "for name in ('triton', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "import convwave as cw\n"
        "graph = cw.dense_graph(cw.pack_ids([[1, 2], [3]]))\n"
        "print(float(cw.loss(cw.ConvWave(4)(graph), graph)) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


# What each room may import, from the ground up. A room is a file or a folder, whose files may import each other.
ROOMS = {
    "_lazy": set(),
    "files": set(),
    "data": {"files"},
    "reference": {"data"},
    "ops": {"data"},
    "kernels": {"data"},
    "nn": {"data", "ops", "files"},
    "convert": {"reference", "nn", "data"},
    "infer": {"nn", "ops", "data", "files"},
    "runs": {"files"},
    "train": {"files", "data", "reference", "ops", "nn", "convert", "infer", "runs"},
    "verify": {"files", "data", "reference", "ops", "nn", "convert", "infer", "runs", "train"},
    "cli": {"files", "data", "reference", "ops", "nn", "convert", "infer", "runs", "train", "verify"},
}


def room(module: str) -> str | None:
    """The room of a module of ours; None for the package itself."""
    parts = module.split(".")
    return None if parts == ["convwave"] else parts[1]


def library() -> dict[str, Path]:
    """Every module of the library and its file."""
    found = {}
    for folder, package in (("convwave", "convwave"), ("kernels", "convwave.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def eager_imports(path: Path) -> set[str]:
    """What a module imports when it is imported: nothing inside functions or under TYPE_CHECKING."""
    names: set[str] = set()
    body = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Try | ast.ClassDef):
            body += node.body
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            body += [*node.body, *node.orelse]
    return names


def test_every_room_imports_only_what_lies_below_it() -> None:
    for module, path in library().items():
        here = room(module)
        if here in (None, "__main__"):
            continue
        for name in imports(path):
            if name.split(".")[0] != "convwave" or name == "convwave" or name not in library():
                continue
            there = room(name)
            if there == "_lazy" or there == here:
                continue
            if (here, there) in {("ops", "kernels"), ("kernels", "ops")}:  # inside functions, or for types, only
                assert name not in eager_imports(path), (module, name)
                continue
            assert there in ROOMS[here], (module, name)


def test_there_is_no_circle() -> None:
    modules = library()
    arrows = {
        module: {name for name in eager_imports(path) if name in modules and name != module}
        for module, path in modules.items()
    }
    while arrows:
        ground = {module for module, below in arrows.items() if not below & arrows.keys()}
        assert ground, f"a circle among {sorted(arrows)}"
        arrows = {module: below for module, below in arrows.items() if module not in ground}


def test_nothing_of_the_library_imports_benchmarks_or_tests() -> None:
    for module, path in library().items():
        assert not {name.split(".")[0] for name in imports(path)} & {"benchmarks", "tests"}, module


def test_tiers_import_none_of_each_other() -> None:
    tiers = {tier.begin.partition(":")[0] for tier in TIERS.values()}
    assert len(tiers) == len(TIERS)
    for tier in tiers:
        assert not imports(library()[tier]) & (tiers - {tier}), tier


def test_no_public_function_takes_more_than_eleven_arguments() -> None:
    for module in ("train", "runs", "cli", "data"):
        for path in (ROOT / "convwave" / module).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                    assert count <= 11, (path, node.name)


def test_public_names_exist_and_are_documented() -> None:
    for name in convwave.__all__:
        value = getattr(convwave, name)
        assert value.__doc__, name
    promised = "Vocabulary pack pack_ids dense_graph windowed_graph distinct_graph ConvWave loss reference"
    promised += " from_windowed to_windowed conv_bn_tanh load"
    assert set(promised.split()) <= set(convwave.__all__)
    assert (ROOT / "convwave/py.typed").exists()


def test_the_posts_data_is_not_in_the_repository() -> None:
    done = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert "data/names.txt" not in done.stdout.split()
